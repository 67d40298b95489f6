"""The two-sample tests: right in themselves, 'same' for the authors' data, 'different' for wrong generators."""

import json
import re
from dataclasses import replace
from itertools import combinations

import compare
import numpy as np
import prontoqa_generate
import prontoqa_statistics
import prosqa
import prosqa_statistics
import pytest
from conftest import DATA, needs_data, refusal
from files import UserError, load_examples

# ---- the tests themselves ----


def test_p_is_that_of_all_permutations():
    """Counted over all 252 ways to divide ten examples, for numbers and for words."""
    left = [{"n": [1, 2], "w": ["a"]}, {"n": [5], "w": ["a"]}, {"n": [2, 2], "w": ["b"]}, *[{"n": [1], "w": ["a"]}] * 2]
    right = [{"n": [3], "w": ["b"]}, {"n": [4, 5], "w": ["b"]}, {"n": [2], "w": ["a"]}, *[{"n": [5], "w": ["b"]}] * 2]
    rows = compare.compare(left, right)
    for row in rows:
        values = [example[row.name] for example in left + right]
        marks = sorted({value for one in values for value in one})
        hits = np.array(
            [[np.mean([v <= m if row.name == "n" else v == m for v in one]) for m in marks] for one in values]
        )
        hits = hits[:, hits.std(axis=0) > 0]
        distances = []
        for members in combinations(range(10), 5):
            inside = np.isin(range(10), members)
            difference = hits[inside].mean(axis=0) - hits[~inside].mean(axis=0)
            distances.append((difference**2 / hits.var(axis=0)).sum())
        exact = np.mean(np.array(distances) >= distances[0] - 1e-9)
        assert 0 < exact < 0.6
        assert row.p == pytest.approx(exact, abs=0.015)


def test_p_is_uniform_where_nothing_differs(monkeypatch):
    monkeypatch.setattr(compare, "PERMUTATIONS", 199)
    random = np.random.default_rng(0)
    names = [f"s{number}" for number in range(20)]
    p = []
    for _ in range(20):  # the values of an example go together: a test that took them for independent would fail here
        examples = []
        for level in random.integers(0, 6, 60):
            examples.append({name: [int(level), *random.integers(level, 6, 8).tolist()] for name in names[:1]})
            examples[-1] |= {name: random.integers(0, 3, 2).tolist() for name in names[1:]}
        p.append([row.p for row in compare.compare(examples[:20], examples[20:])])
    p = np.array(p)
    assert 0.025 < np.mean(p[:, 1:] <= 0.05) < 0.085
    assert np.mean(p[:, 0] <= 0.05) <= 0.2


def test_holm():
    assert compare._holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_smallest_p_survives_holm():
    statistics = len(prosqa_statistics.measure(prosqa.make_splits({"one": 1}, prosqa.Settings(), 0)["one"][0]))
    assert statistics >= 28
    assert 2 * statistics / (compare.PERMUTATIONS + 1) < compare.LEVEL


# ---- ProsQA ----


def different(left, right, measure, monkeypatch) -> set[str]:
    monkeypatch.setattr(compare, "PERMUTATIONS", 5_999)  # enough for 50 statistics at 0.01
    sides = [compare.measure_all(examples, measure, "here", 0) for examples in (left, right)]
    return {row.name for row in compare.compare(*sides) if row.verdict == "different"}


@pytest.fixture(scope="module")
def right_prosqa() -> list[dict]:
    return prosqa.make_splits({"all": 250}, prosqa.Settings(), seed=11)["all"]


def questions_of_any_leaf(rng, graph):
    """A target at any depth, where the authors' is the deepest leaf."""
    inner = {parent for drawn in graph.parents for parent in drawn}
    leaves = [
        [n for n, label in enumerate(graph.labels) if label == bit and n > 1 and n not in inner] for bit in (1, 2)
    ]
    if not leaves[0] or not leaves[1]:
        return None
    root = int(rng.integers(2))
    return root, int(rng.choice(leaves[root])), int(rng.choice(leaves[1 - root]))


def questions_against_any_node(rng, graph):
    """A wrong target that need not be a leaf."""
    choice = right_choice(rng, graph)
    return choice and (
        choice[0],
        choice[1],
        int(rng.choice([n for n, label in enumerate(graph.labels) if label == 2 - choice[0] and n > 1])),
    )


right_choice = prosqa.choose_question


def target_first(example: dict) -> dict:
    target, wrong = (example["idx_to_symbol"][example[key]] for key in ("target", "neg_target"))
    return {**example, "question": example["question"].replace(f" {wrong} or {target}?", f" {target} or {wrong}?")}


def in_order(example: dict) -> dict:
    *facts, question = re.findall(r"[^.?]+[.?]", example["question"])
    symbols = example["idx_to_symbol"]
    edges = [f"{symbols[tail]} is a {symbols[head]}." for tail, head in example["edges"]]
    facts.sort(key=lambda fact: edges.index(fact.strip().removeprefix("Every ")))
    return {**example, "question": " ".join([*(fact.strip() for fact in facts), question.strip()])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "choose", "change", "found"),
    [
        ({"nodes": 26}, None, None, {"nodes"}),
        ({"names": tuple(prosqa.NAMES[:9])}, None, None, {"which names", "which root"}),
        ({"max_hops": 4}, None, None, {"hops"}),
        ({}, questions_of_any_leaf, None, {"reached nodes nearer than the target", "leaves farther than the target"}),
        ({}, questions_against_any_node, None, {"out-degree of the wrong target"}),
        ({}, None, target_first, {"target is offered first"}),
        ({}, None, in_order, {"sentences in the order of their edges", "steps in the order of their sentences"}),
    ],
)
def test_a_wrong_prosqa_generator_is_different(right_prosqa, monkeypatch, settings, choose, change, found):
    if choose:
        monkeypatch.setattr(prosqa, "choose_question", choose)
    wrong = prosqa.make_splits({"all": 350}, prosqa.Settings(**settings), seed=12)["all"]
    wrong = [change(example) for example in wrong] if change else wrong
    assert found <= different(right_prosqa, wrong, prosqa_statistics.measure, monkeypatch)


def test_another_seed_is_the_same(right_prosqa, monkeypatch):
    other = prosqa.make_splits({"all": 350}, prosqa.Settings(), seed=12)["all"]
    assert different(right_prosqa, other, prosqa_statistics.measure, monkeypatch) == set()


def test_mirrors_are_like_mirrors_and_not_like_the_paper_s_graphs(right_prosqa, monkeypatch):
    three = prosqa.Settings(min_hops=3, max_hops=3, nodes_a_side=7)
    one, other = (prosqa.make_splits({"all": 250}, three, seed=seed)["all"] for seed in (11, 12))
    assert different(one, other, prosqa_statistics.measure, monkeypatch) == set()
    larger = prosqa.make_splits({"all": 250}, replace(three, nodes_a_side=8), seed=13)["all"]
    assert {"nodes", "edges"} <= different(one, larger, prosqa_statistics.measure, monkeypatch)
    assert "distance of the wrong target" in different(one, right_prosqa, prosqa_statistics.measure, monkeypatch)


@needs_data
@pytest.mark.slow
def test_prosqa_is_the_same_as_the_authors(monkeypatch, capsys):
    monkeypatch.setattr(compare, "LIMIT", 400)
    monkeypatch.setattr(compare, "PERMUTATIONS", 5_999)
    assert prosqa.main(["--check", str(DATA / "prosqa_valid.json"), "--seed", "21"]) == 0
    assert capsys.readouterr().out.count("  same\n") >= 28
    assert prosqa.main(["--check", str(DATA / "prosqa_valid.json"), "--seed", "21", "--nodes", "22"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^nodes .* different$", out, re.M)
    assert ": different: nodes" in out


@needs_data
def test_the_statistics_are_those_known_of_the_authors_data():
    values = [prosqa_statistics.measure(example) for example in load_examples(DATA / "prosqa_valid.json")]

    def mean(name: str) -> float:
        return float(np.mean([value for example in values for value in example[name]]))

    assert mean("nodes") == pytest.approx(22.82, abs=0.01)
    assert mean("leaves farther than the target") == 0
    assert mean("in-degree of a node") == pytest.approx(mean("out-degree of a node"))
    assert all(example["steps are a shortest path"] == [True] for example in values)
    assert all(example["wrong target is reached by"] == ["other"] for example in values)


# ---- ProntoQA ----


@pytest.fixture(scope="module")
def right_prontoqa() -> list[dict]:
    return prontoqa_generate.make_splits({"all": 250}, seed=11)["all"]


def facts_sorted(example: dict) -> dict:
    facts, mark, query = example["question"].partition(" True or false: ")
    *general, one, other = re.findall(r"[^.]+\.", facts)
    return {**example, "question": "".join([*sorted(general), one, other]).strip() + mark + query}


def asks_what_is_true(example: dict) -> dict:
    question = example["question"].partition(" True or false: ")[0]
    return {**example, "question": f"{question} True or false: {example['steps'][-1]}", "answer": "True"}


def all_each(example: dict) -> dict:
    return json.loads(json.dumps(example).replace("Every ", "Each "))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constants", "change", "found"),
    [
        ({"HOPS": 4}, None, {"hops", "sentences", "concepts"}),
        ({"NEGATED": 0.5}, None, {"other properties beside the chain: negated"}),
        ({"NAMES": ["Max", "Sally"]}, None, {"which entity"}),
        ({"FAMILIES": [[f"quick{n}"] for n in range(13)]}, None, {"which properties", "which families"}),
        ({}, facts_sorted, {"neighbours about one concept"}),
        ({}, asks_what_is_true, {"answer", "last step is the query"}),
        ({}, all_each, {"form of a property", "form of a membership"}),
    ],
)
def test_a_wrong_prontoqa_generator_is_different(right_prontoqa, monkeypatch, constants, change, found):
    for name, value in constants.items():
        monkeypatch.setattr(prontoqa_generate, name, value)
    wrong = prontoqa_generate.make_splits({"all": 350}, seed=12)["all"]
    wrong = [change(example) for example in wrong] if change else wrong
    assert found <= different(right_prontoqa, wrong, prontoqa_statistics.measure, monkeypatch)


@needs_data
@pytest.mark.slow
def test_prontoqa_is_the_same_as_the_official(monkeypatch, tmp_path, capsys):
    official = DATA / "5hop_0shot_random.json"
    monkeypatch.setattr(compare, "LIMIT", 400)
    monkeypatch.setattr(compare, "PERMUTATIONS", 5_999)
    assert prontoqa_generate.main(["--check", str(official), "--seed", "21"]) == 0
    assert capsys.readouterr().out.count("  same\n") >= 28
    sizes = ["--train", "200", "--valid", "1", "--test", "1", "--out", str(tmp_path)]
    assert prontoqa_generate.main([*sizes, "--seed", "22"]) == 0
    assert prontoqa_generate.main(["--check", str(official), str(tmp_path / "prontoqa_train.json")]) == 0


# ---- what cannot be compared ----


@pytest.mark.parametrize("script", [prosqa, prontoqa_generate])
def test_what_cannot_be_compared_is_named(script, right_prosqa, tmp_path, capsys):
    good = [{"question": "q", "answer": "a", "steps": []}]
    cases = {
        "few.json": (good, "1 examples are too few to compare"),
        "other.json": (good * 30, r"record 0 \(counted from 0\) (lacks 'root'|cannot be measured: its question)"),
        "empty.json": (None, "(is empty|is not valid JSON)"),
    }
    if script is prosqa:
        wrong_target = {**right_prosqa[3], "target": 1 - right_prosqa[3]["root"]}
        cases["graph.json"] = ([*right_prosqa[:30], wrong_target], "record 30 .* its root does not reach its target")
        swapped = {**right_prosqa[3], "edges": right_prosqa[4]["edges"], "root": 0}
        cases["swapped.json"] = ([*right_prosqa[:30], swapped], "record 30 .* cannot be measured: ")
    for name, (content, complaint) in cases.items():
        (tmp_path / name).write_text("" if content is None else json.dumps(content))
        error = refusal(script.main, ["--check", tmp_path / name, tmp_path / name], capsys)
        assert re.search(f"^error: .*{name}:? {complaint}", error)
        assert error.count("\n") == 1
    assert "Is a directory" in refusal(script.main, ["--check", tmp_path], capsys)
    refusal(script.main, "--check a b c", capsys)


def test_a_sentence_of_no_known_form_is_named():
    with pytest.raises(ValueError, match=r"'Some wumpus is blue\.' has no known form"):
        prontoqa_statistics.parse("Some wumpus is blue.")
    with pytest.raises(UserError, match="record 0"):
        compare.measure_all([{"question": "x True or false: y"}] * 20, prontoqa_statistics.measure, "here", 0)
