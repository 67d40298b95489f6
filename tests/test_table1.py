"""Runs every row of the paper's Table 1 on every data set with a tiny model, through run.py's main."""

import json
from pathlib import Path

import pytest
import tiny_model
import torch
from conftest import ROOT, lines_of, read_json

import run
from config import Config
from curriculum import schedule, stage_of, stage_of_step, thoughts_and_dropped
from trainer.pretrained import load_model

DATA_SETS = ("gsm", "prontoqa", "prosqa")
ROWS = ("cot", "no_cot", "icot", "pause", "coconut", "no_curriculum", "no_thought", "pause_as_thought")
EXAMPLES = {
    "gsm": ("3 apples and 4?", ["<<3+4=7>>", "<<7*2=14>>"], "14"),
    "prontoqa": ("Max is a cat. True or false?", ["Max is a cat.", "Max is red."], "True"),
    "prosqa": ("Is Tom a bompus or grimpus?", ["Tom is a bompus."], "Tom is a bompus."),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("table1")
    for name, (question, steps, answer) in EXAMPLES.items():
        questions = [f"{number}: {question}" for number in range(12)]
        examples = [{"question": each, "steps": steps, "answer": answer} for each in questions]
        (made / f"{name}.json").write_text(json.dumps(examples))
        tiny_model.write_model([made / f"{name}.json"], made / name, "char", "gpt2", 16, 1, 2, 128)
    return made


def configured(folder: Path, data_set: str, row: str, *more: str) -> Config:
    """Returns the row's configuration with a tiny model; it trains from scratch unless `more` has only_eval=true."""
    keys = [f"row={row}", f"save_path={folder / 'runs'}", f"model_id={folder / data_set}", "num_workers=0", *more]
    if "only_eval=true" in more:
        keys.append(f"test_path={folder / data_set}.json")
    else:
        keys += [f"{key}={folder / data_set}.json" for key in ("train_path", "val_path")] + ["load_model_path=null"]
    return Config.from_file(ROOT / "args" / f"{data_set}.yaml", keys)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("data_set", DATA_SETS)
def test_the_row_trains_and_is_evaluated(folder, data_set, row):
    first = 3 if data_set == "gsm" and row in ("coconut", "no_thought", "pause_as_thought") else 0
    config = configured(folder, data_set, row, "max_new_tokens=30", f"num_epochs={first + 1}")
    assert config.resume == first
    assert run.main(config) == 0
    description = read_json(config.run_dir / f"checkpoint_{first + 1}" / "coconut.json")
    assert description["stage"] == stage_of_step(config, first, step=0, steps_per_epoch=1)
    assert description["thought"] == ("pause" if row.startswith("pause") else "last")

    evaluation = configured(folder, data_set, row, "max_new_tokens=30", "only_eval=true")
    assert (evaluation.load_model_path, evaluation.run_dir) == (f"{config.run_dir}@best", config.run_dir)
    assert run.main(evaluation) == 0
    metrics = read_json(evaluation.run_dir / "eval" / "metrics.json")
    expected = stage_of(evaluation, evaluation.resume) if evaluation.resume else description["stage"]
    assert (metrics["examples"], metrics["stage"]) == (12, expected)
    n_latents, _ = thoughts_and_dropped(len(EXAMPLES[data_set][1]), expected, config)
    counted = 0 if row.startswith("pause") else n_latents  # as in Table 1
    for prediction in lines_of(evaluation.run_dir / "eval" / "predictions.jsonl"):
        assert counted <= prediction["generated_tokens"] <= counted + 30


@pytest.mark.parametrize(
    ("row", "first"),
    [
        *(("sim_cot", 3), ("codi", 0), ("pccot", 0), ("lotus", 1), ("multi_mode", 3), ("parallel_latents", 3)),
        *(("coconut_qwen", 0), ("coconut_llama", 0), ("grpo", 0)),
    ],
)
def test_a_later_method_trains_and_is_evaluated(folder, row, first):
    keys = (folder, "gsm", row, "max_new_tokens=4", "lora_rank=null")
    config = configured(*keys, f"num_epochs={first + 1}", "strategy=ddp")
    assert config.method == row.partition("_qwen")[0].partition("_llama")[0]
    assert run.main(config) == 0
    assert run.main(configured(*keys, "only_eval=true")) == 0
    assert read_json(config.run_dir / "eval" / "metrics.json")["stage"] == stage_of(config, first)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("data_set", DATA_SETS)
def test_the_row_has_the_papers_settings(data_set, row):
    config = Config.from_file(ROOT / "args" / f"{data_set}.yaml", [f"row={row}"], needs_files=False)
    icot = row == "icot"
    assert (config.model_id, config.lr) == ("openai-community/gpt2", 5e-5 if icot else 1e-4)
    assert config.weight_decay == 0.01
    for world_size in (1, 2, 4, 8):
        n_micro_batches, size = config.micro_batches(world_size)
        assert n_micro_batches * world_size * size == (32 if icot else 128)
    assert config.num_epochs == {(True, "gsm"): 80, (True, "prosqa"): 200, (True, "prontoqa"): 200}.get(
        (icot, data_set), 25 if data_set == "gsm" else 50
    )
    if config.method == "coconut":
        assert (config.c_thought, config.max_latent_stage) == ((2, 3) if data_set == "gsm" else (1, 6))
    assert len(schedule(config, 1).splitlines()) == config.num_epochs - config.resume + 1


def test_icot_resets_the_optimizer_while_reasoning_is_left(folder, monkeypatch):
    """12 steps per epoch (12 examples in batches of 1) remove a token every second step: round(12 / 8)."""
    resets = []
    original = run.make_optimizer
    monkeypatch.setattr(run, "make_optimizer", lambda r: resets.append(r.progress.step) or original(r))
    keys = ["name=resets", "num_epochs=5", "global_batch_size=1", "batch_size_training=1", "max_new_tokens=4"]
    config = configured(folder, "gsm", "icot", *keys, "icot_smoothing=null", "icot_remove_all_after=null")
    assert run.main(config) == 0
    n_tokens = len("[3+4=7]n[7*2=14]n")  # << is one token here, and so is >>
    assert resets == [0, *range(2, 2 * n_tokens + 1, 2)]


def test_pause_takes_a_single_pass(folder):
    model, _, markers = load_model(configured(folder, "prosqa", "pause"), None)
    spans, backbone = [], model.backbone
    backbone.span = lambda *arguments, span=backbone.span: spans.append(1) or span(*arguments)
    model(torch.tensor([[5, markers.start, markers.latent, markers.latent, markers.end, 6]]))
    assert len(spans) == 1
