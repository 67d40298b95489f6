"""Grids of experiments: errors, the order of runs, finished runs, the report."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import arithmetic
import conftest
import grid
import jobs
import prosqa
import pytest
import tables
import tiny_model
import torch
import yaml
from conftest import ROOT, check_closed_and_full_output, one_error, read_json, refuses
from grid_file import read_grid
from jobs import jobs_of
from test_results import NAMES as RECORDED
from test_table1 import ROWS
from transformers import AutoConfig, AutoModelForCausalLM

import run
from config import Config
from trainer.run_folder import notes_of


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with the data, model, base file and YAML file of a small grid: a control, and a run with a beginning."""
    folder = tmp_path_factory.mktemp("grid")
    for name, examples in arithmetic.make_splits({"train": 16, "valid": 4, "test": 6}, max_steps=3, base=5).items():
        (folder / f"{name}.json").write_text(json.dumps(examples))
    tiny_model.write_model([folder / "train.json"], folder / "model", "char", "llama", 16, 1, 2, 64)
    base = {"model_id": str(folder / "model"), "epochs_per_stage": 1, "max_latent_stage": 1, "num_epochs": 2}
    base |= {"from_scratch": True}
    base |= {"train_path": str(folder / "train.json"), "val_path": str(folder / "valid.json"), "max_new_tokens": 2}
    (folder / "base.yaml").write_text(yaml.safe_dump(base | {"wandb": "disabled", "num_workers": 0}))
    content = {
        "title": "Small",
        "base": str(folder / "base.yaml"),
        "save_path": str(folder / "runs"),
        "test_path": str(folder / "test.json"),
        "seeds": [3],
        "controls": ["pause"],
        "prediction": "Nothing is learnt.",
        "beginnings": {"words": {"keys": {"method": "cot", "num_epochs": 1}}},
        "runs": {
            "pause": {"keys": {"thought": "pause"}},
            "coconut": {"begins_with": "words", "label": "Coconut", "paper": "97.0", "seeds": [3, 4]},
        },
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The commands that a grid starts; they run in this process."""
    commands = []

    def in_process(command, log, _):
        commands.append(command)
        log.touch()
        return run.main(Config.from_file(command[2], command[3:]))

    monkeypatch.setattr(grid, "start", in_process)
    return commands


def names_of(commands: list[list[str]]) -> list[str]:
    """The names of the started runs; "test" marks an evaluation."""
    names = (next(text for text in command if text.startswith("name=")).removeprefix("name=") for command in commands)
    return [name + " test" * ("only_eval=true" in command) for name, command in zip(names, commands, strict=True)]


class SmallGrid:
    """The small grid with other keys, in a folder that gets its runs and results."""

    def __init__(self, inputs: Path, folder: Path, started: list[list[str]]):
        self.content = yaml.safe_load((inputs / "small.yaml").read_text()) | {"save_path": str(folder / "runs")}
        self.inputs, self.folder, self.started = inputs, folder, started

    def __call__(self, **changed) -> list[str]:
        """Sets keys of the grid; returns grid.py's arguments."""
        self.content |= changed
        (self.folder / "small.yaml").write_text(yaml.safe_dump(self.content, sort_keys=False))
        return [str(self.folder / "small.yaml"), "--jobs", "1", "--out", str(self.folder)]

    def with_base(self, **changed) -> list[str]:
        """Sets keys of the base file, in a copy of it; returns grid.py's arguments."""
        base = yaml.safe_load((self.inputs / "base.yaml").read_text()) | changed
        (self.folder / "base.yaml").write_text(yaml.safe_dump(base))
        return self(base=str(self.folder / "base.yaml"))

    def run(self, *options: str) -> list[str]:
        """Starts the grid; returns the names of the runs that it starts."""
        self.started.clear()
        assert grid.main([*self(), *options]) == 0
        return names_of(self.started)

    @property
    def results(self) -> dict[str, list[dict]]:
        return read_json(self.folder / "small.json")

    @property
    def report(self) -> str:
        return (self.folder / "small.md").read_text()


@pytest.fixture
def small(inputs, tmp_path, started) -> SmallGrid:
    return SmallGrid(inputs, tmp_path, started)


def test_a_grid_runs_once_and_is_reported(inputs, started, capsys):
    arguments = [str(inputs / "small.yaml"), "--jobs", "1", "--out", str(inputs / "results")]
    assert grid.main([*arguments, "--only", "pause"]) == 0
    assert grid.main(arguments) == 0
    names = ["pause-3", "pause-3 test", "words-3", "coconut-3", "coconut-3 test"]
    assert names_of(started) == [*names, "words-4", "coconut-4", "coconut-4 test"]
    assert f"load_model_path={inputs / 'runs' / 'words-3'}" in started[3]
    assert "resume=1" in started[3]
    assert grid.main(arguments) == 0
    assert len(started) == 8  # nothing is repeated
    text = (inputs / "results" / "small.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert list(rows) == ["run", "pause", "Coconut"]
    assert "| 97.0 |" in rows["Coconut"]
    assert "Nothing is learnt." in text
    found = read_json(inputs / "results" / "small.json")
    assert [row["seed"] for row in found["coconut"]] == [3, 4]
    assert [record["epoch"] for record in found["coconut"][0]["epochs"]] == [0, 1]  # with the beginning's
    made_by = found["coconut"][0]["made_by"]
    notes = notes_of((inputs / "runs" / "coconut-3" / "config.yaml").read_text())
    assert notes["git commit"].startswith(made_by["commit"][:7])
    assert made_by["hardware"] == notes["hardware"]
    assert text.splitlines()[-1].startswith(f"Made by commit {made_by['commit']}; python ")
    assert len(found["pause"][0]["correct"]) == 6
    assert (inputs / "results" / "small.png").stat().st_size > 1000
    capsys.readouterr()
    assert grid.main([*arguments, "--dry-run"]) == 0
    assert "0 of 5 runs are left" in capsys.readouterr().out
    error = one_error(grid.main, [*arguments, "--set", "lr=0.5"], capsys)
    assert f"{inputs / 'runs' / 'pause-3'} holds another run (lr 0.0001, not 0.5); move it away" in error


def test_a_plan_counts_the_tokens_that_are_left(inputs, small, capsys):
    assert grid.main([*small(), "--dry-run", "--seeds", "4"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("# coconut-4: 1 epochs"))
    # stage 1 of 1: question, newline, start, latent, end, then all steps but one, the answer and EOS; a step's '<<' and
    # '>>' are one token each
    examples = read_json(inputs / "train.json")
    expected = sum(len(e["question"]) + 1 + 3 + sum(1 + len(s) - 2 for s in e["steps"][1:]) + 3 + 1 for e in examples)
    assert f" {expected} tokens" in line


def test_a_plan_estimates_hours_and_disk(inputs, small, tmp_path, capsys, monkeypatch):
    """The plan ignored --gpus and the FLOPs of evaluations, and took the bfloat16 peak for float32 runs."""
    grid_alone, *_ = small()

    def plan(*options: str) -> tuple[float, float, float, int, str]:
        """(FLOPs, GB, GPU hours, number of GPUs, last line)"""
        assert grid.main([grid_alone, "--dry-run", "--only", "pause", "--seeds", "3", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        flops, disk = re.search(r"([\d.e+]+) FLOPs, ([\d.e-]+) GB$", lines[-3]).groups()
        hours, wall, n_gpus = re.match(r"([\d.e-]+) GPU hours, ([\d.e-]+) hours on (\d+) GPUs", lines[-1]).groups()
        assert float(wall) == pytest.approx(float(hours) / int(n_gpus), rel=0.02)
        return float(flops), float(disk), float(hours), int(n_gpus), lines[-1]

    flops, disk, hours, n_gpus, last = plan("--utilisation", "0.5")
    assert last.endswith("at 50% of 6.7e+13 FLOP/s (float32)")
    assert hours == pytest.approx(flops / 3600 / 67e12 / 0.5, rel=0.02)
    assert n_gpus == 1
    weights = (inputs / "model" / "model.safetensors").stat().st_size / 1e9
    assert disk == pytest.approx((2 + 3 + 5 * 2) * weights, rel=0.1)
    assert plan("--set", "bf16=true")[-1].endswith("9.89e+14 FLOP/s (bf16)")
    assert plan("--set", "tf32=true")[-1].endswith("4.94e+14 FLOP/s (tf32)")
    assert plan("--gpus", "2", "--jobs", "3")[3] == 6
    assert plan("--peak", "1e12")[-1].endswith("1e+12 FLOP/s (float32)")
    # 16 examples twice, 4 in two validations, 6 in the test: 3 * 32 passes and 2 * 14; with 2 in each, 3 * 32 and 2 * 6
    assert plan("--set", "max_eval_examples=2")[0] < 0.9 * flops
    free = shutil.disk_usage(inputs)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert grid.main([grid_alone, "--dry-run"]) == 0
    assert f"warning: {tmp_path / 'runs'} has 1e-06 GB free: see keep_checkpoints\n" in capsys.readouterr().out


def test_a_full_standard_output_is_a_user_error(small, capfd, monkeypatch):
    """OSError was a traceback."""
    arguments = [*small(), "--report", "--seeds", "3"]
    assert check_closed_and_full_output(grid.main, arguments, capfd, monkeypatch).count("\n") == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"runs": {"coconut": {"begins_with": "nobody"}}}, "begins with 'nobody', which must be a beginning"),
        ({"name": "../elsewhere"}, "unknown key 'name'"),
        ({"seds": [1]}, "unknown key 'seds': did you mean 'seeds'?"),
        ({"runs": {"coconut": {"key": {}}}}, "coconut: unknown key 'key': did you mean 'keys'?"),
        ({"controls": ["nobody"]}, "control 'nobody' is no run of the grid"),
        ({"base": "none.yaml"}, "none.yaml: No such file"),
        ({"runs": ["coconut"]}, "'runs' must be `key: value` lines, not [coconut]"),
        ({"seeds": 3}, "'seeds' must be a list of whole numbers, not '3'"),
        ({"seeds": ["a"]}, "'seeds' must be a list of whole numbers, not [a]"),
        ({"seeds": []}, "small.yaml: 'seeds' must be a list of different whole numbers, not []"),  # was a traceback
        ({"seeds": [0, 0]}, "small.yaml: 'seeds' must be a list of different whole numbers, not [0, 0]"),
        ({"runs": {"pause": {"seeds": []}}}, "pause: 'seeds' must be a list of different whole numbers, not []"),
        ({"runs": {}, "controls": []}, "small.yaml: 'runs' must hold a run, not {}"),  # was a traceback
        ({"chance": 5}, "small.yaml: 'chance' must be from 0 to 1, not '5'"),
        ({"task": "small.yaml"}, "small.yaml: 'task' leads back to this file"),  # was a RecursionError
        ({"task": "$NONE/a.yaml"}, "small.yaml: 'task' must be a path whose variables are set (NONE is not)"),
        ({"controls": "pause"}, "'controls' must be a list of texts, not 'pause'"),
        ({"runs": {"coconut": {"paper": [97.0]}}}, "coconut: 'paper' must be text, not [97.0]"),
        ({"runs": {"coconut": {"keys": None}}}, "coconut: 'keys' must be `key: value` lines, not 'null'"),
        ({"runs": {"coconut": {"keys": {"seed": 7, "name": "x"}}}}, "run 'coconut' cannot set name and seed"),
        ({"runs": {"coconut": {"keys": {"test_path": "x"}}}}, "run 'coconut' cannot set test_path"),  # never ended
        (
            {"runs": {"coconut": {}, "pause": {"keys": {"max_eval_examples": 2}}}},
            "all runs need the same max_eval_examples",  # a row of the table was about other questions
        ),
        ({"recipes": {"r": {"keys": {"lr": 0.1}, "label": "x"}}}, "recipe 'r' can only set 'keys'"),  # was ignored
        ({"recipes": {"lr0.1": {}}}, "recipe 'lr0.1': a name is letters, digits, - and _"),  # rows were merged
        ({"runs": {"+": {}}, "controls": []}, "run '+': a name is letters, digits"),
        ({"runs": {"a b": {}}, "controls": []}, "run 'a b': a name is letters, digits"),
        ({"beginnings": {"pause": {}}}, "'pause' is both a run and a beginning"),
        ({"needs": {"x": [3]}}, "'needs' takes FILE: the script, with its arguments, that makes it; not 'x': ['3']"),
        ({"needs": {"x": "a.py 'y"}}, "small.yaml: 'needs' takes FILE: the script"),  # was shlex's traceback
        ({"checkpoint": "first"}, "'checkpoint' must be newest or best, not 'first'"),
        ({"runs": {"pause": {"keys": {"lrr": 3}}}}, "run 'pause' of grid small: "),
        ({"runs": {"pause": {"keys": {"train_path": None}}}}, "lacks train_path"),
        ("seeds: [5]", "the key 'seeds' is set twice, in lines"),  # the last one won silently
        ("title: [", "is not valid YAML: while parsing"),
        (
            ["--dry-run", "--gpus", "3", "--set", "global_batch_size=16"],
            "global_batch_size 16 is no multiple of 3 ranks",
        ),
        (["--only", "nobody"], "small has no run nobody; its runs are pause, coconut"),
    ],
)
def test_a_mistake_is_one_sentence_before_data_are_made(small, tmp_path, change, complaint, capsys):
    """change: other keys, a further line of the file, or options."""
    keys = {"needs": {str(tmp_path / "file"): "preprocessing/machine.py"}}  # would fail, with another error
    arguments = small(**keys | change) if isinstance(change, dict) else small(**keys)
    if isinstance(change, str):
        with (tmp_path / "small.yaml").open("a") as file:
            file.write(change)
    options = change if isinstance(change, list) else []
    assert complaint in one_error(grid.main, [*arguments, *options], capsys)


def test_a_grid_expands_home_and_variables_in_its_paths(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.yaml").write_text("{title: t, base: b, save_path: s, test_path: t, runs: {a: {}}}")
    read = read_grid(Path(small(save_path="~/runs", test_path="$HOME/t.json", base="~/b", task="~/t.yaml")[0]))
    assert (read.save_path, read.test_path) == (f"{tmp_path}/runs", f"{tmp_path}/t.json")
    assert (read.base, read.task) == (f"{tmp_path}/b", f"{tmp_path}/t.yaml")


def test_keys_of_the_grid_are_those_of_every_run(small):
    changed = small(keys={"lr": 0.5, "thought": "normalised"})[0]
    found = {job.name: job.config for job in jobs_of(read_grid(Path(changed)), None, [3], ())}
    assert [found[name].lr for name in ("words-3", "coconut-3", "pause-3")] == [1e-4, 0.5, 0.5]  # not of a beginning
    assert found["coconut-3"].thought == "normalised"
    assert found["pause-3"].thought == "pause"  # its own key wins
    # bug: with a beginning, --set of a key that the run sets was an error
    (_, job) = jobs_of(read_grid(Path(changed)), ["coconut"], [3], ("lr=0.25",))
    assert (job.config.lr, job.shares_curriculum) == (0.25, True)


def test_a_grid_can_share_the_task_of_another(small, tmp_path):
    task = read_grid(Path(small(needs={"a.json": "a.py"})[0]))
    own = {"title": "Other", "task": "small.yaml", "save_path": "elsewhere", "needs": {"b.json": "b.py"}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(own | {"runs": {"r": {"begins_with": "words"}}}))
    other = read_grid(tmp_path / "other.yaml")
    assert (other.base, other.test_path, other.beginnings) == (task.base, task.test_path, task.beginnings)
    assert other.needs == {"a.json": "a.py", "b.json": "b.py"}
    assert (other.save_path, list(other.runs), other.seeds, other.prediction) == ("elsewhere", ["r"], (0, 1, 2), "")


def test_a_failed_run_is_reported_and_the_others_run(small, monkeypatch, capsys):
    codes = iter([1, 0, 0])

    def fails(_, log, __):
        log.write_text("error: no\n")
        return next(codes)

    monkeypatch.setattr(grid, "start", fails)
    assert grid.main([*small(), "--seeds", "3"]) == 2
    printed = capsys.readouterr().err
    assert "pause-3 failed with exit code 1: error: no (see " in printed
    assert "words-3 was stopped" in printed
    assert next(codes, None) == 0  # a run whose beginning failed is not started


def test_a_run_that_waits_for_its_beginning_takes_no_slot(small, monkeypatch, capsys):
    """With two slots, coconut-3 held the second one while words-3 trained, though words-4 could start."""
    words_4_began, order = threading.Event(), []

    def begins(command, log, _):
        log.touch()
        order.extend(names_of([command]))
        if order[-1] == "words-4":
            words_4_began.set()
        return 0 if words_4_began.wait(timeout=20) else 1

    monkeypatch.setattr(grid, "start", begins)
    arguments = [*small(), "--only", "coconut", "--seeds", "3", "4", "--jobs", "2"]
    assert grid.main(arguments) == 2  # nothing is trained here, so the runs with a beginning are not started
    assert "failed with exit code 1" not in capsys.readouterr().err
    assert sorted(order) == ["words-3", "words-4"]


def test_a_recorded_result_is_not_run_again(inputs, small, tmp_path, capsys):
    """Results without checkpoints were trained again, and results of other seeds were lost."""
    first = [str(inputs / "small.yaml"), "--jobs", "1", "--out", str(tmp_path), "--only", "coconut"]
    assert grid.main([*first, "--seeds", "3", "4"]) == 0
    before = small.results["coconut"]
    options = ["--only", "coconut", "--seeds", "3"]
    assert small.run(*options) == []
    assert small.results["coconut"] == before
    assert "| seeds |" not in small.report  # one seed is shown
    assert small.run(*options, "--set", "lr=0.001") == ["words-3", "coconut-3", "coconut-3 test"]  # another run
    for what in (["--dry-run"], ["--slurm", str(tmp_path / "array.sbatch")]):  # bug: nothing was left to run
        arguments = [*small(), *options, "--set", "lr=0.002", *what]
        assert "holds another run (lr 0.001, not 0.002)" in one_error(grid.main, arguments, capsys)
    (tmp_path / "small.json").write_text("[]")
    assert "small.json cannot be read: it is not a JSON object" in one_error(grid.main, [*small(), *options], capsys)
    for text in ('{"pause": 3}', '{"pause": [3]}', '{"pause": [{"seed": 3}]}'):  # bug: tracebacks
        (tmp_path / "small.json").write_text(text)
        sentence = "small.json: 'pause' must be a list of objects with a seed and a digest"
        assert sentence in one_error(grid.main, [*small(), "--report"], capsys)


def test_a_report_keeps_the_results_of_other_runs(small, tmp_path, capsys):
    """With --set, --anew or another key, the rows of other runs in NAME.json were overwritten."""
    small(beginnings={}, runs={"pause": {}, "coconut": {}})
    small.run()
    first = small.results
    (tmp_path / "runs").rename(tmp_path / "gone")
    small.run("--only", "pause", "--anew")
    assert small.results["coconut"] == first["coconut"]
    (tmp_path / "runs").rename(tmp_path / "gone too")
    small.run("--only", "pause", "--set", "lr=0.5")
    (other, own) = small.results["pause"]
    assert other["digest"] != own["digest"] == first["pause"][0]["digest"]
    assert small.results["coconut"] == first["coconut"]
    assert "| coconut |" not in small.report  # it has no result with lr=0.5
    (tmp_path / "runs").rename(tmp_path / "gone as well")
    capsys.readouterr()
    assert small.run() == []
    assert "small.json has 2 of these runs: --anew trains them here" in capsys.readouterr().err


def test_a_folder_with_other_keys_is_no_result(small):
    """If --only named another run, the folder's old result was recorded under the new keys."""
    small.run("--only", "pause")
    before = small.results["pause"]
    small(runs=small.content["runs"] | {"pause": {"keys": {"thought": "pause", "lr": 0.5}}})
    small.run("--only", "coconut", "--seeds", "3")
    assert small.results["pause"] == before
    assert "| pause |" not in small.report


def test_an_incomplete_or_outdated_evaluation_is_repeated(inputs, small, tmp_path):
    """A killed evaluation and a changed test split were tracebacks; the evaluation of an earlier checkpoint, or with
    other keys, counted as the current one."""
    questions, evaluation = tmp_path / "test.json", tmp_path / "runs/pause-3/eval"
    predictions, metrics = evaluation / "predictions.jsonl", evaluation / "metrics.json"
    questions.write_text((inputs / "test.json").read_text())
    small(test_path=str(questions))
    small.run("--only", "pause")
    for damage in (
        lambda: predictions.write_text(predictions.read_text()[:-20]),  # killed while it wrote
        predictions.unlink,
        lambda: metrics.write_text(metrics.read_text()[:-20]),
        lambda: metrics.write_text(metrics.read_text().replace("checkpoint_2", "checkpoint_1")),
        lambda: questions.write_text(json.dumps(read_json(questions)[:4])),
        lambda: questions.write_text(json.dumps([row | {"answer": "9"} for row in read_json(questions)])),
    ):
        damage()
        assert small.run("--only", "pause", "--anew") == ["pause-3 test"]
        assert "resume=0" in small.started[0]  # the stage is the checkpoint's, whatever the base file resumes
    for option, count in (("max_new_tokens=1", 4), ("max_eval_examples=2", 2)):
        assert small.run("--only", "pause", "--set", option) == ["pause-3 test"]
        assert len(small.results["pause"][0]["correct"]) == count
    digests = {row["digest"] for row in small.results["pause"]}
    assert [len(digest) for digest in digests] == [16] * 5  # six questions, four, with other answers, and each option
    with_separator = predictions.read_text().replace('"output": "', '"output": "\u2028')  # str.splitlines breaks there
    predictions.write_text(with_separator)
    (job,) = jobs_of(read_grid(tmp_path / "small.yaml"), ["pause"], [3], ("max_eval_examples=2",))
    assert job.is_done


def test_a_report_names_the_options_of_its_command(small):
    """The table of one seed, or with other keys, had the command of the whole grid above it."""
    small(runs={"pause": {"seeds": [3, 4]}})
    small.run("--set", "lr=0.5")
    assert "experiments/small.yaml --set lr=0.5\n" in small.report
    assert small.run("--set", "lr=0.5", "--report", "--seeds", "4") == []
    assert "experiments/small.yaml --seeds 4 --set lr=0.5\n" in small.report


@pytest.mark.parametrize("what", ["data", "weights"])
def test_a_run_on_other_data_or_weights_is_another_run(inputs, small, tmp_path, what, capsys):
    """After the data at a path had changed, the old weights counted as trained on the new data."""
    shutil.copytree(inputs / "model", tmp_path / "model")
    (tmp_path / "train.json").write_text((inputs / "train.json").read_text())
    keys = {"train_path": str(tmp_path / "train.json"), "model_id": str(tmp_path / "model")}
    if what == "weights":
        shape = AutoConfig.from_pretrained(inputs / "model")
        AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "model")
        keys["from_scratch"] = False
    arguments = [*small.with_base(**keys), "--only", "pause"]
    small.run("--only", "pause")
    if what == "weights":
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "model")
    else:
        (tmp_path / "train.json").write_text(json.dumps(read_json(inputs / "train.json")[1:]))
    small.started.clear()
    error = one_error(grid.main, arguments, capsys)
    assert "holds another run (trained on other data, or from other weights); move it away" in error
    assert small.started == []


def test_a_report_needs_no_matplotlib(small, tmp_path, monkeypatch, capsys):
    """Bug: a traceback, after all training."""
    small(beginnings={}, runs={"pause": {}})
    monkeypatch.setattr("tables.find_spec", lambda _: None)
    small.run()
    assert "no figure, which needs matplotlib" in capsys.readouterr().err
    assert "| pause |" in small.report
    assert not list(tmp_path.rglob("small.png"))


def test_a_run_with_another_reward_is_another_run(inputs, small, tmp_path):
    reward = tmp_path / "reward.py"
    small(beginnings={}, runs={"pause": {"keys": {"method": "grpo", "reward": str(reward)}}})
    digests = []
    for number in range(2):
        reward.write_text(f"def reward(question, gold, outputs):\n    return [{number} for _ in outputs]\n")
        (job,) = jobs_of(read_grid(tmp_path / "small.yaml"), None, [3], ())
        digests.append(job.training_digest)
    assert digests[0] != digests[1]


def test_the_number_of_generated_tokens_depends_on_the_evaluated_file(inputs, small, tmp_path):
    """Bug: after a validation on gsm, the test on another file counted as one with other keys, again and again."""
    small.with_base(max_new_tokens=None, val_path=str(shutil.copy(inputs / "valid.json", tmp_path / "gsm_valid.json")))
    small(beginnings={}, runs={"pause": {}})
    assert small.run() == ["pause-3", "pause-3 test"]
    assert small.run() == []
    assert len(small.results["pause"]) == 1


def test_a_run_can_be_extended(small, tmp_path):
    """More epochs were an error (another run), or the old evaluation counted as the new one."""
    small(beginnings={}, runs={"pause": {}})
    small.run()
    assert small.run("--set", "num_epochs=3") == ["pause-3", "pause-3 test"]
    shutil.rmtree(tmp_path / "runs/pause-3")
    (tmp_path / "runs/pause-3").mkdir()  # with the only file of a run that was stopped before its first checkpoint
    (tmp_path / "runs/pause-3/grid.json").write_text('{"digest": "of other data"}')
    small.run("--anew")


def test_a_run_with_save_only_improve_counts_as_finished(small, tmp_path):
    """Its last epochs left no checkpoint, so every start of the grid trained it again."""
    small(runs={"pause": {"keys": {"save_only_improve": True, "lr": 0.0, "num_epochs": 4}}})
    small.run()
    assert not (tmp_path / "runs/pause-3/checkpoint_4").exists()
    assert small.results["pause"][0]["seed"] == 3
    (tmp_path / "small.json").unlink()
    assert small.run() == []


def test_checkpoint_best_tests_and_continues_the_best_checkpoint(small, tmp_path):
    small(checkpoint="best")
    commands = dict(zip(small.run("--seeds", "3"), small.started, strict=True))
    assert f"load_model_path={tmp_path / 'runs/words-3'}@best" in commands["coconut-3"]
    assert f"load_model_path={tmp_path / 'runs/pause-3'}@best" in commands["pause-3 test"]
    assert small.run("--seeds", "3", "--anew") == []


def test_a_missing_beginning_is_not_trained_again_for_an_evaluation(small, tmp_path):
    small.run("--only", "coconut", "--seeds", "3")
    (tmp_path / "runs/words-3").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "runs/coconut-3/eval")
    assert small.run("--only", "coconut", "--seeds", "3", "--anew") == ["coconut-3 test"]


def test_results_are_never_half_written(small, tmp_path, monkeypatch, capsys):
    """A kill in the middle of writing destroyed all results in the file."""
    small.run("--only", "pause")
    before = small.results

    def torn(path, text, **_):
        path.open("w").write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", torn)
    arguments = [str(tmp_path / "small.yaml"), "--out", str(tmp_path), "--report"]
    assert "small.json cannot be written: No space left on device" in one_error(grid.main, arguments, capsys)
    assert small.results == before


def test_set_applies_to_every_run(inputs, small, tmp_path):
    """With --set save_path the grid looked for its runs in the old folder; --set could not replace a missing path."""
    assert grid.main([*small.with_base(val_path="YOUR_PATH_TO_VALID"), "--only", "pause"]) == 2
    small.run("--only", "pause", "--set", f"save_path={tmp_path / 'there'}", f"val_path={inputs / 'valid.json'}")
    assert (tmp_path / "there/pause-3/eval/metrics.json").is_file()
    assert "| pause |" in small.report


@pytest.mark.parametrize(
    "options", [["--jobs", "0"], ["--gpus", "0"], ["--peak", "0"], ["--set", "name=a"], ["--set", "lr=1", "seed=2"]]
)
def test_impossible_options_are_errors(inputs, tmp_path, options, capsys):
    with pytest.raises(SystemExit):
        grid.main([str(inputs / "small.yaml"), "--out", str(tmp_path), *options])
    assert options[0] in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_one_sentence(small, tmp_path, capsys):
    """The thread of a run printed a traceback."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "logs").write_text("no folder")
    assert grid.main([*small(), "--only", "pause"]) == 2
    assert "pause-3.log cannot be written: " in capsys.readouterr().err


def test_the_figure_marks_stages_of_steps_only(inputs, tmp_path, monkeypatch):
    """The figure marked iCoT's numbers of removed tokens as stages of all runs."""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    stages = {"coconut": [0, 0, 1], "pause": [8, 16, 1 << 30]}  # as if that were iCoT
    results = {
        run: [{"epochs": [{"epoch": epoch, "stage": stage, "accuracy": 0.5} for epoch, stage in enumerate(of)]}]
        for run, of in stages.items()
    }
    tables.draw(read_grid(inputs / "small.yaml"), results, {"coconut"}, tmp_path / "a.png")
    tables.draw(read_grid(inputs / "small.yaml"), {"pause": results["pause"]}, {"coconut"}, tmp_path / "a.png")
    assert [[text.get_text() for text in figure.axes[0].texts] for figure in drawn] == [["stage 1"], []]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_stops_the_runs_and_starts_no_further_one(small, tmp_path, number):
    """The runs continued without the grid, and their folders were locked when it was started again."""
    arguments = small(beginnings={}, runs={"pause": {"keys": {"num_epochs": 5000}}, "coconut": {}})
    command = [sys.executable, str(ROOT / "experiments/grid.py"), *arguments]
    environment = os.environ | {"INTERRUPTED_FILE": str(tmp_path / "interrupted")}
    heeded = partial(signal.signal, number, signal.SIG_DFL)  # nohup, or a shell's &, may have the tests ignore it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heeded)
    while not (tmp_path / "runs/pause-3/metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 2
    assert (tmp_path / "interrupted").exists()
    assert "stopped by a signal; start the same command again to continue" in printed
    assert "stopped by a signal" in (tmp_path / "runs/logs/pause-3.log").read_text()  # the run's own last line
    assert not (tmp_path / "runs/coconut-3").exists()


def test_parallel_runs_share_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert grid.gpu_slots(4, 1) == ["4", "5", "7", "4"]
    assert grid.gpu_slots(2, 2) == ["4,5", "7,4"]
    refuses("--gpus 4: this machine has 3", grid.gpu_slots, 1, 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert grid.gpu_slots(2, 1) == [None, None]
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5})  # under taskset or srun
    assert grid.gpu_slots(None, 1) == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert grid.gpu_slots(2, 1) == [None, None]


def test_a_run_on_several_gpus_has_several_ranks(inputs):
    (job,) = jobs_of(read_grid(inputs / "small.yaml"), ["pause"], [3], (), n_gpus=2)
    for command in job.commands():
        launcher, script = command[: command.index(str(ROOT / "run.py"))], command[len(job.launcher)]
        assert launcher == ["bash", str(ROOT / "slurm/launch.sh"), "--standalone", "--nproc_per_node", "2"]
        assert script == str(ROOT / "run.py")


@pytest.mark.parametrize("dataset", ["gsm", "prontoqa", "prosqa"])
def test_the_paper_grids_have_every_row_of_table_1(dataset, inputs, tmp_path, monkeypatch, capsys):
    """The 24 rows that test_table1.py runs."""
    path = ROOT / "experiments" / f"paper_{dataset}.yaml"
    of_paper = read_grid(path)
    jobs = jobs_of(of_paper, None, [0], ())
    assert {(job.base.stem, job.spec.row) for job in jobs} == {(dataset, row) for row in ROWS}
    for job in jobs:
        alone = Config.from_file(job.base, [f"row={job.spec.row}"], needs_files=False)
        assert (job.config.num_epochs, job.config.resume) == (alone.num_epochs, alone.resume)
        assert (job.config.load_model_path is None) == (alone.load_model_path is None)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for part in ("train", "valid", "test"):
        (tmp_path / "data" / f"{dataset}_{part}.json").write_text((inputs / "test.json").read_text())
    options = ["--gpus", "4", "--slurm", str(tmp_path / "a.sbatch"), "--out", str(tmp_path)]
    assert grid.main([str(path), *options]) == 0, capsys.readouterr().err
    assert 'tasks=(\n    "--only cot ' in (tmp_path / "a.sbatch").read_text()


def test_a_beginning_on_other_data_is_no_part_of_the_curriculum(inputs, small, tmp_path):
    """The run with that beginning starts at epoch 0, and so does its curve; the beginning's minutes count."""
    keys = {"method": "cot", "train_path": str(inputs / "valid.json"), "num_epochs": 3}
    small(controls=[], beginnings={"words": {"keys": keys}}, runs={"coconut": {"begins_with": "words"}})
    assert small.run() == ["words-3", "coconut-3", "coconut-3 test"]
    assert "resume=0" in small.started[1]
    (row,) = small.results["coconut"]
    assert [record["stage"] for record in row["epochs"]] == [0, 1]
    records = [record for name in ("words-3", "coconut-3") for record in conftest.epochs(tmp_path / "runs" / name)]
    assert len(records) == 5
    assert row["seconds"] == pytest.approx(sum(record["train_seconds"] + record["seconds"] for record in records))


def test_a_later_key_changes_the_digest_only_if_it_is_set(inputs):
    """A new key with its default would make every recorded run another run."""
    small_grid = read_grid(inputs / "small.yaml")
    digests = [
        jobs_of(small_grid, ["pause"], [3], more)[0].digest
        for more in ((), ("distillation=1.0",), ("distillation=2.0",), ("lr=0.5",))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    stopping = ("method=stopping", "thought=last")  # has a key that only the evaluation uses
    tested = [jobs_of(small_grid, ["pause"], [3], more)[0] for more in (stopping, (*stopping, "stop_threshold=0.5"))]
    assert tested[0].training_digest == tested[1].training_digest
    assert tested[0].digest != tested[1].digest


# digests of the training and test files of the recorded runs, as the grids' scripts make them
CONTENTS = {
    "data/machine/machine_train.json": "88ae15315656e7a7",
    "data/machine/machine_test.json": "a2133ad253fa0531",
    "data/machine/model/config.json": "906f320c8b42ab9a",
    "data/machine/layers_4/config.json": "dab4c47e59618506",
    "data/machine/layers_8/config.json": "a4912330258c1a33",
    "data/machine/untied/config.json": "d48f53cd392e22e3",
    "data/breadth/path_train.json": "cd4f3f7b13794f10",
    "data/breadth/path_test.json": "6cf36ac5eb1403d9",
    "data/breadth/five_train.json": "cf1b327d484b2f74",
    "data/breadth/five_test.json": "5dedb809cc0334da",
    "data/breadth/answer_train.json": "a4618ff53fdc46ce",
    "data/breadth/frontier_train.json": "4be79a538d94b64c",
    "data/breadth/model/config.json": "0a8f83abcd87b064",
    "data/breadth/layers_4/config.json": "ca1a3ed9b99e9477",
    "data/breadth_f1/path_train.json": "98fc01b4d9a2f9b1",
    "data/breadth_f1/path_test.json": "91330f72676d45eb",
    "data/breadth_f1/model/config.json": "f7473f5cbf7fb0d1",
    "data/breadth_26/path_train.json": "052a46e43ddca595",
    "data/breadth_26/path_test.json": "451390122b7dfae3",
    "data/breadth_26/model/config.json": "a955122712dc442e",
    "data/breadth_f3/path_train.json": "6d8401da60bec91a",
    "data/breadth_f3/path_test.json": "75aaa801e0dbf886",
    "data/breadth_f3/model/config.json": "a955122712dc442e",
    "data/longer/machine_train.json": "99a8cb6ffcade188",
    "data/longer/machine_test.json": "260f5a889bf1d93c",
    "data/longer/model/config.json": "906f320c8b42ab9a",
    "data/longer/gpt2/config.json": "15bb2188f7c99eb8",
    "data/mirrored2/chains_train.json": "4e2d807a988b1365",
    "data/mirrored2/mirror_train.json": "f32e5fee5b608363",
    "data/mirrored2/mirror_test.json": "87b4d1bea2090477",
    "data/mirrored2/model/config.json": "64834589d2573758",
    "data/mirrored3/chains_train.json": "7e724f9d17add5ad",
    "data/mirrored3/mirror_train.json": "ea44a98ad7e8ff65",
    "data/mirrored3/mirror_test.json": "9f11d329344919c0",
    "data/mirrored3/model/config.json": "64834589d2573758",
}


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_result_counts_as_finished(name, monkeypatch):
    """A renamed key or method, or a moved file of args/, would make the grids run again."""
    monkeypatch.setattr(jobs, "_content_digest", lambda path: CONTENTS[path])
    results = read_json(ROOT / "results" / f"{name}.json")
    recorded = {(run, row["seed"]): row["digest"] for run, rows in results.items() for row in rows}
    seeds = sorted({seed for _, seed in recorded})
    found = jobs_of(read_grid(ROOT / "experiments" / f"{name}.yaml"), None, seeds, ())
    assert recorded.items() <= {(job.run, job.seed): job.digest for job in found}.items()


def test_an_array_has_a_task_for_each_beginning_and_seed(inputs, tmp_path):
    script = tmp_path / "new" / "small.sbatch"
    arguments = [str(inputs / "small.yaml"), "--slurm", str(script), "--gpus", "4"]
    assert grid.main([*arguments, "--set", f"save_path={tmp_path}"]) == 0
    text = script.read_text()
    for line in ("#SBATCH --array=0-2", "#SBATCH --gpus-per-node=4", '    "--only coconut --seeds 4"'):
        assert f"\n{line}\n" in text
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert f'"${{chosen[@]}}" --set save_path={tmp_path} ' in text


def test_an_array_has_only_unfinished_runs(small, tmp_path, capsys):
    """The array ran recorded results again and ignored --set."""
    small.run("--only", "pause")
    (tmp_path / "runs").rename(tmp_path / "gone")
    small.run("--slurm", str(tmp_path / "a.sbatch"))
    assert "pause" not in (tmp_path / "a.sbatch").read_text().partition("tasks=(")[2].partition(")")[0]
    small.run("--only", "pause", "--slurm", str(tmp_path / "b.sbatch"))
    assert "nothing is left to run" in capsys.readouterr().out
    assert not (tmp_path / "b.sbatch").exists()


def test_the_report_has_the_accuracy_of_shortcuts(inputs, tmp_path):
    settings = prosqa.Settings(min_hops=1, max_hops=2, nodes_a_side=4, characters="abcdefgh")
    (tmp_path / "graphs.json").write_text(json.dumps(prosqa.make_splits({"test": 20}, settings, 0)["test"]))
    found = dataclasses.replace(read_grid(inputs / "small.yaml"), test_path=str(tmp_path / "graphs.json"))
    line = tables.shortcut_accuracies(found)[0]
    assert line.startswith("Accuracy of shortcuts for 1 / 2 steps: chance 50 / 50, in-degree")
    assert tables.shortcut_accuracies(read_grid(inputs / "small.yaml")) == []
