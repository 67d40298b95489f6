"""The benchmarks' sides compute the same thing; their numbers are not tested."""

import argparse
import json
import sys
from pathlib import Path

import arithmetic
import pytest
import tiny_model
import torch
from conftest import ROOT, load_script

sys.path.insert(0, str(ROOT / "benchmarks"))
import common
import step

import run
from config import THOUGHTS, Config
from dataset import collate_for_device
from parallel import whole_weights

generate, thoughts = (load_script(ROOT / "benchmarks" / f"{name}.py") for name in ("generate", "thoughts"))

OPTIONS = {"shape": "gpt2", "size": "tiny", "batch": 2, "c_thought": 1, "bf16": False, "compile": False}


@pytest.fixture
def small(monkeypatch):
    """A model and rows that take no time."""
    monkeypatch.setitem(common.SIZES, "tiny", (1, 16, 2))
    monkeypatch.setattr(common, "GPT2_VOCABULARY", 60)
    markers = common.Markers(start=60, latent=62, end=61, eos=59)
    for module in (common, step, generate):
        monkeypatch.setattr(module, "MARKERS", markers)
    return markers


def test_the_sides_of_a_step_agree(small):
    model = common.make_model("gpt2", "tiny", torch.device("cpu"))
    batch = collate_for_device(common.prosqa_rows(2, stage=2, c_thought=1), small.eos, small.latent)
    coconut = model(**batch).loss
    assert abs(step.no_cache_loss(model, batch) - coconut) < 1e-5
    assert abs(step.floor_loss(model, batch) - step.all_logits_loss(model, batch)) < 1e-5
    assert len(step.make_sides(argparse.Namespace(**OPTIONS), 1, list(step.SIDES))) == 4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_model_is_had_as_if_loaded(small, world, strategy):
    """scaling.py had no model under DDP: it gave parallel.load a plain tuple."""
    whole = common.make_model("llama", "tiny", torch.device("cpu"))
    weights = {name: value.clone() for name, value in whole.state_dict().items()}
    model = common.as_loaded(whole, Config(strategy=strategy), world)
    found = whole_weights(model)  # tied weights under one name
    assert len(found) >= len(weights) - 1
    assert all(torch.equal(value, weights[name]) for name, value in found.items())


def test_they_run_and_write_json(small, tmp_path, capsys):
    arguments = [
        "--batch",
        "2",
        "--stages",
        "0",
        "2",
        "--repeats",
        "1",
        "--no-memory",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert step.main(arguments) == 0
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [result["side"] for result in results] == ["floor", "coconut", "all logits"] * 2
    assert results[0]["seconds_ratio"] == 1.0
    arguments = [
        "--examples",
        "3",
        "--batches",
        "2",
        "--new-tokens",
        "3",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "b.json"),
    ]
    assert generate.main(arguments) == 0
    assert {result["batch"] for result in json.loads((tmp_path / "b.json").read_text())["results"]} == {2}
    assert "ratio" in capsys.readouterr().out


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory) -> tuple[list[str], Path]:
    """Overrides of args/thoughts.yaml with which a run takes no time, and where the results go."""
    place = tmp_path_factory.mktemp("thoughts")
    examples = arithmetic.make_splits({"train": 16, "valid": 4}, max_steps=3, base=5)
    for name, split in examples.items():
        (place / f"{name}.json").write_text(json.dumps(split))
    tiny_model.write_model([place / "train.json"], place / "model", "char", "llama", 16, 1, 2, 64)
    files = [f"{key}={place / name}" for key, name in (("train_path", "train.json"), ("val_path", "valid.json"))]
    keys = [f"save_path={place / 'runs'}", f"model_id={place / 'model'}", "epochs_per_stage=[1,1,1,1]", "num_epochs=4"]
    return [*files, *keys, "max_new_tokens=2"], place


def test_every_thought_is_trained_from_one_model_a_seed(small_runs, monkeypatch):
    """What is started, without starting it: run.py's main in this process instead."""
    overrides, place = small_runs
    started = []

    def in_process(command):
        started.append(command)
        assert run.main(Config.from_file(command[2], command[3:])) == 0

    monkeypatch.setattr(thoughts, "start", in_process)
    arguments = ["--seeds", "3", "4", "--jobs", "1", "--out", str(place / "results"), "--set", *overrides]
    assert thoughts.main([*arguments, "--only", "last", "pause", "no_cot"]) == 0
    assert [keys[-2:] for keys in started[:2]] == [[f"name=stage-0-{seed}", "num_epochs=1"] for seed in (3, 4)]
    assert len(started) == 2 + 3 * 2
    assert thoughts.main([*arguments, "--only", "last"]) == 0
    assert len(started) == 8  # nothing is repeated
    records = epochs_of(place / "runs" / "last-4")
    assert [record["stage"] for record in records] == [1, 2, 3]
    text = (place / "results" / "thoughts.md").read_text()
    rows = {line.split("|")[1].strip(" `"): line for line in text.splitlines() if line.startswith("| `")}
    assert list(rows) == ["last", "pause", "no_cot"]
    ends = [100 * epochs_of(place / "runs" / f"last-{seed}")[-1]["accuracy"] for seed in (3, 4)]
    assert f"{sum(ends) / 2:.1f} ({min(ends):.1f} - {max(ends):.1f})" in rows["last"]
    assert "of 2" in rows["last"]
    assert (place / "results" / "thoughts.png").stat().st_size > 1000


def epochs_of(folder: Path) -> list[dict]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == "epoch"]


def test_every_thought_of_the_configuration_is_compared():
    assert {spelling.partition(":")[0] for spelling in thoughts.THOUGHTS} == set(THOUGHTS)


def test_a_failing_run_is_said(small_runs, capsys):
    overrides, place = small_runs
    failing = ["--seeds", "9", "--out", str(place / "none"), "--only", "pause", "--set", *overrides, "lr=-1"]
    assert thoughts.main(failing) == 2
    assert "lr must be at least 0" in capsys.readouterr().err


def test_costs_are_measured(monkeypatch):
    monkeypatch.setitem(common.SIZES, "tiny", (1, 16, 2))
    for generates in (True, False):
        assert thoughts.measure("last+suppressed", generates, "tiny")["peak_gib"] > 0
