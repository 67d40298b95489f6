"""Grids of runs: what is refused, what is run and in which order, what the report says."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import arithmetic
import prosqa
import pytest
import tiny_model
import torch
import yaml
from conftest import ROOT, load_script
from test_table1 import ROWS
from transformers import AutoConfig, AutoModelForCausalLM

import run
from config import Config
from trainer.logger import read_log
from trainer.run_folder import notes_of
from utils import UserError

sys.path.insert(0, str(ROOT / "experiments"))
import jobs
from grid_file import read_grid
from jobs import jobs_of

grid = load_script(ROOT / "experiments" / "grid.py")
tables = load_script(ROOT / "experiments" / "tables.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small grid: a control, and a run that begins with another's weights."""
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
    """What is started, in this process instead of others."""
    commands = []

    def in_process(command, log, _):
        commands.append(command)
        log.touch()
        return run.main(Config.from_file(command[2], command[3:]))

    monkeypatch.setattr(grid, "start", in_process)
    return commands


def names_of(commands: list[list[str]]) -> list[str]:
    """The runs that are started, trained or tested."""
    names = (next(text for text in command if text.startswith("name=")).removeprefix("name=") for command in commands)
    return [name + " test" * ("only_eval=true" in command) for name, command in zip(names, commands, strict=True)]


@pytest.fixture
def small(place, tmp_path):
    """small(key=value): the arguments of the small grid with other keys, whose runs and results are in tmp_path."""

    def arguments(**changed) -> list[str]:
        content = yaml.safe_load((place / "small.yaml").read_text()) | {"save_path": str(tmp_path / "runs")} | changed
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return [str(tmp_path / "small.yaml"), "--jobs", "1", "--out", str(tmp_path)]

    return arguments


def remembered(folder) -> dict[str, list[dict]]:
    return json.loads((folder / "small.json").read_text())


def test_a_grid_is_run_once_and_reported(place, started, capsys):
    arguments = [str(place / "small.yaml"), "--jobs", "1", "--out", str(place / "results")]
    assert grid.main([*arguments, "--only", "pause"]) == 0
    assert grid.main(arguments) == 0
    names = ["pause-3", "pause-3 test", "words-3", "coconut-3", "coconut-3 test"]
    assert names_of(started) == [*names, "words-4", "coconut-4", "coconut-4 test"]
    assert f"load_model_path={place / 'runs' / 'words-3'}" in started[3]
    assert "resume=1" in started[3]
    assert grid.main(arguments) == 0
    assert len(started) == 8  # nothing is repeated
    text = (place / "results" / "small.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert list(rows) == ["run", "pause", "Coconut"]
    assert "| 97.0 |" in rows["Coconut"]
    assert "Nothing is learnt." in text
    found = json.loads((place / "results" / "small.json").read_text())
    assert [row["seed"] for row in found["coconut"]] == [3, 4]
    assert [record["epoch"] for record in found["coconut"][0]["epochs"]] == [0, 1]  # the beginning's too
    made_by = found["coconut"][0]["made_by"]
    notes = notes_of((place / "runs" / "coconut-3" / "config.yaml").read_text())
    assert notes["git commit"].startswith(made_by["commit"][:7])
    assert made_by["hardware"] == notes["hardware"]
    assert text.splitlines()[-1].startswith(f"Made by commit {made_by['commit']}; python ")
    assert len(found["pause"][0]["correct"]) == 6
    assert (place / "results" / "small.png").stat().st_size > 1000
    capsys.readouterr()
    assert grid.main([*arguments, "--dry-run"]) == 0
    assert "0 of 5 runs are left" in capsys.readouterr().out
    assert grid.main([*arguments, "--set", "lr=0.5"]) == 2
    complaint = capsys.readouterr().err
    assert f"{place / 'runs' / 'pause-3'} holds another run (lr 0.0001, not 0.5); move it away" in complaint


def test_what_is_left_is_counted(place, small, capsys):
    assert grid.main([*small(), "--dry-run", "--seeds", "4"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("# coconut-4: 1 epochs"))
    # stage 1 of 1: question, newline, start, latent, end, then all steps but one, the answer and EOS; of the step's
    # brackets '<<' and '>>' are a token each
    examples = json.loads((place / "train.json").read_text())
    expected = sum(len(e["question"]) + 1 + 3 + sum(1 + len(s) - 2 for s in e["steps"][1:]) + 3 + 1 for e in examples)
    assert f" {expected} tokens" in line


def test_a_plan_has_hours_of_its_arithmetic_and_gpus_evaluations_and_disk(place, small, tmp_path, capsys, monkeypatch):
    """Float32 files were planned with the bfloat16 peak, --gpus changed nothing, evaluations cost nothing."""
    grid_alone, *_ = small()

    def plan(*options: str) -> tuple[float, float, float, int, str]:
        """FLOPs and GB of the run, GPU hours, GPUs, the last line."""
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
    weights = (place / "model" / "model.safetensors").stat().st_size / 1e9
    assert disk == pytest.approx((2 + 2 + 4 * 2) * weights, rel=0.1)
    assert plan("--set", "bf16=true")[-1].endswith("9.89e+14 FLOP/s (bf16)")
    assert plan("--set", "tf32=true")[-1].endswith("4.94e+14 FLOP/s (tf32)")
    assert plan("--gpus", "2", "--jobs", "3")[3] == 6
    assert plan("--peak", "1e12")[-1].endswith("1e+12 FLOP/s (float32)")
    # 16 examples twice, 4 in two validations, 6 in the test: 3 * 32 passes and 2 * 14; with 2 in each, 3 * 32 and 2 * 6
    assert plan("--set", "max_eval_examples=2")[0] < 0.9 * flops
    free = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert grid.main([grid_alone, "--dry-run"]) == 0
    assert f"warning: {tmp_path / 'runs'} has 1e-06 GB free: see keep_checkpoints\n" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--dry-run", "--report"])
def test_a_full_output_is_one_sentence(small, tmp_path, capsys, monkeypatch, option):
    """OSError's traceback."""
    needs = {"needs": {str(tmp_path / "x.json"): "preprocessing/x.py"}} if option == "--dry-run" else {}
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert grid.main([*small(**needs), option, "--seeds", "3"]) == 2
    assert capsys.readouterr().err == "error: standard output cannot be written: No space left on device\n"


def complaint_of(arguments: list[str], capsys) -> str:
    """The one sentence that is printed instead of a grid."""
    assert grid.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"runs": {"coconut": {"begins_with": "nobody"}}}, "begins with 'nobody', but there is no such beginning"),
        ({"seds": [1]}, "unknown key 'seds': did you mean 'seeds'?"),
        ({"runs": {"coconut": {"key": {}}}}, "coconut: unknown key 'key': did you mean 'keys'?"),
        ({"controls": ["nobody"]}, "control 'nobody' is no run of the grid"),
        ({"base": "none.yaml"}, "none.yaml: No such file"),
        ({"runs": ["coconut"]}, "'runs' must be `key: value` lines, not [coconut]"),
        ({"seeds": 3}, "'seeds' must be a list of whole numbers, not '3'"),
        ({"seeds": ["a"]}, "'seeds' must be a list of whole numbers, not [a]"),
        ({"controls": "pause"}, "'controls' must be a list of texts, not 'pause'"),
        ({"runs": {"coconut": {"paper": [97.0]}}}, "coconut: 'paper' must be text, not [97.0]"),
        ({"runs": {"coconut": {"keys": None}}}, "coconut: 'keys' must be `key: value` lines, not 'null'"),
        ({"runs": {"coconut": {"keys": {"seed": 7, "name": "x"}}}}, "run 'coconut' cannot set name and seed"),
        ({"runs": {"+": {}}, "controls": []}, "run '+': a name is letters, digits"),
        ({"runs": {"a b": {}}, "controls": []}, "run 'a b': a name is letters, digits"),
        ({"beginnings": {"pause": {}}}, "'pause' is both a run and a beginning"),
        ({"needs": {"x": [3]}}, "'needs' takes FILE: the script, with its arguments, that makes it; not 'x': ['3']"),
        ({"checkpoint": "first"}, "'checkpoint' must be newest or best, not 'first'"),
        ({"runs": {"pause": {"keys": {"lrr": 3}}}}, "run 'pause' of grid small: "),
        ({"runs": {"pause": {"keys": {"train_path": None}}}}, "lacks train_path"),
    ],
)
def test_what_is_wrong_with_a_grid_is_one_sentence(small, change, complaint, capsys):
    assert complaint in complaint_of(small(**change), capsys)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seeds: [5]", "the key 'seeds' is set twice, in lines"),
        ("title: [", "is not valid YAML: while parsing"),
    ],
)
def test_what_yaml_makes_of_a_grid_is_one_sentence(place, tmp_path, text, complaint, capsys):
    """The last of two keys won without a word; what is no YAML was a traceback."""
    lines = (place / "small.yaml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("title") or "title" not in text]
    (tmp_path / "bad.yaml").write_text("\n".join([*kept, text]))
    assert complaint in complaint_of([str(tmp_path / "bad.yaml"), "--out", str(tmp_path)], capsys)


def test_nothing_is_made_for_a_grid_with_mistakes(small, tmp_path, capsys):
    """The data were made first, which takes minutes."""
    changed = {"needs": {str(tmp_path / "file"): "preprocessing/machine.py"}, "runs": {"pause": {"keys": {"lrr": 3}}}}
    assert grid.main(small(**changed)) == 2
    assert "making" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        # the plan was printed, and the runs failed
        (
            ["--dry-run", "--gpus", "3", "--set", "global_batch_size=16"],
            "global_batch_size 16 is no multiple of 3 ranks",
        ),
        (["--only", "nobody"], "small has no run nobody; there are pause, coconut"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(small, options, complaint, capsys):
    assert grid.main([*small(), *options]) == 2
    assert complaint in capsys.readouterr().err


def test_paths_of_a_grid_have_their_home_and_variables_replaced(small, tmp_path, monkeypatch):
    """The same, of a grid's own paths."""
    monkeypatch.setenv("HOME", str(tmp_path))
    read = read_grid(Path(small(save_path="~/runs", test_path="$HOME/t.json")[0]))
    assert (read.save_path, read.test_path) == (f"{tmp_path}/runs", f"{tmp_path}/t.json")


def test_a_run_that_fails_is_said_and_the_others_go_on(small, monkeypatch, capsys):
    codes = iter([1, 0, 0])

    def fails(_, log, __):
        log.write_text("error: no\n")
        return next(codes)

    monkeypatch.setattr(grid, "start", fails)
    assert grid.main([*small(), "--seeds", "3"]) == 2
    printed = capsys.readouterr().err
    assert "pause-3 failed with exit code 1: error: no (see " in printed
    assert "words-3 was stopped" in printed
    assert next(codes, None) == 0  # what begins with a run that failed is not tried


def test_no_place_stands_empty_for_a_run_that_waits_for_its_beginning(small, monkeypatch, capsys):
    """With two places the second was held by coconut-3 while words-3 was trained, though words-4 could begin."""
    words_4_began, order = threading.Event(), []

    def begins(command, log, _):
        log.touch()
        order.extend(names_of([command]))
        if order[-1] == "words-4":
            words_4_began.set()
        return 0 if words_4_began.wait(timeout=20) else 1

    monkeypatch.setattr(grid, "start", begins)
    arguments = [*small(), "--only", "coconut", "--seeds", "3", "4", "--jobs", "2"]
    assert grid.main(arguments) == 2  # nothing is trained here, and so nothing that begins with it is tried
    assert "failed with exit code 1" not in capsys.readouterr().err
    assert sorted(order) == ["words-3", "words-4"]


def test_what_a_report_remembers_is_not_run_again(place, small, started, tmp_path, capsys):
    """Without their checkpoints results were trained again, and those of seeds not asked for were lost."""
    first = [str(place / "small.yaml"), "--jobs", "1", "--out", str(tmp_path), "--only", "coconut"]
    assert grid.main([*first, "--seeds", "3", "4"]) == 0
    before = remembered(tmp_path)["coconut"]
    arguments = [*small(), "--only", "coconut", "--seeds", "3"]
    started.clear()
    assert grid.main(arguments) == 0
    assert started == []
    assert remembered(tmp_path)["coconut"] == before
    assert "| seeds |" not in (tmp_path / "small.md").read_text()  # one is shown
    assert grid.main([*arguments, "--set", "lr=0.001"]) == 0  # another run
    assert names_of(started) == ["words-3", "coconut-3", "coconut-3 test"]
    assert grid.main([*arguments, "--set", "lr=0.002", "--dry-run"]) == 0
    (tmp_path / "small.json").write_text("[]")
    capsys.readouterr()
    assert grid.main(arguments) == 2
    assert "small.json cannot be read: it is not a JSON object" in capsys.readouterr().err


def test_no_result_is_lost_with_a_report_of_others(small, started, tmp_path):
    """With --set, --anew or another key, what results/NAME.json remembered of other runs was overwritten."""
    arguments = small(beginnings={}, runs={"pause": {}, "coconut": {}})
    assert grid.main(arguments) == 0
    first = remembered(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert grid.main([*arguments, "--only", "pause", "--anew"]) == 0
    assert remembered(tmp_path)["coconut"] == first["coconut"]
    (tmp_path / "runs").rename(tmp_path / "gone too")
    assert grid.main([*arguments, "--only", "pause", "--set", "lr=0.5"]) == 0
    (other, own) = remembered(tmp_path)["pause"]
    assert other["digest"] != own["digest"] == first["pause"][0]["digest"]
    assert remembered(tmp_path)["coconut"] == first["coconut"]
    assert "| coconut |" not in (tmp_path / "small.md").read_text()  # there is none with lr=0.5
    started.clear()
    (tmp_path / "runs").rename(tmp_path / "gone as well")
    assert grid.main(arguments) == 0
    assert started == []


def test_a_folder_with_other_keys_is_no_result(small, started, tmp_path, capsys):
    """Where another run was asked for, its old result was taken for that of the new keys, and remembered so."""
    assert grid.main([*small(), "--only", "pause"]) == 0
    before = remembered(tmp_path)["pause"]
    keys = {"thought": "pause", "lr": 0.5}
    content = yaml.safe_load((tmp_path / "small.yaml").read_text())
    arguments = small(runs=content["runs"] | {"pause": {"keys": keys}})
    assert grid.main([*arguments, "--only", "coconut", "--seeds", "3"]) == 0
    assert remembered(tmp_path)["pause"] == before
    assert "| pause |" not in (tmp_path / "small.md").read_text()


def test_an_evaluation_is_of_what_is_asked_for_or_done_again(place, small, started, tmp_path):
    """A traceback where it was killed as it wrote, or the test split had been made anew, or was asked for in part; that
    of an earlier checkpoint, or with other keys, was taken for it."""
    questions, evaluation = tmp_path / "test.json", tmp_path / "runs/pause-3/eval"
    predictions, metrics = evaluation / "predictions.jsonl", evaluation / "metrics.json"
    questions.write_text((place / "test.json").read_text())
    arguments = [*small(test_path=str(questions)), "--only", "pause"]
    assert grid.main(arguments) == 0
    for damage in (
        lambda: predictions.write_text(predictions.read_text()[:-20]),  # killed as it wrote
        predictions.unlink,
        lambda: metrics.write_text(metrics.read_text()[:-20]),
        lambda: metrics.write_text(metrics.read_text().replace("checkpoint_2", "checkpoint_1")),
        lambda: questions.write_text(json.dumps(json.loads(questions.read_text())[:4])),
    ):
        damage()
        started.clear()
        assert grid.main([*arguments, "--anew"]) == 0
        assert names_of(started) == ["pause-3 test"]
        assert "resume=0" in started[0]  # the stage is that of the checkpoint, whatever the base file resumes
    for option, count in (("max_new_tokens=1", 4), ("max_eval_examples=2", 2)):
        started.clear()
        assert grid.main([*arguments, "--set", option]) == 0
        assert names_of(started) == ["pause-3 test"]
        assert len(remembered(tmp_path)["pause"][0]["correct"]) == count
    digests = {row["digest"] for row in remembered(tmp_path)["pause"]}
    assert [len(digest) for digest in digests] == [16] * 4  # of six questions and of four, and with either option
    predictions.write_text(predictions.read_text().replace('"output": "', '"output": "\u2028'))  # a line break to some
    (job,) = jobs_of(read_grid(tmp_path / "small.yaml"), ["pause"], [3], ("max_eval_examples=2",))
    assert job.is_done


def test_a_report_says_what_it_was_asked_for(small, started, tmp_path):
    """The table of one seed, or with other keys, stood under the command of all."""
    arguments = [*small(runs={"pause": {"seeds": [3, 4]}}), "--set", "lr=0.5"]
    assert grid.main(arguments) == 0
    assert "experiments/small.yaml --set lr=0.5\n" in (tmp_path / "small.md").read_text()
    assert grid.main([*arguments, "--report", "--seeds", "4"]) == 0
    assert "experiments/small.yaml --seeds 4 --set lr=0.5\n" in (tmp_path / "small.md").read_text()


@pytest.mark.parametrize("what", ["data", "weights"])
def test_a_run_on_other_data_or_weights_is_another(place, small, started, tmp_path, what, capsys):
    """Data were made anew at the same path, and the old weights taken for what was trained on them."""
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "train.json").write_text((place / "train.json").read_text())
    base = yaml.safe_load((place / "base.yaml").read_text())
    base |= {"train_path": str(tmp_path / "train.json"), "model_id": str(tmp_path / "model")}
    if what == "weights":
        shape = AutoConfig.from_pretrained(place / "model")
        AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "model")
        base["from_scratch"] = False
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    arguments = [*small(base=str(tmp_path / "base.yaml")), "--only", "pause"]
    assert grid.main(arguments) == 0
    if what == "weights":
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "model")
    else:
        (tmp_path / "train.json").write_text(json.dumps(json.loads((place / "train.json").read_text())[1:]))
    started.clear()
    assert grid.main(arguments) == 2
    assert "holds another run (trained on other data, or from other weights); move it away" in capsys.readouterr().err
    assert started == []


def test_a_run_can_be_made_longer(small, started, tmp_path):
    """It was refused as another run, or its old evaluation taken for the new one's."""
    arguments = small(beginnings={}, runs={"pause": {}})
    assert grid.main(arguments) == 0
    started.clear()
    assert grid.main([*arguments, "--set", "num_epochs=3"]) == 0
    assert names_of(started) == ["pause-3", "pause-3 test"]
    shutil.rmtree(tmp_path / "runs/pause-3")  # but for what a run leaves that was stopped before its first checkpoint
    (tmp_path / "runs/pause-3").mkdir()
    (tmp_path / "runs/pause-3/grid.json").write_text('{"digest": "of other data"}')
    assert grid.main([*arguments, "--anew"]) == 0


def test_a_run_that_saves_only_what_improves_ends(small, started, tmp_path):
    """Its last epochs left no checkpoint: it was trained again whenever the grid was started."""
    runs = {"pause": {"keys": {"save_only_improve": True, "lr": 0.0, "num_epochs": 4}}}
    arguments = small(runs=runs)
    assert grid.main(arguments) == 0
    assert not (tmp_path / "runs/pause-3/checkpoint_4").exists()
    assert remembered(tmp_path)["pause"][0]["seed"] == 3
    started.clear()
    (tmp_path / "small.json").unlink()
    assert grid.main(arguments) == 0
    assert started == []


def test_the_best_checkpoint_can_be_the_one_that_counts(small, started, tmp_path):
    arguments = small(checkpoint="best")
    assert grid.main([*arguments, "--seeds", "3"]) == 0
    commands = dict(zip(names_of(started), started, strict=True))
    assert f"load_model_path={tmp_path / 'runs/words-3'}@best" in commands["coconut-3"]
    assert f"load_model_path={tmp_path / 'runs/pause-3'}@best" in commands["pause-3 test"]
    started.clear()
    assert grid.main([*arguments, "--seeds", "3", "--anew"]) == 0
    assert started == []


def test_a_beginning_is_not_repeated_for_an_evaluation(small, started, tmp_path):
    arguments = [*small(), "--only", "coconut", "--seeds", "3"]
    assert grid.main(arguments) == 0
    (tmp_path / "runs/words-3").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "runs/coconut-3/eval")
    started.clear()
    assert grid.main([*arguments, "--anew"]) == 0
    assert names_of(started) == ["coconut-3 test"]


def test_results_are_never_half_written(small, started, tmp_path, monkeypatch, capsys):
    """A kill in the middle of writing left a torn file, and all of its results were lost."""
    arguments = [*small(), "--only", "pause"]
    assert grid.main(arguments) == 0
    before = (tmp_path / "small.json").read_text()

    def torn(path, text, **_):
        path.open("w").write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", torn)
    capsys.readouterr()
    assert grid.main([*arguments, "--report"]) == 2
    assert "small.json cannot be written: No space left on device" in capsys.readouterr().err
    assert (tmp_path / "small.json").read_text() == before


def test_keys_of_the_command_line_reach_every_run(place, small, started, tmp_path, capsys):
    """With --set save_path the grid looked for its runs elsewhere, and --set could not mend a file's missing path."""
    base = yaml.safe_load((place / "base.yaml").read_text()) | {"val_path": "YOUR_PATH_TO_VALID"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    arguments = [*small(base=str(tmp_path / "base.yaml")), "--only", "pause"]
    assert grid.main(arguments) == 2
    keys = [f"save_path={tmp_path / 'there'}", f"val_path={place / 'valid.json'}"]
    assert grid.main([*arguments, "--set", *keys]) == 0
    assert (tmp_path / "there/pause-3/eval/metrics.json").is_file()
    assert "| pause |" in (tmp_path / "small.md").read_text()


@pytest.mark.parametrize(
    "options", [["--jobs", "0"], ["--gpus", "0"], ["--peak", "0"], ["--set", "name=a"], ["--set", "lr=1", "seed=2"]]
)
def test_options_that_cannot_be(place, tmp_path, options, capsys):
    with pytest.raises(SystemExit):
        grid.main([str(place / "small.yaml"), "--out", str(tmp_path), *options])
    assert options[0] in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_sentence(small, tmp_path, capsys):
    """A traceback out of the thread of a run."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "logs").write_text("no folder")
    assert grid.main([*small(), "--only", "pause"]) == 2
    assert "pause-3.log cannot be written: " in capsys.readouterr().err


def test_stages_of_tokens_are_not_drawn(place, tmp_path, monkeypatch):
    """iCoT's number of removed tokens was drawn as the stages of all runs."""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    stages = {"coconut": [0, 0, 1], "pause": [8, 16, 1 << 30]}  # as if that were iCoT
    results = {
        run: [{"epochs": [{"epoch": epoch, "stage": stage, "accuracy": 0.5} for epoch, stage in enumerate(of)]}]
        for run, of in stages.items()
    }
    tables.draw(read_grid(place / "small.yaml"), results, {"coconut"}, tmp_path / "a.png")
    tables.draw(read_grid(place / "small.yaml"), {"pause": results["pause"]}, {"coconut"}, tmp_path / "a.png")
    assert [[text.get_text() for text in figure.axes[0].texts] for figure in drawn] == [["stage 1"], []]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_grid_reaches_the_runs_and_starts_nothing_more(place, tmp_path, number):
    """Its runs went on without it, and held their folders against the grid that was started again."""
    content = yaml.safe_load((place / "small.yaml").read_text())
    content |= {"save_path": str(tmp_path / "runs"), "beginnings": {}, "seeds": [3]}
    content["runs"] = {"pause": {"keys": {"num_epochs": 5000}}, "coconut": {}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, str(ROOT / "experiments/grid.py"), str(tmp_path / "small.yaml"), "--jobs", "1"]
    process = subprocess.Popen([*command, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (tmp_path / "runs/pause-3/metrics.jsonl").exists(), process)
    process.send_signal(number)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "stopped by a signal; start the same command again, and it goes on" in printed
    assert "stopped by a signal" in (tmp_path / "runs/logs/pause-3.log").read_text()  # the run's own last line
    assert not (tmp_path / "runs/coconut-3").exists()


def wait_until(happened, process: subprocess.Popen) -> None:
    while not happened():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


def test_runs_at_once_share_what_gpus_there_are(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert grid.shares(4, 1) == ["4", "5", "7", "4"]
    assert grid.shares(2, 2) == ["4,5", "7,4"]
    with pytest.raises(UserError, match="--gpus 4: this machine has 3"):
        grid.shares(1, 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert grid.shares(2, 1) == [None, None]
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5})  # under taskset or srun
    assert grid.shares(None, 1) == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert grid.shares(2, 1) == [None, None]


def test_a_run_on_several_gpus_has_several_ranks(place):
    (job,) = jobs_of(read_grid(place / "small.yaml"), ["pause"], [3], (), n_gpus=2)
    for command in job.commands():
        launcher, script = command[: command.index(str(ROOT / "run.py"))], command[len(job.launcher)]
        assert launcher == ["bash", str(ROOT / "slurm/launch.sh"), "--standalone", "--nproc_per_node", "2"]
        assert script == str(ROOT / "run.py")


@pytest.mark.parametrize("dataset", ["gsm", "prontoqa", "prosqa"])
def test_the_grids_of_the_paper_name_every_row_of_table_1(dataset, place, tmp_path, monkeypatch, capsys):
    """24 rows: those that test_table1.py runs."""
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
        (tmp_path / "data" / f"{dataset}_{part}.json").write_text((place / "test.json").read_text())
    options = ["--gpus", "4", "--slurm", str(tmp_path / "a.sbatch"), "--out", str(tmp_path)]
    assert grid.main([str(path), *options]) == 0, capsys.readouterr().err
    assert 'tasks=(\n    "--only cot ' in (tmp_path / "a.sbatch").read_text()


def test_a_lesson_on_other_data_is_no_part_of_the_curriculum(place, started, tmp_path):
    """What begins with it starts at epoch 0, and its curve too; its minutes count."""
    content = yaml.safe_load((place / "small.yaml").read_text())
    content["save_path"] = str(tmp_path)
    content["beginnings"]["words"]["keys"] |= {"train_path": str(place / "valid.json"), "num_epochs": 3}
    del content["runs"]["pause"], content["controls"]
    content["runs"]["coconut"]["seeds"] = [3]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    assert grid.main([str(tmp_path / "small.yaml"), "--jobs", "1", "--out", str(tmp_path / "results")]) == 0
    assert names_of(started) == ["words-3", "coconut-3", "coconut-3 test"]
    assert "resume=0" in started[1]
    (row,) = json.loads((tmp_path / "results" / "small.json").read_text())["coconut"]
    assert [record["stage"] for record in row["epochs"]] == [0, 1]
    logs = [read_log(tmp_path / name / "metrics.jsonl") for name in ("words-3", "coconut-3")]
    epochs = [record for log in logs for record in log if record["event"] == "epoch"]
    assert len(epochs) == 5
    assert row["seconds"] == pytest.approx(sum(record["train_seconds"] + record["seconds"] for record in epochs))


def test_a_key_that_came_later_leaves_results_as_they_are_until_it_is_used(place):
    """Every recorded run would have counted as another one."""
    of_grid = read_grid(place / "small.yaml")
    digests = [
        jobs_of(of_grid, ["pause"], [3], more)[0].digest
        for more in ((), ("distillation=1.0",), ("distillation=2.0",), ("lr=0.5",))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    known = json.loads((ROOT / "results" / "table1_mini.json").read_text())
    of_grid = read_grid(ROOT / "experiments" / "table1_mini.yaml")
    if Path(of_grid.test_path).is_file():  # its data belong to what is compared
        (job,) = jobs_of(of_grid, ["coconut"], [0], ())
        assert job.digest in {row["digest"] for row in known["coconut"]}


# digests of the files that the recorded runs were trained and tested on, as the grids' scripts make them
CONTENTS = {
    "data/machine/machine_train.json": "88ae15315656e7a7",
    "data/machine/machine_test.json": "a2133ad253fa0531",
    "data/machine/model/config.json": "906f320c8b42ab9a",
    "data/machine/layers_4/config.json": "dab4c47e59618506",
    "data/machine/layers_8/config.json": "a4912330258c1a33",
    "data/machine/untied/config.json": "d48f53cd392e22e3",
    "data/breadth/path_train.json": "cd4f3f7b13794f10",
    "data/breadth/path_test.json": "6cf36ac5eb1403d9",
    "data/breadth/answer_train.json": "a4618ff53fdc46ce",
    "data/breadth/frontier_train.json": "4be79a538d94b64c",
    "data/breadth/model/config.json": "0a8f83abcd87b064",
    "data/mirrored2/chains_train.json": "4e2d807a988b1365",
    "data/mirrored2/mirror_train.json": "f32e5fee5b608363",
    "data/mirrored2/mirror_test.json": "87b4d1bea2090477",
    "data/mirrored2/model/config.json": "64834589d2573758",
    "data/mirrored3/chains_train.json": "7e724f9d17add5ad",
    "data/mirrored3/mirror_train.json": "ea44a98ad7e8ff65",
    "data/mirrored3/mirror_test.json": "9f11d329344919c0",
    "data/mirrored3/model/config.json": "64834589d2573758",
}


@pytest.mark.parametrize(
    "name",
    sorted(
        path.stem for path in (ROOT / "results").glob("*.json") if (ROOT / f"experiments/{path.stem}.yaml").exists()
    ),
)
def test_every_recorded_result_counts_as_done(name, monkeypatch):
    """Renaming a key or a method, or moving a file of args/, would have them run again."""
    monkeypatch.setattr(jobs, "_content", lambda path: CONTENTS[path])
    results = json.loads((ROOT / "results" / f"{name}.json").read_text())
    recorded = {(run, row["seed"]): row["digest"] for run, rows in results.items() for row in rows}
    seeds = sorted({seed for _, seed in recorded})
    found = jobs_of(read_grid(ROOT / "experiments" / f"{name}.yaml"), None, seeds, ())
    assert recorded.items() <= {(job.run, job.seed): job.digest for job in found}.items()


def test_an_array_has_a_task_for_each_seed_of_what_begins_together(place, tmp_path):
    script = tmp_path / "new" / "small.sbatch"
    arguments = [str(place / "small.yaml"), "--slurm", str(script), "--gpus", "4"]
    assert grid.main([*arguments, "--set", f"save_path={tmp_path}"]) == 0
    text = script.read_text()
    for line in ("#SBATCH --array=0-2", "#SBATCH --gpus-per-node=4", '    "--only coconut --seeds 4"'):
        assert f"\n{line}\n" in text
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert f'"${{chosen[@]}}" --set save_path={tmp_path} ' in text


def test_an_array_is_of_what_is_left(small, started, tmp_path, capsys):
    """What results/NAME.json remembers was run again, and --set was forgotten."""
    arguments = small()
    assert grid.main([*arguments, "--only", "pause"]) == 0
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert grid.main([*arguments, "--slurm", str(tmp_path / "a.sbatch")]) == 0
    assert "pause" not in (tmp_path / "a.sbatch").read_text().partition("tasks=(")[2].partition(")")[0]
    assert grid.main([*arguments, "--only", "pause", "--slurm", str(tmp_path / "b.sbatch")]) == 0
    assert "nothing is left to run" in capsys.readouterr().out
    assert not (tmp_path / "b.sbatch").exists()


def test_the_report_says_what_cheap_rules_get(place, tmp_path):
    settings = prosqa.Settings(min_hops=1, max_hops=2, nodes_a_side=4, characters="abcdefgh")
    (tmp_path / "graphs.json").write_text(json.dumps(prosqa.make_splits({"test": 20}, settings, 0)["test"]))
    found = dataclasses.replace(read_grid(place / "small.yaml"), test_path=str(tmp_path / "graphs.json"))
    assert tables.rules(found)[0].startswith("What cheap rules get on them, for 1 / 2 steps: chance 50 / 50, in-degree")
    assert tables.rules(read_grid(place / "small.yaml")) == []
