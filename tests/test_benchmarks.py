"""The sides of the benchmarks compute the same thing; their speeds are not tested."""

import argparse
import json
import re
from types import SimpleNamespace

import common
import generate
import launches
import pytest
import scaling
import step
import thoughts
import torch
import yaml
from conftest import ROOT

import data
import definition
from config import THOUGHTS, Config
from dataset import collate_for_device
from methods.parallel_latents import ParallelLatents
from trainer.parallel import whole_weights

OPTIONS = {"shape": "gpt2", "size": "tiny", "batch": 2, "c_thought": 1, "bf16": False, "compile": False}
OPTIONS |= {"latent_passes": 2}


@pytest.fixture
def small(monkeypatch):
    """Makes models and rows tiny; returns their markers."""
    monkeypatch.setitem(common.SIZES, "tiny", (1, 16, 2))
    monkeypatch.setattr(common, "GPT2_VOCABULARY", 60)
    markers = common.Markers(start=60, latent=62, end=61, eos=59)
    for module in (common, step, generate):
        monkeypatch.setattr(module, "MARKERS", markers)
    return markers


def test_the_sides_of_a_step_agree(small):
    model = common.make_model("gpt2", "tiny", torch.device("cpu"))
    rows = common.prosqa_rows(2, stage=2, c_thought=1)
    batch = collate_for_device(rows, small.eos, small.latent)
    coconut = model(**batch).loss
    assert abs(step.no_cache_loss(model, batch) - coconut) < 1e-5
    assert abs(definition.loss(model.base_causallm, rows, small.latent) - coconut) < 1e-5
    unaligned = collate_for_device(rows, small.eos, None)
    assert abs(step.baseline_loss(model, unaligned) - step.all_logits_loss(model, unaligned)) < 1e-5
    assert len(step.make_sides(argparse.Namespace(**OPTIONS), 1, list(step.SIDES))) == len(step.SIDES)
    ids = (small.latent, small.start, small.end, small.eos)
    in_parallel = ParallelLatents(model.base_causallm, *ids, latent_passes=2)
    assert abs(in_parallel(**batch).loss - coconut) < 1e-5
    assert [step.passes_of(side, 4, 2) for side in step.SIDES] == [1, 5, 3, 1, 5]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_as_loaded_keeps_the_weights(small, world, strategy):
    """scaling.py failed under DDP: it gave parallel.load a plain tuple."""
    whole = common.make_model("llama", "tiny", torch.device("cpu"))
    weights = {name: value.clone() for name, value in whole.state_dict().items()}
    model = common.as_loaded(whole, Config(strategy=strategy), world)
    found = whole_weights(model)  # tied weights have one name
    assert len(found) >= len(weights) - 1
    assert all(torch.equal(value, weights[name]) for name, value in found.items())


def test_an_update_of_the_weights_is_not_communication(monkeypatch, world):
    """Regression: on one rank, which sends nothing, a quarter of a step counted as communication."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: clock.now)

    class Model(torch.nn.Linear):
        def forward(self, input):
            clock.now += 5
            return SimpleNamespace(loss=super().forward(input).sum())

    class Optimizer(torch.optim.SGD):
        def step(self):
            clock.now += 3

    model = Model(2, 2)
    step = scaling.make_step(model, Optimizer(model.parameters()), {"input": torch.ones(2)}, world, bf16=False)
    (seconds, update), (quiet, _) = step(1), step(1, syncs=False)
    assert (seconds, update, quiet) == (8, 3, 5)
    assert scaling.exposed(seconds, update, quiet) == 0
    assert scaling.exposed(10, update, quiet) == pytest.approx(0.2)


def test_step_and_generate_write_json(small, tmp_path, capsys):
    options = f"--batch 2 --stages 0 2 --repeats 1 --no-memory --json {tmp_path / 'a.json'}"
    assert step.main(options.split()) == 0
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [result["side"] for result in results] == ["baseline", "coconut", "all logits"] * 2
    assert results[0]["seconds_ratio"] == 1.0
    options = f"--examples 3 --batches 8 2 --new-tokens 3 --repeats 1 --json {tmp_path / 'b.json'}"
    assert generate.main(options.split()) == 0
    assert {result["batch"] for result in json.loads((tmp_path / "b.json").read_text())["results"]} == {2, 3}
    assert "ratio" in capsys.readouterr().out


def test_the_thoughts_grid_has_every_thought():
    runs = yaml.safe_load((ROOT / "experiments" / "thoughts.yaml").read_text())["runs"]
    thoughts = {(spec.get("keys") or {}).get("thought", "last") for spec in runs.values()}
    assert {spelling.partition(":")[0] for spelling in thoughts} == {
        name for name, (_, module) in THOUGHTS.items() if module in ("model.thought", "methods.thoughts")
    }  # but for those of a user's own file


def test_thoughts_measures_costs(monkeypatch):
    monkeypatch.setitem(common.SIZES, "tiny", (1, 16, 2))
    for generates in (True, False):
        assert thoughts.measure("last+suppressed", generates, "tiny")["peak_gib"] > 0


def test_thoughts_writes_a_table_of_costs():
    cost = {"seconds": 9.0, "peak_gib": 3.0, "generation_seconds": 3.5, "generation_peak_gib": 1.0}
    text = thoughts.as_text({"last": cost}, "small")
    assert "| `last` | 9.00 | 3.00 | 3.50 | 1.00 |" in text
    assert "12 layers, width 768" in text


def test_wrong_files_are_one_sentence(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    for file, why in (("other.json", "is no file of benchmarks/step.py --json"), ("none.json", "cannot be read")):
        assert launches.main(["--measured", str(tmp_path / file)])
        assert re.search(rf"{file} {why}.*\n$", capsys.readouterr().err)
    assert data.main(["--model", str(tmp_path)])
    assert re.search("has no tokenizer\n$", capsys.readouterr().err)


@pytest.mark.parametrize(("script", "option"), [(step, "--stages"), (generate, "--stage"), (step, "--batch")])
def test_counts_below_their_least_are_refused(script, option, capsys):
    least = 1 if option == "--batch" else 0
    with pytest.raises(SystemExit):
        script.main([option, str(least - 1)])
    assert f"argument {option}: {least - 1} is not at least {least}" in capsys.readouterr().err
