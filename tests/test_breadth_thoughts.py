"""experiments/breadth_thoughts.py, on a model that has hardly been trained."""

import json
import sys

import machine
import pytest
import tiny_model
import torch
import yaml
from conftest import ROOT, load_script

import run
from config import Config

sys.path.insert(0, str(ROOT / "experiments"))
script = load_script(ROOT / "experiments" / "breadth_thoughts.py")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("breadth")
    sizes = ["--train", "32", "--valid", "8", "--test", "20", "--out", str(folder), "--prefix", "path"]
    machine_options = ["--states", "12", "--buttons", "6", "--fan-out", "2", "--min-steps", "2", "--max-steps", "3"]
    assert machine.main([*sizes, *machine_options]) == 0
    tiny_model.write_model([folder / "path_train.json"], folder / "model", "char", "llama", 16, 1, 2, 64)
    keys = {"extends": str(ROOT / "args/breadth.yaml"), "model_id": str(folder / "model"), "save_path": str(folder)}
    keys |= {"train_path": str(folder / "path_train.json"), "val_path": str(folder / "path_valid.json")}
    keys |= {"num_epochs": 1, "epochs_per_stage": 1, "max_latent_stage": 3, "curriculum": "none", "uniform_prob": 0}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(keys | {"batch_size_training": 8, "global_batch_size": 8}))
    assert run.main(Config.from_file(str(folder / "tiny.yaml"), ["name=last-0"])) == 0
    return folder


def test_auc():
    values, inside = torch.tensor([0.4, 0.1, 0.3, 0.1]), torch.tensor([True, True, False, False])
    assert script.auc(values[inside], values[~inside]) == (1 + 1 + 0 + 0.5) / 4


def test_the_report_has_all_measurements(task, tmp_path, capsys):
    assert script.main([str(task / "last-0"), "--data", str(task), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "breadth_thoughts.json").read_text())["last-0"]
    assert [one["thought"] for one in found["read off"]] == [1, 2, 3]
    assert [one["questions"] for one in found["read off"]][:2] == [20, 20]
    assert sum(one["questions"] for one in found["by size"].values()) == 20
    assert set(found["replaced"]) == {"likeliest token", "mean token", "mean of the frontier"}
    assert all(0 <= value <= 1 for value in found["replaced"].values())
    assert {*found["superposed"]["own"]} == {*found["superposed"]["other"]} == {"its own", "the other's", "the mean"}
    text = (tmp_path / "breadth_thoughts.md").read_text()
    assert "\n| last-0 |" in text
    assert text in capsys.readouterr().out


def test_the_likeliest_token_is_what_the_thought_token_feeds_back(task):
    """Replacing each thought before the next one is made gives the model with `thought: token`."""
    examples = json.loads((task / "path_test.json").read_text())
    subject = script.Subject.load(str(task / "last-0"), examples)
    machine_of = json.loads((task / "path_machine.json").read_text())
    frontiers = [script.frontiers_of(machine_of["permutations"], *script.word_of(one)) for one in examples]
    rounded = script.replacements(subject, frontiers)["likeliest token"]
    outputs = subject.outputs(change=rounded)
    from methods.thoughts import Token

    subject.model.thought = Token(subject.model.base_causallm)
    assert subject.outputs() == outputs


def test_a_missing_run_is_one_sentence(tmp_path, task, capsys):
    assert script.main([str(tmp_path / "none"), "--data", str(task), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
