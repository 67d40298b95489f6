"""The cheap rules on graphs by hand, on the authors' data with known results, and on mirrors, where they fail."""

import json
import re

import prosqa
import pytest
import shortcuts
from conftest import DATA, needs_data, one_error, refusal
from files import load_examples

LOOKS_TWO_BACK = "no other source within two back"


def example_of(edges: list[tuple[int, int]], target: int, wrong: int) -> dict:
    """Returns an example that asks about node 0."""
    n_nodes = 1 + max(node for edge in edges for node in edge)
    graph = {"idx_to_symbol": [f"n{node}" for node in range(n_nodes)], "edges": [list(edge) for edge in edges]}
    return {"question": "q", "answer": "a", "steps": [], **graph, "root": 0, "target": target, "neg_target": wrong}


@needs_data
def test_results_on_the_authors_data():
    examples = load_examples(DATA / "prosqa_valid.json")
    right = shortcuts.measure(examples, "valid")
    assert len(examples) == 300
    assert {rule: round(percent, 1) for rule, percent in right.items()} == {
        "chance": 50.0,
        "in-degree": 66.7,
        "depth of ancestors": 91.3,
        "number of ancestors": 69.8,
        "no parent that is another source": 59.7,
        "no other source within two back": 85.3,
    }


def test_rules_on_a_graph_by_hand():
    """0 leads to 4 through 2 and 3; 1, another source, leads to 6 directly and through 5."""
    edges = [(0, 2), (2, 3), (3, 4), (1, 5), (1, 6), (5, 6)]
    assert shortcuts.decide(example_of(edges, target=4, wrong=6)) == {
        "chance": 0.5,
        "in-degree": 1,  # 1 against 2
        "depth of ancestors": 1,  # 3 back against 1: the path through 5 is not the shortest to 1
        "number of ancestors": 1,  # 0, 2, 3 against 1, 5
        "no parent that is another source": 1,
        "no other source within two back": 1,
    }
    assert set(shortcuts.decide(example_of(edges, target=6, wrong=4)).values()) == {0, 0.5}


def test_the_root_does_not_count_as_another_source():
    decided = shortcuts.decide(example_of([(0, 2), (1, 3), (3, 4)], target=2, wrong=4))
    assert decided["no parent that is another source"] == 0.5
    assert decided["no other source within two back"] == 1
    assert decided["in-degree"] == 0.5
    assert decided["depth of ancestors"] == 0


@pytest.mark.parametrize(("side", "hops", "characters"), [(7, 3, ""), (10, 5, prosqa.CHARACTERS), (4, 3, "abcdefgh")])
def test_all_rules_tie_on_every_mirror(side, hops, characters):
    settings = prosqa.Settings(min_hops=hops, max_hops=hops, nodes_a_side=side, characters=characters)
    examples = prosqa.make_splits({"all": 1000}, settings, seed=0)["all"]
    assert {value for example in examples for value in shortcuts.decide(example).values()} == {0.5}


def test_looking_two_back_solves_two_hops():
    settings = prosqa.Settings(min_hops=2, max_hops=2, nodes_a_side=5)
    right = shortcuts.measure(prosqa.make_splits({"all": 300}, settings, seed=0)["all"], "mirror")
    assert right.pop(LOOKS_TWO_BACK) == 100
    assert set(right.values()) == {50}


def test_small_graphs_of_the_paper_s_kind_have_shortcuts():
    settings = prosqa.Settings(nodes=10, min_hops=2)
    right = shortcuts.measure(prosqa.make_splits({"all": 300}, settings, seed=0)["all"], "small")
    assert max(right.values()) > 85


def test_table(tmp_path, capsys):
    one = example_of([(0, 2), (1, 3), (3, 4)], target=2, wrong=4)
    other = example_of([(0, 2), (2, 3), (1, 4)], target=3, wrong=4)
    paths = [str(tmp_path / name) for name in ("one.json", "both.json")]
    for path, examples in zip(paths, ([one], [one, other]), strict=True):
        (tmp_path / path).write_text(json.dumps(examples))
    assert shortcuts.main(paths) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][1:] == paths
    assert rows[2] == ["examples", "1", "2"]
    assert ["depth of ancestors", "0.0", "50.0"] in rows
    assert [row[0] for row in rows[3:]] == list(shortcuts.decide(one))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"edges": None}, r"record 1 \(counted from 0\) lacks 'edges'"),
        ({"target": 5}, "record 1 .* has no valid graph: 0 or 5 is not one of its 5 nodes"),
        ({"edges": [[0, 1, 2]]}, "record 1 .* has no valid graph"),
        ({"edges": 3}, "record 1 .* has no valid graph"),
        ({"root": "0"}, "record 1 .* has no valid graph"),
    ],
)
def test_a_record_without_a_valid_graph_is_named(tmp_path, change, complaint, capsys):
    good = example_of([(0, 2), (1, 3), (3, 4)], target=2, wrong=4)
    bad = {key: value for key, value in (good | change).items() if value is not None}
    (tmp_path / "in.json").write_text(json.dumps([good, bad]))
    error = one_error(shortcuts.main, [tmp_path / "in.json"], capsys)
    assert re.search(f"^error: .*in.json: {complaint}", error)
    refusal(shortcuts.main, [tmp_path / "absent.json"], capsys)
