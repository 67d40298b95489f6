"""The machine's examples follow its permutations, and no word of a split is another's."""

import json
import re

import machine
import pytest
from files import UserError, load_examples
from hypothesis import given, settings
from hypothesis import strategies as st

SMALL = ["--train", "400", "--valid", "20", "--test", "40"]


def words(examples: list[dict]) -> set[str]:
    return {example["question"][1:] for example in examples}


def everything(splits: dict) -> list[dict]:
    return [example for examples in splits.values() for example in examples]


@settings(max_examples=30, deadline=None)
@given(
    n_states=st.integers(2, 26),
    n_buttons=st.integers(4, 26),
    min_steps=st.integers(2, 4),
    longer=st.integers(0, 12),
    seed=st.integers(0, 2**32),
)
def test_steps_follow_the_permutations_and_splits_share_no_word(n_states, n_buttons, min_steps, longer, seed):
    sizes = {"train": 16, "valid": 2, "test": 4}
    splits, permutations, _ = machine.make_splits(sizes, n_states, n_buttons, min_steps, min_steps + longer, seed)
    states = set(machine.STATES[:n_states])
    assert set(permutations) == set(machine.BUTTONS[:n_buttons])
    assert all(set(one) == set(one.values()) == states for one in permutations.values())
    assert {name: len(examples) for name, examples in splits.items()} == sizes
    for example in everything(splits):
        state, *word = example["question"]
        assert state in states
        assert min_steps <= len(word) <= min_steps + longer
        for button, step in zip(word, example["steps"], strict=True):
            state = permutations[button][state]
            assert step == state
        assert example["answer"] == state
    assert len({example["question"] for example in everything(splits)}) == sum(sizes.values())
    assert not words(splits["train"]) & words(splits["test"])
    assert not words(splits["train"]) & words(splits["valid"])
    assert not words(splits["valid"]) & words(splits["test"])


def test_files_follow_from_the_seed_and_hold_the_machine(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert machine.main(["--out", str(tmp_path / name), *SMALL, "--seed", str(seed)]) == 0
    names = [f"machine_{name}.json" for name in ("train", "valid", "test", "machine")]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(names)
    for name in names:
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b
        assert a != c
    held = json.loads((tmp_path / "a" / "machine_machine.json").read_text())
    for example in load_examples(tmp_path / "a" / "machine_test.json"):
        start, *word = example["question"]
        assert example == machine.make_example(held["permutations"], start, "".join(word))
    assert held["states"] == list(machine.STATES)
    assert held["buttons"] == list(machine.BUTTONS)


def test_longer_words_can_be_asked_of_the_same_machine():
    _, permutations, _ = machine.make_splits({"train": 10, "test": 5}, 7, 5, seed=3)
    splits, again, _ = machine.make_splits({"train": 1, "test": 90}, 7, 5, min_steps=40, max_steps=40, seed=3)
    assert again == permutations
    assert {len(example["steps"]) for example in splits["test"]} == {40}


def test_lengths_are_uniform_until_the_short_ones_run_out():
    splits, *_ = machine.make_splits({"train": 3000, "test": 100}, seed=0)
    counts = [sum(len(example["steps"]) == n for example in splits["train"]) for n in (3, 4, 5)]
    assert all(900 < count < 1100 for count in counts)
    splits, *_ = machine.make_splits({"train": 3000, "test": 300}, 4, 5, 2, 5, seed=0)  # 100, 500, 2,500, 12,500
    counts = [sum(len(example["steps"]) == n for example in splits["train"]) for n in (2, 3, 4, 5)]
    assert counts[0] == (25 - 2) * 4  # all that train has
    assert counts[0] < counts[1] < counts[2]
    assert {len(example["steps"]) for example in splits["test"]} == {2, 3, 4, 5}


def test_words_are_shared_out_loud_where_they_are_few(tmp_path, capsys):
    arguments = ["--states", "5", "--buttons", "3", "--min-steps", "1", "--max-steps", "3", "--prefix", "few"]
    sizes = ["--train", "80", "--valid", "5", "--test", "10"]
    assert machine.main(["--out", str(tmp_path), *arguments, *sizes]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^steps (\d): too few words to hold any out", out, re.M) == ["1", "2"]
    splits = [load_examples(tmp_path / f"few_{name}.json") for name in ("train", "valid", "test")]
    questions = [example["question"] for examples in splits for example in examples]
    assert len(set(questions)) == 95
    longest = [{word for word in words(examples) if len(word) == 3} for examples in splits]
    assert not longest[0] & (longest[1] | longest[2])


def test_nearly_all_questions_can_be_asked():
    splits, *_ = machine.make_splits({"train": 1500, "valid": 60, "test": 120}, 4, 5, 2, 4, seed=5)
    assert len({example["question"] for example in everything(splits)}) == 1680  # of 3,100
    splits, *_ = machine.make_splits({"train": 2800, "valid": 60, "test": 120}, 4, 5, 2, 4, seed=5)
    assert not words(splits["train"]) & words(splits["test"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["--states", "27"], "27 states and 26 buttons cannot be named"),
        (["--states", "1"], "1 states and 26 buttons cannot be named"),
        (["--buttons", "0"], "26 states and 0 buttons cannot be named"),
        (["--min-steps", "0"], "words of 0 to 5 buttons cannot be"),
        (["--min-steps", "6"], "words of 6 to 5 buttons cannot be"),
        (
            ["--states", "2", "--buttons", "2"],
            "train: 400 examples are more than its 10. of the 112 questions that 2 states, 2 buttons and 3 to 5 steps",
        ),
    ],
)
def test_a_machine_that_cannot_be_made_is_one_sentence(tmp_path, changes, complaint, capsys):
    assert machine.main(["--out", str(tmp_path / "new"), *SMALL, *changes]) == 2
    error = capsys.readouterr().err
    assert re.search(f"^error: {complaint}", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_division_leaves_something_to_train():
    with pytest.raises(UserError, match="train: 1 examples are more than its 0 of the 20 questions"):
        machine.make_splits({"train": 1, "valid": 1, "test": 1000}, 2, 10, 1, 1)
