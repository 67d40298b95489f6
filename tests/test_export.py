"""tools/export.py: exported folders work without this repository, and describe their model."""

import dataclasses
import hashlib
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny_model
import torch
from conftest import ROOT, one_error, python, raising, read_json, refuses
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import check_imports, get_imports

from coconut import Coconut
from config import Config
from dataset import collate_prompts
from model import thought
from tools import export, portable
from trainer import checkpoint, files, inference, run_folder
from trainer.pretrained import END, load_model

QUESTIONS = ["3+4", "5*6-0*2", "9?", "7!?", "12"]
NEW = 8  # tokens
# pieces of a tokenizer that joins a newline with the mark before it, as Llama 3's and Qwen2's do
JOINING = r"###|\d|[?!]\n|[\s\S]"
LLAMA = {"shape": "llama", "thought": "last"}
CASES = {
    "gpt2": {"shape": "gpt2", "thought": "last"},
    "llama": LLAMA,
    "llama untied": LLAMA | {"tied": False},
    "qwen2": {"shape": "qwen2", "thought": "last"},
    "gpt2 bf16": {"shape": "gpt2", "bf16_weights": True, "thought": "projected+normalised"},
    "llama bf16": LLAMA | {"bf16_weights": True, "tied": False},
    "no markers": LLAMA | {"latent_markers": "none"},
    "two a step": LLAMA | {"c_thought": 2, "latent_markers": "none"},
    "last stage": LLAMA | {"stage": 9, "c_thought": 2},
    "stage 0": LLAMA | {"stage": 0},
    "in parallel": LLAMA | {"latent_passes": "1", "c_thought": 2},
    "stopping": LLAMA | {"method": "stopping", "stop_threshold": 0.485, "tied": False},  # after 0, 1 and 2 thoughts
    "looped": LLAMA | {"latent_passes": "stage", "thought": "looped", "c_thought": 2},
    **{method: LLAMA | {"method": method} for method in ("cot", "no_cot", "icot", "no_thoughts", "codi", "multi_mode")},
    **{
        thought: {"shape": "gpt2" if "layer" in thought else "llama", "tied": False, "thought": thought}
        for thought in (
            *("pause", "projected", "normalised", "projected+normalised", "realigned", "layer:-2", "layer:0.5"),
            *("mlp", "mlp:24", "layer:-1", "suppressed", "suppressed:0.2", "last+suppressed", "embedding+suppressed"),
        )
    },
}


def make_checkpoint(
    folder: Path, thought: str = "last", stage: int = 2, tied: bool = True, shape: str = "llama", **keys
) -> Path:
    """A checkpoint with random weights, as run.py writes it."""
    tokenizer = tiny_model.make_tokenizer([f"### \n{''.join(QUESTIONS)}0123456789?\n!\n"], "joining")
    base = tiny_model.RandomModel(shape, 32, 3, 4, tied=tied or shape == "gpt2", positions=64).build(len(tokenizer))
    for part in (base, tokenizer):
        part.save_pretrained(folder / "base")
    keys = {"method": "coconut", "c_thought": 1, "max_latent_stage": 3} | keys
    config = Config(model_id=str(folder / "base"), thought=thought, **keys)
    pretrained = load_model(config, None)
    torch.manual_seed(3)
    with torch.no_grad():  # the usual small weights make everything nearly linear
        for parameter in pretrained.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0).add_(0.01 * torch.randn_like(parameter))
    target = folder / "run" / "checkpoint_4"
    target.mkdir(parents=True)
    checkpoint.write_model(target, config, pretrained, stage, pretrained.model.state_dict())
    return target


@pytest.fixture(scope="module", autouse=True)
def joining():
    tiny_model.PIECES["joining"] = JOINING
    yield
    del tiny_model.PIECES["joining"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Callable[[str], Path]:
    """Returns the checkpoint of a case."""
    place = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: make_checkpoint(place / name.replace(" ", "_"), **CASES[name]))


@pytest.fixture(scope="module")
def folders(checkpoints, tmp_path_factory) -> Callable[[str], Path]:
    """Returns the exported model of a case."""
    place = tmp_path_factory.mktemp("exported")

    @cache
    def make(name: str) -> Path:
        assert export.export(str(checkpoints(name)), place / name) == []
        return place / name

    return make


# runs in a fresh interpreter, in another folder, without this repository on its path
PROGRAM = """
import json, sys
from importlib.util import find_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

assert find_spec("coconut") is None
folders, questions, new = map(json.loads, sys.argv[1:])
found = {}
for name, folder in folders.items():
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(questions, padding=True, return_tensors="pt")
    width = batch["input_ids"].shape[1]
    rows = model.generate(**batch, max_new_tokens=new)
    assert rows[:, :width].equal(batch["input_ids"])
    singles = []
    for question in questions[:2]:
        single = tokenizer(question, return_tensors="pt")
        row = model.generate(**single, max_new_tokens=new)[0]
        singles.append(row[single["input_ids"].shape[1] :].tolist())
    found[name] = {"batch": rows[:, width:].tolist(), "singles": singles, "dtype": str(model.dtype)}
print(json.dumps(found))
"""


def written_elsewhere(folders: dict[str, Path], questions: list[str], new: int, place: Path) -> dict[str, dict]:
    """Runs PROGRAM in `place`; returns, for each exported model, at most `new` tokens after each question, in a batch
    and alone (the first two)."""
    arguments = map(json.dumps, [{name: str(path) for name, path in folders.items()}, questions, new])
    environment = {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    done = python(
        "-I", "-c", PROGRAM, *arguments, cwd=place, environment=environment, stdin=subprocess.DEVNULL, timeout=None
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def elsewhere(folders, tmp_path_factory) -> dict[str, dict]:
    return written_elsewhere({name: folders(name) for name in CASES}, QUESTIONS, NEW, tmp_path_factory.mktemp("else"))


def load_exported(folder: Path) -> PreTrainedModel:
    """Returns an exported model with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return model


def tokens_of(model: Coconut, questions: list[str]) -> list[list[int]]:
    """Returns this repository's new tokens."""
    batch = collate_prompts(inference.prompts(model, questions), model.markers.eos)
    return model.generate(**batch, max_new_tokens=NEW).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_exported_model_generates_the_same_tokens(case, checkpoints, elsewhere):
    model, found = Coconut.from_pretrained(checkpoints(case)), elsewhere[case]
    wanted = tokens_of(model, QUESTIONS)
    assert found["batch"] == wanted
    assert len({tuple(row) for row in wanted}) > 1
    assert found["singles"] == [tokens_of(model, [question])[0] for question in QUESTIONS[:2]]
    assert found["dtype"] == ("torch.bfloat16" if "bf16" in case else "torch.float32")


def test_logits_are_the_same_and_depend_on_the_thoughts(checkpoints, folders):
    for case in ("llama", "realigned", "suppressed", "layer:-2"):
        model, whole = Coconut.from_pretrained(checkpoints(case)), load_exported(folders(case))
        ids, mask = whole.prompts(torch.tensor([model.tokenizer("3+4")["input_ids"]]))
        logits = whole(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(logits, model(ids, mask).logits, rtol=1e-4, atol=1e-4)
        whole.thought.sequential = False  # as `pause`
        assert (whole(input_ids=ids, attention_mask=mask).logits[:, -1] - logits[:, -1]).abs().max() > 0.01


@pytest.mark.parametrize("case", ["llama", "two a step", "cot"])
def test_prompts_are_the_same(case, checkpoints, folders):
    """A question and a newline may share a token, so that appending the newline's token gives another prompt."""
    model, whole = Coconut.from_pretrained(checkpoints(case)), load_exported(folders(case))
    ids, mask = whole.prompts(**tokenizer_arguments(whole.tokenizer, QUESTIONS))
    rows = [row[-n:] for row, n in zip(ids.tolist(), mask.sum(dim=1).tolist(), strict=True)]
    assert rows == inference.prompts(model, QUESTIONS)
    assert len(whole.config.endings) == 2  # "?" and "!"
    assert whole.prompts(torch.zeros((1, 0), dtype=torch.long))[0][0].tolist() == inference.prompts(model, [""])[0]


def tokenizer_arguments(tokenizer, questions: list[str]) -> dict[str, torch.Tensor]:
    found = tokenizer(questions, padding=True, return_tensors="pt")
    return {"questions": found["input_ids"], "attention_mask": found["attention_mask"]}


def test_a_tokenizer_that_appends_eos_is_refused(checkpoints):
    """Bug: EOS itself ended as a text with a newline does, and each question was exported with EOS at its end."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints("llama"))
    assert export.with_newline(tokenizer)[0]
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {eos[0]}", special_tokens=[eos])
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    refuses("the tokenizer appends tokens to each text", export.with_newline, tokenizer)


def test_the_export_warns_of_different_prompts(checkpoints, tmp_path, monkeypatch):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "checkpoint_4")
    (folder / "predictions.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    assert export.export(str(folder), tmp_path / "right") == []
    with_newline = export.with_newline
    monkeypatch.setattr(export, "with_newline", lambda tokenizer: (with_newline(tokenizer)[0], {}))
    (warning,) = export.export(str(folder), tmp_path / "wrong")
    assert warning.startswith("2 of 5 validation questions get other tokens than in training")


def test_options_of_generate(folders):
    """Bugs: a generation_config's max_length, and min_length, counted latents and markers; 0 new tokens gave 128."""
    whole = load_exported(folders("llama"))
    questions = whole.tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    width = questions["input_ids"].shape[1]
    greedy = whole.generate(**questions, max_new_tokens=NEW)
    assert whole.generate(**questions, do_sample=True, top_k=1, max_new_tokens=NEW).equal(greedy)
    torch.manual_seed(0)
    hot = whole.generate(**questions, do_sample=True, temperature=9.0, num_return_sequences=3, max_new_tokens=NEW)
    assert hot.shape == (15, width + NEW)
    assert len({tuple(row) for row in hot[:3].tolist()}) == 3
    assert whole.generate(**questions, max_length=width + 3).shape[1] <= width + 3
    beams = whole.generate(**questions, num_beams=3, max_new_tokens=NEW, return_dict_in_generate=True).sequences
    assert beams[:, :width].equal(questions["input_ids"])
    assert whole.generate(**questions, max_new_tokens=1000).shape[1] < 64  # positions
    question = torch.tensor([[3, 4, 5]])
    assert whole.generate(question, generation_config=GenerationConfig(max_length=8, min_length=8)).shape[1] == 8
    assert whole.generate(question, min_length=12, max_new_tokens=9).shape[1] == 12
    with pytest.raises(ValueError, match="max_new_tokens"):
        whole.generate(question, max_new_tokens=0)
    with pytest.raises(ValueError, match="a question of 66 tokens fills all 64 positions"):
        whole.generate(torch.ones((1, 61), dtype=torch.long))
    with pytest.raises(ValueError, match="generate takes questions"):
        whole.generate(inputs_embeds=torch.zeros((1, 3, 32)))


def test_files_of_the_folder(folders):
    folder = folders("projected")
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_coconut.py"),
        *("thought.py", "tokenizer.json", "tokenizer_config.json"),
    }
    settings = read_json(folder / "config.json")
    assert settings["auto_map"] == {
        "AutoConfig": "modeling_coconut.CoconutConfig",
        "AutoModelForCausalLM": "modeling_coconut.CoconutForCausalLM",
    }
    assert str(folder.parent) not in json.dumps(settings)
    assert "checkpoint" not in json.dumps(settings)
    generation = read_json(folder / "generation_config.json")
    assert (generation["do_sample"], generation["eos_token_id"]) == (False, 0)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "thought.weight" in names
    assert {name.partition(".")[0] for name in names} == {"thought", "base_causallm"}
    tokenizer = load_exported(folder).tokenizer
    assert set(tokenizer("3+4")) == {"input_ids", "attention_mask"}
    assert tokenizer.padding_side == "left"
    for name in ("multi_mode", "llama"):
        assert (END in load_exported(folders(name)).tokenizer.all_special_tokens) == (name == "multi_mode")


def test_the_code_imports_torch_and_transformers_only(folders):
    for name in ("projected", "layer:-2"):
        for file in ("modeling_coconut.py", "thought.py"):
            assert set(get_imports(folders(name) / file)) <= sys.stdlib_module_names | {"torch", "transformers"}
    code = folders("llama") / "modeling_coconut.py"
    assert check_imports(code) == ["thought"]
    here = (ROOT / "tools/modeling_coconut.py").read_text()
    assert code.read_text() == re.sub(r"from model\.\w+", "from .thought", here)
    text = (folders("projected+normalised") / "thought.py").read_text()
    assert "class Projected(Thought)" in text
    assert "class Realigned" not in text


OWN = """
from torch import nn
from methods.thoughts import Projected
from model.thought import Seen, register
from utils import UserError

SCALE = 3.0  # of the thought

def _gate(x):
    return SCALE * x.sigmoid() * x

@register("mlp")
class Gated(Projected):
    def forward(self, seen: Seen):
        if seen.hidden is None:
            raise UserError("never")
        return _gate(super().forward(seen)) + nn.functional.relu(seen.embedding)
"""


@pytest.fixture
def own_thought(tmp_path, monkeypatch):
    """A thought in another file, which replaces the registered thought `mlp`."""
    import methods.thoughts

    monkeypatch.setitem(thought.REGISTRY, "mlp", methods.thoughts.Mlp)
    (tmp_path / "own_thought.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_thought")
    del sys.modules["own_thought"]


@pytest.mark.slow
def test_the_export_of_ones_own_thought(own_thought, tmp_path):
    source = make_checkpoint(tmp_path, "mlp", c_thought=2, tied=False)
    assert isinstance(Coconut.from_pretrained(source).thought, own_thought.Gated)
    assert export.export(str(source), tmp_path / "out") == []
    found = written_elsewhere({"own": tmp_path / "out"}, QUESTIONS, NEW, tmp_path)
    assert found["own"]["batch"] == tokens_of(Coconut.from_pretrained(source), QUESTIONS)


def test_code_that_cannot_be_copied_raises(own_thought, tmp_path, monkeypatch):
    file = tmp_path / "own_thought.py"
    plain = "from utils import UserError"
    for before, after, sentence in (
        (plain, plain + " as UserError2", "import names with `from utils import NAME`"),
        (plain, "import utils as UserError", "import names with `from utils import NAME`"),
        ("    return SCALE", "    import config\n    return SCALE", "it imports within a function"),
    ):
        file.write_text(OWN.replace(before, after).replace("raise UserError(", f"raise {after.split()[-1]}("))
        portable._names.cache_clear()
        refuses(sentence, portable.write_code, tmp_path, own_thought.Gated)


def test_padding_without_an_attention_mask(folders):
    """Bug: padding counted as tokens."""
    whole = load_exported(folders("llama"))
    tokenizer = whole.tokenizer
    found = tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    ids, width = found["input_ids"], found["input_ids"].shape[1]
    wanted = whole.generate(**found, max_new_tokens=NEW)
    assert whole.generate(ids, max_new_tokens=NEW).equal(wanted)
    right = tokenizer(QUESTIONS, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    assert whole.generate(right, max_new_tokens=NEW)[:, width:].equal(wanted[:, width:])
    first = torch.tensor([[tokenizer.pad_token_id, 5, 6], [tokenizer.pad_token_id, 7, 8]])  # in all rows: no padding
    assert whole.prompts(first)[1].all()


def copied(source: Path, folder: Path, config: Config, state: str | None = "{}", **notes: str) -> Path:
    """Copies a run to `folder`, with a configuration, notes, and the trainer's state in its checkpoint."""
    run = shutil.copytree(source.parent, folder)
    run_folder.write_config(dataclasses.asdict(config), run, 2, "a fast one", **notes)
    if state is not None:
        (run / "checkpoint_4" / "trainer").mkdir()
        (run / "checkpoint_4" / "trainer" / "state.json").write_text(state)
        (run / "checkpoint_4" / "trainer" / "manifest.json").write_text(json.dumps({"trainer/state.json": len(state)}))
    return run


def card(run: Path, out: Path) -> str:
    export.export(str(run), out)
    return (out / "README.md").read_text()


def test_the_card_is_made_from_the_run(checkpoints, tmp_path):
    config = Config(
        **{"name": "mine", "c_thought": 2, "seed": 7},
        **{"train_path": "data/some_train.json", "val_path": "data/some_valid.json"},
    )
    # two epochs of 45 steps; bug: those before `resume` and those that advance_at has left out counted as trained
    state = '{"epoch": 6, "begun": 3, "passed_over": 1, "step": 225}'
    run = copied(checkpoints("two a step"), tmp_path / "mine", config, state, **{"SHA-256 of train_path": "f8db6e"})
    epochs = [{"event": "epoch", "epoch": n, "train_seconds": 1700.0, "seconds": 100.0} for n in (0, 3, 3, 5, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    found = {"accuracy": 0.3456, "cot_match": 0.1, "generated_tokens": 8.25, "examples": 300}
    (run / "checkpoint_4" / "metrics.json").write_text(json.dumps(found))
    (run / "eval").mkdir()
    tested = found | {"examples": 1000, "accuracy": 0.5, "file": "data/test.json", "checkpoint": "mine/checkpoint_4"}
    (run / "eval" / "metrics.json").write_text(json.dumps(tested))
    text = card(run, tmp_path / "out")
    digest = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    for part in (
        *("# out\n", "`coconut`: Coconut (chain of continuous thought", "Its stage is 2.", "4 latent positions"),
        *(f"`{config.train_path}`", "| SHA-256 of the data | f8db6e |", "| seed | 7 |"),
        *("| hours | 1.00, of 2 epochs with their validations |", "| hardware | a fast one; ranks: 2 |"),
        *("| epochs, optimizer steps | 2, 90 |", "torch 2.", f"\n    {digest}  model.safetensors\n"),
        "| `data/some_valid.json` (validation) | 300 | 34.6% | text | 10.0% | 8.2 |",
        "| `data/test.json` | 1000 | 50.0% | text | 10.0% | 8.2 |",
    ):
        assert part in text, part
    data = ModelCard(text).data
    assert (data.library_name, data.datasets) == ("transformers", ["some_train"])
    assert (data.base_model, data.license) == ("openai-community/gpt2", None)
    results = [(r.dataset_type, r.dataset_split, r.metric_value) for r in data.eval_results]
    assert results == [("some_valid", "validation", 0.3456), ("test", "test", 0.5)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert f"| commit of the trainer | {commit.stdout.strip()}" in text or not commit.stdout
    assert (tmp_path / "out" / "config.yaml").read_text() == (run / "config.yaml").read_text()
    # an evaluation of another checkpoint is not in the card
    (run / "eval" / "metrics.json").write_text(json.dumps(tested | {"checkpoint": "mine/checkpoint_3"}))
    assert "data/test.json" not in card(run, tmp_path / "again")
    # evaluations on several sets, and by `python -m tools.evaluate --all`, each with its own rule
    (run / "eval" / "metrics.json").write_text(json.dumps({"sets": {"a": tested, "b": tested | {"file": "b.json"}}}))
    run_folder.write_config({"answer_match": "number"}, run / "eval", 1)
    one = run / "evaluations" / "hard" / "checkpoint_4" / "eval"
    one.mkdir(parents=True)
    (one / "metrics.json").write_text(json.dumps(tested | {"file": "data/hard.json"}))
    text = card(run, tmp_path / "sets")
    for name, rule in (("data/test.json", "number"), ("b.json", "number"), ("data/hard.json", "text")):
        assert f"| `{name}` | 1000 | 50.0% | {rule} |" in text
    (one / "metrics.json").write_text(json.dumps(tested | {"file": config.val_path}))  # bug: that was a test
    splits = [result.dataset_split for result in ModelCard(card(run, tmp_path / "seen")).data.eval_results]
    assert sorted(splits) == ["test", "test", "validation", "validation"]


def test_the_card_says_how_an_accuracy_was_measured_otherwise(checkpoints, tmp_path):
    """Bugs: it gave such accuracies as those of the exported model, and an older validation as one on the new file."""
    scored_by = {"answer_match": "number", "eval_latents_from_steps": True}
    run = copied(
        checkpoints("llama"), tmp_path / "mine", Config(val_path="new.json"), json.dumps({"scored_by": scored_by})
    )
    described = read_json(run / "checkpoint_4" / "coconut.json")
    described |= {"validated_on": {"file": "old.json"}, "stop_threshold": 0.6}
    (run / "checkpoint_4" / "coconut.json").write_text(json.dumps(described))
    found = {"accuracy": 0.5, "examples": 10}
    (run / "checkpoint_4" / "metrics.json").write_text(json.dumps(found))
    tested = found | {"file": "test.json", "checkpoint": "mine/checkpoint_4", "stage": 0}
    for folder in (run / "eval", run / "evaluations" / "test" / "checkpoint_4" / "eval"):
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(tested))
        run_folder.write_config({"stop_threshold": 0.0}, folder, 1)
    text = card(run, tmp_path / "out")
    assert "| `old.json` (validation), asked with as many thoughts as its steps need | 10 | 50.0% | number |" in text
    assert text.count("| `test.json`, asked at stage 0, with stop_threshold 0.0 | 10 | 50.0% | text |") == 1


@pytest.mark.parametrize("model_id", ["/scratch/me/model", "data/ar/model", "data/model"])
def test_a_run_whose_base_model_was_a_folder_is_exported(checkpoints, tmp_path, model_id):
    """Bugs: no export, or a card that named a model of the hub."""
    run = copied(checkpoints("llama"), tmp_path / "mine", Config(model_id=model_id), **{"base model": "a folder"})
    text = card(run, tmp_path / "out")
    assert f"| starts from | `{model_id}` |" in text
    assert ModelCard(text).data.base_model is None


def test_the_card_has_a_row_for_each_mode(checkpoints, folders, tmp_path):
    """Bug: it gave the mean of three modes as the accuracy."""
    text = (folders("llama") / "README.md").read_text()
    assert "Nothing is known of the run" in text
    assert "2 latent positions (thought `last`) between a start and an end marker" in text
    assert "latent positions" not in (folders("cot") / "README.md").read_text()
    run = copied(checkpoints("multi_mode"), tmp_path / "mine", Config(method="multi_mode"))
    found = {"accuracy": 0.2, "cot_match": 0.1, "generated_tokens": 8.25, "examples": 300}
    found |= {"accuracy_direct": 0.1, "accuracy_written": 0.3, "accuracy_latent": 0.4}
    (run / "checkpoint_4" / "metrics.json").write_text(json.dumps(found))
    text = card(run, tmp_path / "out")
    assert "asked in mode latent | 300 | 40.0% | text |  |  |" in text
    assert "| 20.0% |" not in text
    found |= {"cot_match_direct": 1.0, "generated_tokens_direct": 3.0}
    (run / "checkpoint_4" / "metrics.json").write_text(json.dumps(found))
    assert "asked in mode direct | 300 | 10.0% | text | 100.0% | 3.0 |" in card(run, tmp_path / "again")
    # an evaluation in one mode, or with another number of thoughts
    run_folder.write_config({"mode": "written", "eval_latents": 3}, run / "eval", 1)
    tested = {"accuracy": 0.5, "examples": 10, "file": "data/test.json", "checkpoint": "mine/checkpoint_4"}
    (run / "eval" / "metrics.json").write_text(json.dumps(tested))
    row = "| `data/test.json`, asked in mode written, with 3 thoughts | 10 | 50.0% | text |"
    assert row in card(run, tmp_path / "third")


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("coconut.json", "{}", "coconut.json is damaged: it lacks stage and method"),
        ("coconut.json", {"stage": "x"}, "coconut.json is damaged: stage must be a whole number from 0 on, not 'x'"),
        ("coconut.json", {"c_thought": "many"}, "coconut.json is damaged: c_thought must be a whole number"),
        ("coconut.json", {"method": "none"}, "coconut.json is damaged: method must be one of"),
        ("coconut.json", {"c_thought": 1000}, "fill all 64 positions"),
        ("predictions.jsonl", '{"question": ', "predictions.jsonl is damaged"),
        ("predictions.jsonl", "{}", "predictions.jsonl is damaged"),
        ("../eval/metrics.json", '{"checkpoint": 5}', "no model card: a file in"),
        ("../config.yaml", "\ta", "cannot read"),
    ],
)
def test_a_damaged_file_is_one_sentence(checkpoints, tmp_path, capsys, file, content, sentence):
    """Bugs: tracebacks."""
    state = "{}" if file.startswith("..") else None
    run = copied(checkpoints("llama"), tmp_path / "mine", Config(), state)
    path = run / "checkpoint_4" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(read_json(path) | content))
    assert sentence in one_error(export.main, [run / "checkpoint_4", tmp_path / "out"], capsys)


# --- Errors and kills ---


def test_only_force_replaces_and_only_an_exported_model(checkpoints, tmp_path, capsys):
    source, other, out = checkpoints("stage 0"), checkpoints("llama"), tmp_path / "out"
    out.mkdir()
    assert export.main([str(source), str(out)]) == 0  # an empty folder
    before = (out / "config.json").read_text()
    assert "holds an exported model: choose" in one_error(export.main, [other, out], capsys)
    assert (out / "config.json").read_text() == before
    assert export.main([str(other), str(out), "--force"]) == 0
    assert (out / "config.json").read_text() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / ".git").mkdir()
    assert "is not overwritten, because it contains .git" in one_error(export.main, [other, out, "--force"], capsys)
    assert (out / ".git").is_dir()
    (tmp_path / "mine").mkdir()
    texts = {"mine": tmp_path / "mine" / "thesis.tex", "file": tmp_path / "file"}
    for name, path in texts.items():
        path.write_text("all of it")
        for options in ([], ["--force"]):
            assert "exists and is no exported model" in one_error(
                export.main, [source, tmp_path / name, *options], capsys
            )
        assert path.read_text() == "all of it"


def test_errors_are_one_sentence(checkpoints, tmp_path, capsys, monkeypatch):
    out, source = tmp_path / "out", checkpoints("llama")
    assert "'none' is no checkpoint" in one_error(export.main, ["none", out], capsys)
    assert "lacks coconut.json" in one_error(export.main, [source.parent.parent / "base", out], capsys)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in one_error(export.main, [source, tmp_path / "file" / "out"], capsys)
    own = shutil.copytree(source, tmp_path / "own")

    def wrong(folder: Path, thought: type) -> None:
        portable.write_code(folder, thought)
        with (folder / "thought.py").open("a") as code:
            code.write("\nLast.forward = lambda _, s: s[0] + 1")

    monkeypatch.setattr(export, "write_code", wrong)
    sentence = "a llama of method coconut cannot be exported: in transformers' code its logits differ"
    assert sentence in one_error(export.main, [own, out], capsys)

    def mute(folder: Path, thought: type) -> None:
        portable.write_code(folder, thought)
        with (folder / "modeling_coconut.py").open("a") as code:
            code.write("\nCoconutForCausalLM.generate = None")

    monkeypatch.setattr(export, "write_code", mute)
    assert "in transformers' code it raises TypeError" in one_error(export.main, [own, out], capsys)
    (own / "trainer").mkdir()
    assert "is damaged: trainer/manifest.json: No such file" in one_error(export.main, [own, out], capsys)
    assert not out.exists()


FULL = "No space left on device"


@pytest.mark.parametrize("error", [OSError(28, FULL), SafetensorError(FULL)], ids=["system", "safetensors"])
def test_a_full_disk_leaves_no_files(checkpoints, tmp_path, capsys, monkeypatch, error):
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", raising(error))
    assert f"cannot be written: {FULL}" in one_error(export.main, [checkpoints("llama"), tmp_path / "out"], capsys)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from trainer import files

if sys.argv[2] == "between":
    rename = Path.rename
    Path.rename = lambda self, to: os.kill(os.getpid(), 9) if self.name.startswith(".writing") else rename(self, to)
with files.replaced(Path(sys.argv[1]), ("whole",)) as aside:
    (aside / "half").write_text("")
    if sys.argv[2] == "within":
        os.kill(os.getpid(), 9)
"""


WRITER = """
import sys
from pathlib import Path
from trainer import files

with files.replaced(Path(sys.argv[1]), ()) as aside:
    (aside / "other").write_text("")
"""


def test_two_writers_of_one_folder_publish_what_each_has_written(tmp_path):
    """Bug: each removed what the other one was writing, and half a model was published."""
    out = tmp_path / "out"
    with files.replaced(out, ("other",)) as aside:
        (aside / "first").write_text("")
        python("-c", WRITER, out)
        assert [path.name for path in out.iterdir()] == ["other"]
        (aside / "second").write_text("")
    assert sorted(path.name for path in out.iterdir()) == ["first", "second"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("when", ["within", "between"])
def test_a_kill_loses_no_folder(tmp_path, when):
    out = tmp_path / "out"
    with files.replaced(out, ()) as aside:
        (aside / "whole").write_text("")
    python("-c", KILLED, out, when, code=-signal.SIGKILL)
    assert not (out / "half").exists()
    assert when == "between" or (out / "whole").exists()
    # the next call first restores the old folder
    with pytest.raises(RuntimeError), files.replaced(out, ("whole",)):
        raise RuntimeError
    assert [path.name for path in out.iterdir()] == ["whole"]
    with files.replaced(out, ("whole",)) as aside:
        (aside / "new").write_text("")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
