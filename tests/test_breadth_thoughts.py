"""experiments/breadth_thoughts.py, on a model that has hardly been trained."""

import json

import breadth_thoughts as script
import machine
import pytest
import tiny_model
import torch
import yaml
from conftest import ROOT

import run
from config import Config


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


@pytest.fixture
def subject(task) -> script.Subject:
    return script.Subject.load(str(task / "last-0"), script.read_data(task)[0])


@pytest.fixture
def replacements(task, subject) -> dict[str, script.Replacement]:
    _, machine_of = script.read_data(task)
    words = map(script.word_of, subject.examples)
    return script.replacements(subject, [script.frontiers_of(machine_of["permutations"], *word) for word in words])


def test_auc():
    values, inside = torch.tensor([0.4, 0.1, 0.3, 0.1]), torch.tensor([True, True, False, False])
    assert script.auc(values[inside], values[~inside]) == (1 + 1 + 0 + 0.5) / 4


def test_checkpoints_of_one_name_are_kept_apart(monkeypatch, task, tmp_path):
    monkeypatch.setattr(script, "measure", lambda run, _: run)
    monkeypatch.setattr(script, "as_text", lambda found: "")
    runs = ["a/checkpoint_1", "b/checkpoint_1"]
    assert script.main([*runs, "--data", str(task), "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "breadth_thoughts.json").read_text())["runs"] == {run: run for run in runs}


def test_the_report_has_all_measurements(task, tmp_path, capsys):
    assert script.main([str(task / "last-0"), "--data", str(task), "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "breadth_thoughts.json").read_text())
    assert all([*of] == ["2", "3", "all"] for of in content["rules"].values())
    found = content["runs"]["last-0"]
    assert [one["thought"] for one in found["read off"]] == [1, 2, 3]
    assert [one["questions"] for one in found["read off"]][:2] == [20, 20]
    assert sum(one["questions"] for one in found["by size"].values()) == 20
    names = ["likeliest token", "mean token", "mean of the frontier"]
    names += [*(f"{name}, as long as the thought" for name in names), "the thought, as long as a token"]
    names += ["the thoughts of another question"]
    assert list(found["replaced"]) == names
    assert all(0 <= value <= 1 for value in found["replaced"].values())
    assert {*found["superposed"]["own"]} == {*found["superposed"]["other"]} == {"its own", "the other's", "the mean"}
    text = (tmp_path / "breadth_thoughts.md").read_text()
    assert "\n| last-0 |" in text
    assert text in capsys.readouterr().out


def test_the_likeliest_token_is_what_the_thought_token_feeds_back(subject, replacements):
    """Replacing each thought before the next one is made gives the model with `thought: token`."""
    outputs = subject.outputs(change=replacements["likeliest token"])
    from methods.thoughts import Token

    subject.model.thought = Token(subject.model.base_causallm)
    assert subject.outputs() == outputs


def test_replacements_have_the_norms_that_their_names_say(subject, replacements):
    checked = []

    def check(number, thought, seen):
        made = {name: edit.make(slice(0, len(thought)), number, thought, seen) for name, edit in replacements.items()}
        token = made["likeliest token"]
        for name, content in made.items():
            if name.endswith("as long as the thought"):
                assert torch.allclose(content.norm(dim=-1), thought.norm(dim=-1), rtol=1e-5)
                short = made[name.removesuffix(", as long as the thought")]
                assert torch.cosine_similarity(content, short, dim=-1).min() > 0.9999
        own = made["the thought, as long as a token"]
        assert torch.allclose(own.norm(dim=-1), token.norm(dim=-1), rtol=1e-5)
        assert torch.cosine_similarity(own, thought, dim=-1).min() > 0.9999
        checked.append(number)
        return thought

    _, inputs = next(iter(subject.batches()))
    with torch.no_grad():
        subject.model(**inputs, edit=check)
    assert checked == [0, 1, 2]


def test_a_donor_is_another_question_of_the_same_length(subject):
    lengths = [2, 3, 3, 2, 3, 4]
    donors = script.donors_of(lengths)
    assert sorted(donors) == [0, 1, 2, 3, 4, 5]
    assert [lengths[donor] for donor in donors] == lengths
    assert [index for index, donor in enumerate(donors) if index == donor] == [5]  # the only one with four buttons
    frontiers = [[""] * len(one["steps"]) for one in subject.examples]
    edit, seen = script.replacements(subject, frontiers)["the thoughts of another question"].of(slice(3, 5)), []
    _, inputs = next(subject.batches(size=5))
    inputs = {name: value[3:5] for name, value in inputs.items()}
    subject.model.generate(**inputs, max_new_tokens=1, edit=lambda *seen_: seen.append(edit(*seen_)) or seen[-1])
    wanted = subject.thoughts()[script.donors_of([len(found) for found in frontiers])[3:5]]
    assert torch.equal(torch.cat(seen, dim=1), wanted)


def test_rules_on_a_small_machine():
    """Button a leads from each state to the two others, b swaps X and Y."""
    permutations = {"a": {"X": "YZ", "Y": "XZ", "Z": "XY"}, "b": {"X": "YY", "Y": "XX", "Z": "ZZ"}}
    one, two = {"question": "XaXY", "answer": "Y"}, {"question": "XabYX", "answer": "X"}
    assert script.by_rules([one, two], permutations) == {
        "one path": {"1": 0.75, "2": 0.75, "all": 0.75},  # two: X, then Y or Z, then X or Z
        "one path, both last states": {"1": 1.0, "2": 0.75, "all": 0.875},
        "any start": {"1": 0.5, "2": 0.5, "all": 0.5},  # both candidates are reached from two starts
        "any order": {"1": 1.0, "2": 1.0, "all": 1.0},  # ba: X, then Y, then X or Z
    }


def test_a_missing_run_is_one_sentence(tmp_path, task, capsys):
    assert script.main([str(tmp_path / "none"), "--data", str(task), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
