"""tools/report.py: the page shows a run's log, also of a restarted or broken run."""

import json
import math
import re

import pytest
import yaml
from test_page import Reader

from tools import report


def step(number: int, loss: float, stage: int = 0) -> dict:
    return {"event": "step", "step": number, "stage": stage, "loss": loss, "lr": 1e-4, "tokens_per_second": 1234.0}


def epoch(number: int, accuracy: float, stage: int = 0, loss: float = 0.5) -> dict:
    record = {"event": "epoch", "step": 10 * number, "epoch": number, "stage": stage, "loss": loss, "cot_match": 0.5}
    record |= {"accuracy": accuracy, "generated_tokens": 7.25, "train_loss": 1.25, "train_seconds": 61.0}
    return record | {"seconds": 1.0}


@pytest.fixture
def make_run(tmp_path):
    def make(name: str, records: list[dict], config: dict | None = None, tail: str = ""):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(lines + tail, encoding="utf-8")
        if config is not None:
            (folder / "config.yaml").write_text("# git commit: unknown\n" + yaml.safe_dump(config), encoding="utf-8")
        return folder

    return make


def written(*folders, capsys) -> Reader:
    """Writes the page of these runs and parses it."""
    assert report.main([*map(str, folders)]) == 0
    out = folders[0] / "report.html"
    assert capsys.readouterr().out == f"the page: {out}\n"
    return Reader(out.read_text(encoding="utf-8"))


def complaint(*arguments, capsys) -> str:
    assert report.main([*map(str, arguments)]) == 2
    out, error = capsys.readouterr()
    assert (out, error[:7], error.count("\n")) == ("", "error: ", 1)
    return error


def test_the_last_record_of_a_restarted_run_counts(make_run, capsys):
    records = [step(1, 4.0), step(2, 3.0), epoch(0, 0.25), step(3, 99.0), step(3, 2.0), epoch(1, 0.75), epoch(1, 0.5)]
    folder = make_run("again", records)
    (run,) = report.read_runs([folder])
    assert {number: record["loss"] for number, record in run.steps.items()} == {1: 4.0, 2: 3.0, 3: 2.0}
    # bug: a run that began again, with fewer steps and epochs, had the later ones of the first time
    records = [*(step(n, 9.0) for n in range(1, 9)), *(epoch(n, 0.9) for n in range(4))]
    records += [step(2, 5.0), epoch(0, 0.1), step(5, 4.0), epoch(2, 0.2)]
    (anew,) = report.read_runs([make_run("anew", records)])
    assert ([*anew.steps], [*anew.epochs]) == ([1, 2, 5], [1, 3])
    text = written(folder, capsys=capsys).text
    assert "2 epochs, 3 steps; stage 0, validation accuracy 50.0%" in text
    assert "75.0%" not in text
    # a run that has just begun
    text = written(make_run("young", [step(1, 4.0)]), capsys=capsys).text
    assert "0 epochs, 1 steps" in text
    assert "No epoch is finished yet." in text
    assert "The logs hold no step." in written(make_run("old", [epoch(0, 0.5)]), capsys=capsys).text


def test_nan_and_an_incomplete_line(make_run, capsys):
    records = [step(1, 4.0), step(2, math.nan), step(3, math.inf), step(4, 1.0), epoch(0, 0.25, loss=math.nan)]
    folder = make_run("torn", records, {"num_epochs": 3, "method": "coconut"}, tail='{"event": "step", "step": 5, "lo')
    text = written(folder, capsys=capsys).text
    assert "torn: losses that are not finite: 2, the first at step 2." in text
    assert "1 of 3 epochs, 4 steps" in text


def test_one_run_has_its_configuration_and_its_evaluations(make_run, capsys):
    folder = make_run("one", [epoch(0, 0.25)], {"name": "one", "lr": 0.5})
    for place, metrics in (
        ("eval", {"sets": {"a": {"checkpoint": "x/checkpoint_1", "file": "a.json", "examples": 8, "accuracy": 0.125}}}),
        ("evaluations/b/checkpoint_2/eval", {"checkpoint": "x/checkpoint_2", "examples": 4, "accuracy": 0.75}),
    ):
        (folder / place).mkdir(parents=True)
        (folder / place / "metrics.json").write_text(json.dumps(metrics))
    (folder / "eval" / "config.yaml").write_text("eval_latents: 2\nmode: written\n")  # bug: the table did not say so
    written(folder, capsys=capsys)
    html = (folder / "report.html").read_text(encoding="utf-8").replace(' class="number"', "")
    assert "<td>lr</td><td>0.5</td>" in html
    assert (
        "<td>one</td><td>checkpoint_1</td><td>a.json, in mode written, with 2 thoughts</td><td>8</td><td>12.5%</td>"
        in html
    )
    assert "<td>one</td><td>checkpoint_2</td><td></td><td>4</td><td>75.0%</td>" in html
    for text in ("{}", '{"sets": {"a": 3}}', '{"checkpoint": "x", "examples": 8, "accuracy": "a"}'):
        (folder / "eval" / "metrics.json").write_text(text)
        sentence = f"error: {folder}/eval/metrics.json is damaged: "  # bug: metrics.jsonl was named
        assert complaint(folder, capsys=capsys).startswith(sentence)


def test_the_page_of_several_runs(make_run, capsys):
    config = {"name": "one", "lr": 0.001, "thought": "last", "load_model_path": None, "epochs_per_stage": [3, 1]}
    records = [step(1, 4.0), epoch(0, 0.25), step(2, 3.0, stage=1), epoch(1, 0.5, stage=1)]
    one = make_run("one", records, config)
    two = make_run("two", records[:2], config | {"name": "two", "thought": "pause", "load_model_path": "models/x"})
    three = make_run("three", records[:2])
    reader = written(one, two, three, capsys=capsys)
    labels = [attributes["aria-label"] for _, attributes in reader.tags if attributes.get("role") == "img"]
    wanted = ["training loss by optimizer step", "tokens a second by optimizer step"]
    wanted += ["validation loss after each epoch", "accuracy after each epoch"]
    assert labels == [f"{label}; dotted: where a stage of one begins" for label in wanted]
    assert reader.text.count("stage 1") == 4 + 1  # in the figures and among the facts
    html = (one / "report.html").read_text(encoding="utf-8")
    assert "<td>thought</td><td>last</td><td>pause</td>" in html
    assert "<td>load_model_path</td><td>null</td><td>models/x</td>" in html
    assert "<td>lr</td>" not in html
    assert "three has no config.yaml." in reader.text
    written(one, two, three, capsys=capsys)
    assert (one / "report.html").read_text(encoding="utf-8") == html
    # runs with the same name are shown by their paths
    folders = [make_run(f"{parent}/run", [step(1, 4.0)], {"lr": 1}) for parent in ("a", "b")]
    text = written(*folders, capsys=capsys).text
    assert all(str(folder) in text for folder in folders)
    assert "All keys but their names are the same." in text


def test_lines_of_a_long_run_are_means(make_run):
    (run,) = report.read_runs([make_run("long", [step(number, number % 2) for number in range(1, 4001)])])
    figure = report.over_steps([run], "loss", "training loss", "{:.4g}")
    assert "means of 8 steps each" in figure.caption
    assert len(figure.rows) == report.ROWS
    assert figure.rows[0] == ["1 to 334", "0.5"]
    assert len(figure.svg) < 60_000
    means = report.averaged({1: 1.0, 2: 3.0, 3: math.nan, 5: 7.0, 6: math.inf}, 2)
    assert means == pytest.approx({0: 2.0, 1: math.nan, 2: 7.0}, nan_ok=True)


def test_losses_that_span_decades_have_a_logarithmic_axis(make_run):
    """Bug: with few powers of ten, matplotlib labelled ticks between them, in TeX."""
    for name, lowest, ticks in (("far", 0.002, {"0.01", "0.1", "1"}), ("near", 0.5, {"1.0", "3.5"})):
        (run,) = report.read_runs([make_run(name, [step(1, 4.0), step(2, lowest)])])
        svg = report.over_steps([run], "loss", "training loss", "{:.4g}").svg
        assert ticks <= set(re.findall(r">([\d.]+)</text>", svg))
        assert "mathdefault" not in svg


def test_errors_are_one_sentence(make_run, tmp_path, monkeypatch, capsys):
    sentence = "no_such_run is not the folder of a run: it holds no metrics.jsonl"
    assert sentence in complaint("no_such_run", capsys=capsys)
    empty = make_run("empty", [], tail='{"event": "st')
    assert "metrics.jsonl has no step and no epoch yet" in complaint(empty, capsys=capsys)
    run = make_run("run", [step(1, 4.0)])
    assert "run is given more than once" in complaint(run, tmp_path / "run" / ".", capsys=capsys)
    assert "cannot be written" in complaint(run, "--out", run, capsys=capsys)
    for text, sentence in (("lr: [1\n", "cannot read {}"), ("- 1\n", "{} must hold")):
        (run / "config.yaml").write_text(text)
        assert sentence.format(run / "config.yaml") in complaint(run, capsys=capsys)
    damaged = ({"event": "step"}, step(1, "a"), {"event": "epoch", "epoch": None}, step(0, 4.0), step(10**400, 4.0))
    for number, record in enumerate((*damaged, step(1, 10**400))):
        error = complaint(make_run(f"damaged-{number}", [record]), capsys=capsys)
        assert re.search("metrics.jsonl.*damaged: ", error), error
    (run / "config.yaml").unlink()
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    # bug: the sentence was about a damaged record
    sentence = "error: the figures need matplotlib: pip install -r requirements-dev.txt\n"
    assert complaint(run, capsys=capsys) == sentence
