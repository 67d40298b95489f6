"""Every row of the paper's Table 1 on every data set, through run.py's main, with a tiny model."""

import json
from pathlib import Path

import pytest
import tiny_model
import torch
from conftest import ROOT

import run
from config import Config
from curriculum import schedule, stage_of, stage_of_step, thoughts_and_dropped
from trainer.pretrained import load_model

DATA_SETS = ("gsm", "prontoqa", "prosqa")
ROWS = ("cot", "no_cot", "icot", "pause", "coconut", "no_curriculum", "no_thought", "pause_as_thought")

EXAMPLES = {
    "gsm": {"question": "3 apples and 4?", "steps": ["<<3+4=7>>", "<<7*2=14>>"], "answer": "14"},
    "prontoqa": {
        "question": "Max is a cat. True or false?",
        "steps": ["Max is a cat.", "Max is red."],
        "answer": "True",
    },
    "prosqa": {"question": "Is Tom a bompus or grimpus?", "steps": ["Tom is a bompus."], "answer": "Tom is a bompus."},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("table1")
    for name, example in EXAMPLES.items():
        examples = [{**example, "question": f"{number}: {example['question']}"} for number in range(12)]
        (folder / f"{name}.json").write_text(json.dumps(examples))
        tiny_model.write_model([folder / f"{name}.json"], folder / name, "char", "gpt2", 16, 1, 2, 128)
    return folder


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("data_set", DATA_SETS)
def test_the_row_trains_and_is_evaluated(place, data_set, row):
    first = 3 if data_set == "gsm" and row in ("coconut", "no_thought", "pause_as_thought") else 0
    shared = [
        f"save_path={place / 'runs'}",
        f"model_id={place / data_set}",
        "max_new_tokens=30",
        "num_workers=0",
    ]
    config = Config.from_file(
        ROOT / "args" / f"{data_set}.yaml",
        [
            *(f"row={row}", *shared, f"val_path={place / data_set}.json", f"train_path={place / data_set}.json"),
            *(f"num_epochs={first + 1}", "load_model_path=null"),
        ],
    )
    assert config.resume == first
    assert run.main(config) == 0
    saved = config.run_dir / f"checkpoint_{first + 1}"
    description = json.loads((saved / "coconut.json").read_text())
    assert description["stage"] == stage_of_step(config, first, step=0, steps_per_epoch=1)
    assert description["thought"] == ("pause" if row.startswith("pause") else "last")

    evaluation = Config.from_file(
        ROOT / "args" / f"{data_set}.yaml",
        [f"row={row}", *shared, "only_eval=true", f"test_path={place / data_set}.json"],
    )
    assert evaluation.load_model_path == f"{config.run_dir}@best"
    assert evaluation.run_dir == config.run_dir
    assert run.main(evaluation) == 0
    metrics = json.loads((evaluation.run_dir / "eval" / "metrics.json").read_text())
    assert metrics["examples"] == 12
    expected = stage_of(evaluation, evaluation.resume) if evaluation.resume else description["stage"]
    assert metrics["stage"] == expected
    predictions = map(json.loads, (evaluation.run_dir / "eval" / "predictions.jsonl").read_text().splitlines())
    n_latents, _ = thoughts_and_dropped(len(EXAMPLES[data_set]["steps"]), expected, config)
    counted = 0 if row.startswith("pause") else n_latents  # as in Table 1
    for prediction in predictions:
        assert counted <= prediction["generated_tokens"] <= counted + 30


@pytest.mark.parametrize(
    ("row", "first"),
    [
        *(("sim_cot", 3), ("codi", 0), ("pccot", 0), ("lotus", 1), ("multi_mode", 3), ("parallel_latents", 3)),
        *(("coconut_qwen", 0), ("coconut_llama", 0), ("grpo", 0)),
    ],
)
def test_a_later_method_trains_and_is_evaluated(place, row, first):
    shared = [f"row={row}", f"save_path={place / 'runs'}", f"model_id={place / 'gsm'}", "max_new_tokens=4"]
    training = [f"{key}={place / 'gsm.json'}" for key in ("train_path", "val_path")]
    training += [f"num_epochs={first + 1}", "load_model_path=null", "num_workers=0", "strategy=ddp", "lora_rank=null"]
    config = Config.from_file(ROOT / "args" / "gsm.yaml", [*shared, *training])
    assert config.method == row.partition("_qwen")[0].partition("_llama")[0]
    assert run.main(config) == 0
    asked = [*shared, "only_eval=true", f"test_path={place / 'gsm.json'}", "lora_rank=null"]
    assert run.main(Config.from_file(ROOT / "args" / "gsm.yaml", asked)) == 0
    metrics = json.loads((config.run_dir / "eval" / "metrics.json").read_text())
    assert metrics["stage"] == stage_of(config, first)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("data_set", DATA_SETS)
def test_the_row_has_the_papers_values(data_set, row):
    config = Config.from_file(ROOT / "args" / f"{data_set}.yaml", [f"row={row}"], needs_files=False)
    icot = row == "icot"
    assert config.model_id == "openai-community/gpt2"
    assert config.lr == (5e-5 if icot else 1e-4)
    assert config.weight_decay == 0.01
    for world_size in (1, 2, 4, 8):
        passes, size = config.passes(world_size)
        assert passes * world_size * size == (32 if icot else 128)
    assert config.num_epochs == {(True, "gsm"): 80, (True, "prosqa"): 200, (True, "prontoqa"): 200}.get(
        (icot, data_set), 25 if data_set == "gsm" else 50
    )
    if config.method == "coconut":
        assert (config.c_thought, config.max_latent_stage) == ((2, 3) if data_set == "gsm" else (1, 6))
    assert len(schedule(config, 1).splitlines()) == config.num_epochs - config.resume + 1


def test_icot_makes_the_optimizer_anew_while_reasoning_is_left(place, monkeypatch):
    """12 examples in batches of 1, 12 steps an epoch, so that a token goes every second step (round(12 / 8))."""
    made = []
    original = run.make_optimizer
    monkeypatch.setattr(run, "make_optimizer", lambda r: made.append(r.progress.step) or original(r))
    config = Config.from_file(
        ROOT / "args" / "gsm.yaml",
        [
            "row=icot",
            f"save_path={place / 'runs'}",
            "name=resets",
            f"model_id={place / 'gsm'}",
            f"train_path={place / 'gsm.json'}",
            f"val_path={place / 'gsm.json'}",
            "num_epochs=5",
            "global_batch_size=1",
            "batch_size_training=1",
            "icot_smoothing=null",
            "num_workers=0",
            "max_new_tokens=4",
            "icot_remove_all_after=null",
        ],
    )
    assert run.main(config) == 0
    n_tokens = len("[3+4=7]n[7*2=14]n")  # a mark such as << is one token here
    assert made == [0, *range(2, 2 * n_tokens + 1, 2)]


def test_pause_gets_no_feedback(place):
    config = Config.from_file(
        ROOT / "args" / "prosqa.yaml", ["row=pause", f"model_id={place / 'prosqa'}"], needs_files=False
    )
    model, _, markers = load_model(config, None)
    spans = []
    backbone = model.backbone
    backbone.span = lambda *arguments, span=backbone.span: spans.append(1) or span(*arguments)
    model(torch.tensor([[5, markers.start, markers.latent, markers.latent, markers.end, 6]]))
    assert len(spans) == 1
