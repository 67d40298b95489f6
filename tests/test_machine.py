"""preprocessing/machine.py: examples follow the permutations, and splits share no word."""

import hashlib
import json
import re

import machine
import pytest
from conftest import one_error, refuses
from files import UserError, load_examples
from hypothesis import given, settings
from hypothesis import strategies as st

SMALL = ["--train", "400", "--valid", "20", "--test", "40"]


def words(examples: list[dict]) -> set[str]:
    return {example["question"][1:] for example in examples}


def everything(splits: dict) -> list[dict]:
    return [example for examples in splits.values() for example in examples]


def lengths(examples: list[dict]) -> list[int]:
    return [len(example["steps"]) for example in examples]


def share_nothing(*sets: set) -> bool:
    return len(set().union(*sets)) == sum(map(len, sets))


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
    assert share_nothing(*map(words, splits.values()))


def test_files_depend_on_the_seed_only_and_describe_the_machine(tmp_path):
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


def test_the_machine_does_not_depend_on_the_length_of_words():
    _, permutations, _ = machine.make_splits({"train": 10, "test": 5}, 7, 5, seed=3)
    splits, again, _ = machine.make_splits({"train": 1, "test": 90}, 7, 5, min_steps=40, max_steps=40, seed=3)
    assert again == permutations
    assert set(lengths(splits["test"])) == {40}


def test_only_the_test_split_has_longer_words():
    """--test-max-steps equal to --max-steps changes no split."""
    sizes = {"train": 900, "valid": 60, "test": 600}
    plain, *_ = machine.make_splits(sizes, min_steps=1, max_steps=3)
    splits, *_ = machine.make_splits(sizes, min_steps=1, max_steps=3, test_max_steps=5)
    lengths = {name: {len(example["steps"]) for example in examples} for name, examples in splits.items()}
    assert lengths == {"train": {1, 2, 3}, "valid": {1, 2, 3}, "test": {1, 2, 3, 4, 5}}
    assert not words(splits["train"]) & words(splits["test"])
    assert machine.make_splits(sizes, min_steps=1, max_steps=3, test_max_steps=3)[0] == plain
    short = {"min_steps": 1, "max_steps": 3, "test_max_steps": 2}
    refuses("test-max-steps 2 must be at least max-steps 3", machine.make_splits, sizes, **short)


def test_lengths_are_uniform_until_the_short_ones_run_out():
    splits, *_ = machine.make_splits({"train": 3000, "test": 100}, seed=0)
    assert all(900 < lengths(splits["train"]).count(n) < 1100 for n in (3, 4, 5))
    splits, *_ = machine.make_splits({"train": 3000, "test": 300}, 4, 5, 2, 5, seed=0)  # 100, 500, 2,500, 12,500
    counts = [lengths(splits["train"]).count(n) for n in (2, 3, 4, 5)]
    assert counts[0] == (25 - 2) * 4  # all words of train
    assert counts[0] < counts[1] < counts[2]
    assert set(lengths(splits["test"])) == {2, 3, 4, 5}


def test_shared_words_are_reported_if_there_are_too_few(tmp_path, capsys):
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


def test_the_splits_can_use_nearly_all_questions():
    splits, *_ = machine.make_splits({"train": 1500, "valid": 60, "test": 120}, 4, 5, 2, 4, seed=5)
    assert len({example["question"] for example in everything(splits)}) == 1680  # of 3,100
    splits, *_ = machine.make_splits({"train": 2800, "valid": 60, "test": 120}, 4, 5, 2, 4, seed=5)
    assert not words(splits["train"]) & words(splits["test"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ("--states 27", "27 states and 26 buttons cannot be named"),
        ("--states 1", "1 states and 26 buttons cannot be named"),
        ("--buttons 0", "26 states and 0 buttons cannot be named"),
        ("--min-steps 0", "words of 0 to 5 buttons cannot be"),
        ("--min-steps 6", "words of 6 to 5 buttons cannot be"),
        ("--fan-out 0", "a button of 26 states leads to 1 to 4 states, not to 0"),
        ("--states 3 --fan-out 3", "a button of 3 states leads to 1 to 2 states, not to 3"),
        (
            "--states 2 --buttons 2",
            "train: 400 examples are more than its 10. of the 112 questions that 2 states, 2 buttons and 3 to 5 steps",
        ),
    ],
)
def test_an_impossible_machine_is_one_sentence(tmp_path, changes, complaint, capsys):
    error = one_error(machine.main, ["--out", tmp_path / "new", *SMALL, *changes.split()], capsys)
    assert re.search(f"^error: {complaint}", error)
    assert not (tmp_path / "new").exists()


BREADTH = {"n_states": 16, "n_buttons": 8, "min_steps": 2, "max_steps": 4, "fan_out": 2}


def reachable(permutations: dict, start: str, word: str) -> set[str]:
    """Returns all states at the end of a path, by recursion over the buttons."""
    if not word:
        return {start}
    return set().union(*(reachable(permutations, after, word[1:]) for after in permutations[word[0]][start]))


def split_choice(example: dict) -> tuple[str, str, str]:
    """Returns (start, word, candidates) of a question."""
    return example["question"][0], example["question"][1:-2], example["question"][-2:]


@settings(max_examples=30, deadline=None)
@given(n_states=st.integers(16, 26), n_buttons=st.integers(7, 26), fan_out=st.integers(1, 3), seed=st.integers(0, 99))
def test_exactly_one_candidate_is_reachable(n_states, n_buttons, fan_out, seed):
    """The three kinds of steps have the same questions."""
    sizes = {"train": 60, "valid": 4, "test": 8}
    made = {
        steps: machine.make_splits(sizes, n_states, n_buttons, 2, 3, seed, fan_out, candidates=True, steps=steps)
        for steps in machine.STEPS
    }
    splits, permutations, _ = made["path"]
    states = set(machine.STATES[:n_states])
    for button in permutations.values():
        assert all(len(set(after)) == len(after) == fan_out for after in button.values())
        for index in range(fan_out):
            assert {after[index] for after in button.values()} == set(button) == states
    examples = {steps: everything(splits) for steps, (splits, *_) in made.items()}
    for path, answer, frontier in zip(*examples.values(), strict=True):
        assert len({(example["question"], example["answer"]) for example in (path, answer, frontier)}) == 1
        start, word, candidates = split_choice(path)
        at_end = reachable(permutations, start, word)
        assert path["answer"] in at_end & set(candidates)
        assert len(at_end & set(candidates)) == len(set(candidates)) - 1 == 1
        for n, listed in enumerate(frontier["steps"], start=1):
            assert listed == "".join(sorted(reachable(permutations, start, word[:n]))) + "/"
        for steps in (path["steps"], answer["steps"]):
            assert len(steps) == len(word) == len(frontier["steps"])
            for before, button, after in zip([start, *steps], word, steps, strict=False):
                assert after in permutations[button][before]
        assert answer["steps"][-1] == answer["answer"]
    held = [{split_choice(example)[1] for example in splits[name]} for name in sizes]
    assert share_nothing(*held)


def test_the_written_path_is_uniform_and_independent_of_the_answer():
    """A step takes each successor with probability 1/2; a path ends in the answer as often as a random path, and never
    in the other candidate; the answer is uniform over the reachable states and over the two positions."""
    splits, permutations, _ = machine.make_splits({"train": 20_000, "valid": 500, "test": 500}, **BREADTH)
    firsts, ends, expected, ranks, is_first, count = 0, 0, 0.0, 0.0, 0, 0
    for example in splits["train"]:
        start, word, candidates = split_choice(example)
        frontiers = machine.frontiers_of(permutations, start, word)
        for before, button, after in zip([start, *example["steps"]], word, example["steps"], strict=False):
            firsts += permutations[button][before][0] == after
            count += 1
        paths = [start]
        for button in word:
            paths = [after for state in paths for after in permutations[button][state]]
        expected += paths.count(example["answer"]) / len(paths)
        ends += example["steps"][-1] == example["answer"]
        assert example["steps"][-1] not in set(candidates) - {example["answer"]}
        ranks += (frontiers[-1].index(example["answer"]) + 0.5) / len(frontiers[-1])
        is_first += candidates[0] == example["answer"]
    n = len(splits["train"])
    assert abs(firsts / count - 0.5) < 0.01
    assert abs(ends - expected) / n < 0.01
    assert abs(ranks / n - 0.5) < 0.01
    assert abs(is_first / n - 0.5) < 0.015


def test_frontiers_grow_and_words_of_every_length_are_held_out():
    splits, permutations, shares = machine.make_splits({"train": 4000, "valid": 400, "test": 800}, **BREADTH)
    widths = {n: [] for n in range(1, 5)}
    for example in everything(splits):
        start, word, _ = split_choice(example)
        for n, frontier in enumerate(machine.frontiers_of(permutations, start, word), start=1):
            widths[n].append(len(frontier))
    means = {n: sum(found) / len(found) for n, found in widths.items()}
    assert means[1] == 2
    assert 3.7 < means[2] <= 4
    assert 6.5 < means[3] < 7.5
    assert 10.5 < means[4] < 12
    assert max(widths[4]) <= 15
    for name in ("valid", "test"):  # one word in twenty of 64, 512 and 4,096
        assert {share.length: len(share.held[name]) for share in shares} == {2: 3, 3: 25, 4: 204}


def test_a_machine_without_candidates_is_unchanged():
    """The digest is of the examples from before --fan-out existed."""
    splits, permutations, _ = machine.make_splits({"train": 400, "valid": 20, "test": 40}, seed=1)
    text = json.dumps([splits, permutations], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "33f88cd3eee4c5a9"


def test_too_few_questions_are_an_error():
    with pytest.raises(UserError, match="hardly ever a new question"):  # all states are reachable
        machine.make_splits({"train": 60, "valid": 4, "test": 8}, 6, 7, 3, 3, fan_out=4)
    with pytest.raises(UserError, match="train: 1 examples are more than its 0 of the 20 questions"):
        machine.make_splits({"train": 1, "valid": 1, "test": 1000}, 2, 10, 1, 1)
