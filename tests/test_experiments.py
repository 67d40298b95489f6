"""Grids of runs: what is refused, what is run and in which order, what the report says."""

import json
import sys

import arithmetic
import pytest
import tiny_model
import yaml
from conftest import ROOT, load_script

import run
from config import Config

sys.path.insert(0, str(ROOT / "experiments"))
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
        "control": "pause",
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

    def in_process(command, log):
        commands.append(command)
        log.touch()
        return run.main(Config.from_file(command[2], command[3:]))

    monkeypatch.setattr(grid, "start", in_process)
    return commands


def name_of(command: list[str]) -> str:
    name = next(text for text in command if text.startswith("name=")).removeprefix("name=")
    return name + (" test" if "only_eval=true" in command else "")


def test_a_grid_is_run_once_and_reported(place, started, capsys):
    arguments = [str(place / "small.yaml"), "--jobs", "1", "--out", str(place / "results")]
    assert grid.main([*arguments, "--only", "pause"]) == 0
    assert grid.main(arguments) == 0
    names = [name_of(command) for command in started]
    assert names[:2] == ["pause-3", "pause-3 test"]
    assert names[2:5] == ["words-3", "coconut-3", "coconut-3 test"]
    assert names[5:] == ["words-4", "coconut-4", "coconut-4 test"]
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
    assert len(found["pause"][0]["correct"]) == 6
    assert (place / "results" / "small.png").stat().st_size > 1000
    capsys.readouterr()
    assert grid.main([*arguments, "--dry-run"]) == 0
    assert "0 of 5 runs are left" in capsys.readouterr().out
    assert grid.main([*arguments, "--set", "lr=0.5"]) == 2
    complaint = capsys.readouterr().err
    assert f"{place / 'runs' / 'pause-3'} holds another run (lr 0.0001, not 0.5); move it away" in complaint


def test_what_is_left_is_counted(place, tmp_path, capsys):
    content = yaml.safe_load((place / "small.yaml").read_text()) | {"save_path": str(tmp_path / "runs")}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert grid.main([str(tmp_path / "small.yaml"), "--dry-run", "--seeds", "4"]) == 0
    printed = capsys.readouterr().out
    assert "# coconut-4: 1 epochs" in printed
    examples = json.loads((place / "train.json").read_text())
    # stage 1 of 1: question, newline, start, latent, end, then all steps but one, the answer and EOS
    expected = sum(
        len(e["question"]) + 1 + 3 + sum(1 + len(tokens(step)) for step in e["steps"][1:]) + 3 + 1 for e in examples
    )
    line = next(line for line in printed.splitlines() if line.startswith("# coconut-4"))
    assert f" {expected} tokens" in line


def tokens(step: str) -> str:
    """With a character for each of the two brackets, which are a token each."""
    return step.replace("<<", "(").replace(">>", ")")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"runs": {"coconut": {"begins_with": "nobody"}}}, "begins with 'nobody', but there is no such beginning"),
        ({"seds": [1]}, "unknown key 'seds': did you mean 'seeds'?"),
        ({"runs": {"coconut": {"key": {}}}}, "coconut: unknown key 'key': did you mean 'keys'?"),
        ({"control": "nobody"}, "control 'nobody' is no run of the grid"),
        ({"base": "none.yaml"}, "none.yaml: No such file"),
    ],
)
def test_what_is_wrong_with_a_grid_is_one_sentence(place, tmp_path, change, complaint, capsys):
    content = yaml.safe_load((place / "small.yaml").read_text()) | change
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
    assert grid.main([str(tmp_path / "bad.yaml"), "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert complaint in printed


def test_an_unknown_run_is_named(place, capsys):
    assert grid.main([str(place / "small.yaml"), "--only", "nobody"]) == 2
    assert "small has no run nobody; there are pause, coconut" in capsys.readouterr().err


def test_a_run_that_fails_is_said_and_the_others_go_on(place, tmp_path, monkeypatch, capsys):
    codes = iter([1, 0, 0])

    def fails(_, log):
        log.write_text("error: no\n")
        return next(codes)

    monkeypatch.setattr(grid, "start", fails)
    content = yaml.safe_load((place / "small.yaml").read_text()) | {"save_path": str(tmp_path / "runs")}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert grid.main([str(tmp_path / "small.yaml"), "--jobs", "1", "--seeds", "3", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "pause-3 failed with exit code 1: error: no (see " in printed
    assert "words-3 was stopped" in printed
    assert next(codes, None) == 0  # what begins with a run that failed is not tried


def test_differences_are_paired_by_question():
    mine = [{"seed": 0, "correct": "1110"}, {"seed": 1, "correct": "1100"}, {"seed": 2, "correct": "0000"}]
    control = [{"seed": 0, "correct": "0010"}, {"seed": 1, "correct": "0000"}]
    mean, low, high = tables.difference(mine, control)
    assert mean == 0.5
    assert 0 <= low < mean < high <= 1
    same = tables.difference(control, control)
    assert same == (0, 0, 0)
    assert tables.difference(mine[2:], control) is None
