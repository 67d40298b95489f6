"""The benchmarks' sides compute the same thing; their numbers are not tested."""

import argparse
import json
import sys

import pytest
import torch
from conftest import ROOT, load_script

sys.path.insert(0, str(ROOT / "benchmarks"))
import common
import step

from dataset import collate_for_device

generate = load_script(ROOT / "benchmarks" / "generate.py")

OPTIONS = {"shape": "gpt2", "size": "tiny", "batch": 2, "c_thought": 1, "bf16": False}


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
