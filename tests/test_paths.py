"""analysis/paths.py: classes equal a plain definition, in both templates; distances equal those over all paths."""

import json
import re
from itertools import pairwise

import numpy as np
import prosqa
import pytest
from conftest import python, refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import paths
from analysis.paths import CLASSES, Graph, classify, from_example
from trainer.evaluate import extract_answer, extract_steps

# The root Tom (a) reaches the target t in two edges, by c or d, and in three, by c and e; f is another leaf. Alex (b)
# reaches the other candidate o by g, and what Tom reaches by c. Sam (s) reaches t by h.
EDGES = "ac ad ct dt ce et af bg go bc sh ht"
SYMBOLS = "abcdefghost"
WORDS = {"a": "Tom", "b": "Alex", "s": "Sam"} | {name: f"{name}umpus" for name in "cdefghot"}


def example_of(pairs: str = EDGES, compact: bool = True, **changed) -> dict:
    """The question whether a reaches t or o."""
    names = list(SYMBOLS) if compact else [WORDS[symbol] for symbol in SYMBOLS]
    return {
        "question": "?",
        "steps": [],
        "answer": "t" if compact else "Tom is a tumpus.",
        "idx_to_symbol": names,
        "edges": [[SYMBOLS.index(parent), SYMBOLS.index(child)] for parent, child in pairs.split()],
        "root": SYMBOLS.index("a"),
        "target": SYMBOLS.index("t"),
        "neg_target": SYMBOLS.index("o"),
    } | changed


COMPACT, SENTENCES = from_example(example_of()), from_example(example_of(compact=False))


def in_sentences(nodes: str) -> str:
    """The sentences of a walk, which may use edges that do not exist."""
    every = {symbol: "" if symbol in "abs" else "Every " for symbol in SYMBOLS}
    return "\n".join(f"{every[tail]}{WORDS[tail]} is a {WORDS[head]}." for tail, head in pairwise(nodes))


# (class with k = 0, class with k > 0) -> walks; the compact template omits the first node
WALKS = {
    ("correct path", "correct path"): "act adt",
    ("longer path", "longer path"): "acet",
    ("hallucination", "correct path"): "ct",
    ("hallucination", "longer path"): "cet et",
    ("wrong target", "wrong target"): "af ac ace bgo",
    ("hallucination", "wrong target"): "go",
    ("hallucination", "hallucination"): "sht ht ag at acdt acct acact actt acta tc tca",
}
COMPACT_WALKS = {
    ("correct path", "correct path"): "ct dt",
    ("longer path", "longer path"): "cet",
    ("hallucination", "correct path"): "t",
    ("hallucination", "longer path"): "et",
    ("wrong target", "wrong target"): "f c go h",  # go begins at b, which is omitted
    ("hallucination", "wrong target"): "e o",
    # ht begins at s, not at the root; no edge leads to a
    ("hallucination", "hallucination"): "ht act a cdt cct ctt ctct tc x cx c,t c.",
}


def each(groups: dict) -> list[tuple]:
    return [(walk, *classes) for classes, walks in groups.items() for walk in walks.split()]


@pytest.mark.parametrize("answer", ["t", "o", ""])  # has no effect on the class of a path
@pytest.mark.parametrize(("walk", "whole", "partial"), each(WALKS))
def test_walks_in_sentences(walk, whole, partial, answer):
    sentence = f"Tom is a {WORDS[answer]}." if answer else ""
    assert classify(SENTENCES, in_sentences(walk), sentence) == whole
    assert {classify(SENTENCES, in_sentences(walk), sentence, k) for k in (1, 2, 6)} == {partial}


@pytest.mark.parametrize("answer", ["t", "o", ""])
@pytest.mark.parametrize(("written", "whole", "partial"), each(COMPACT_WALKS))
def test_walks_in_characters(written, whole, partial, answer):
    for text in (written, "\n".join(written), f" {' '.join(written)}\n"):
        assert classify(COMPACT, text, answer) == whole
        assert {classify(COMPACT, text, answer, k) for k in (1, 2, 6)} == {partial}


@pytest.mark.parametrize("k", [0, 1, 6])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tom is a cumpus.\nEvery cumpus is a tumpus.\n### Tom is a tumpus.", "correct path"),
        ("Tom is a cumpus. Every cumpus is a tumpus. ### Tom is a tumpus.", "correct path"),
        ("  Tom  is a\ncumpus.Every   cumpus is a tumpus. \n\n###  Tom is a tumpus.", "correct path"),
        ("Tom is a cumpus.\nEvery dumpus is a tumpus.\n### Tom is a tumpus.", "hallucination"),
        ("Tom is a cumpus.\nTom is a cumpus.\nEvery cumpus is a tumpus.\n### Tom is a tumpus.", "hallucination"),
        ("Every cumpus is a tumpus.\nTom is a cumpus.\n### Tom is a tumpus.", "hallucination"),
        ("Tom is a cumpus.\nTom is a tumpus.\n### Tom is a tumpus.", "hallucination"),
        ("Tom is a cumpus.\nEvery Tom is a tumpus.\n### Tom is a tumpus.", "hallucination"),
        ("Every Tom is a cumpus.\nEvery cumpus is a tumpus.\n### Tom is a tumpus.", "hallucination"),
        ("cumpus is a tumpus.\n### Tom is a tumpus.", "hallucination"),
        ("Alex is a dumpus.\nEvery dumpus is a tumpus.\n### Tom is a tumpus.", "hallucination"),
        ("Tom is a wumpus.\nEvery wumpus is a tumpus.\n### Tom is a tumpus.", "hallucination"),
        ("Tom is a cumpus.\nEvery cumpus is\n### Tom is a tumpus.", "hallucination"),
        ("Tom is a cumpus.\nEvery cumpus is a tumpus", "hallucination"),
        ("Tom is a cumpus.\nEvery cumpus is a tumpus..\n### Tom is a tumpus.", "hallucination"),
        ("Tom is a cumpus.\n.Every cumpus is a tumpus.\n### Tom is a tumpus.", "hallucination"),
        ("Tom is\n### Tom is a tumpus.", "hallucination"),
        ("Tom is a cumpus and a tumpus.\n### Tom is a tumpus.", "hallucination"),
        ("### Tom is a tumpus.", "correct label"),
        ("\n\n###Tom is a tumpus.\n", "correct label"),
        ("### Tom is a  tumpus.", "incorrect label"),  # wrong for evaluation
        ("### Tom is a oumpus.", "incorrect label"),
        ("### Alex is a tumpus.", "incorrect label"),
        ("### Tom is a wumpus.", "incorrect label"),
        ("### tumpus", "other"),
        ("### Tom is a", "other"),
        ("### Tom is a tumpus. Tom is a tumpus.", "other"),
        ("Tom is\n### tumpus", "other"),
        ("Every cumpus", "other"),
        ("###", "other"),
        (" \n", "other"),
        ("", "other"),
    ],
)
def test_texts_in_sentences(text, expected, k):
    assert classify(SENTENCES, extract_steps(text), extract_answer(text), k) == expected


def test_a_path_does_not_begin_at_another_source():
    """With the edge be, e can be a first character; the root is two edges from e."""
    graph = from_example(example_of(EDGES + " be"))
    assert classify(graph, "et", "t") == "hallucination"
    assert classify(graph, "e", "t") == "wrong target"
    assert classify(graph, "et", "t", 1) == "longer path"


@pytest.mark.parametrize("k", [0, 1, 6])
def test_texts_in_characters(k):
    texts = {
        "correct path": ["c\nt\n### t"],
        "correct label": ["### t", "###t"],
        "incorrect label": ["### o", "### x"],
        "other": ["### ct", "### ?", "?### ?", "###", ""],
        "hallucination": ["?### t"],
    }
    for expected, group in texts.items():
        assert {classify(COMPACT, extract_steps(text), extract_answer(text), k) for text in group} == {expected}


# --- Generated graphs ---

LETTERS = prosqa.CHARACTERS[:26]
KINDS = {
    "paper": prosqa.Settings(),
    "paper, compact": prosqa.Settings(nodes=20, characters=LETTERS),
    "small": prosqa.Settings(nodes=12, min_hops=2),
    "small, compact": prosqa.Settings(nodes=12, min_hops=2, characters=LETTERS),
    "mirror": prosqa.Settings(nodes_a_side=7, min_hops=1, max_hops=4),
    "mirror, compact": prosqa.Settings(nodes_a_side=7, min_hops=1, max_hops=4, characters=LETTERS),
    "chains, compact": prosqa.Settings(nodes_a_side=7, min_hops=1, max_hops=6, chains=True, characters=LETTERS),
}


@st.composite
def drawn(draw, kinds=tuple(KINDS)) -> tuple[dict, Graph, np.random.Generator]:
    """An example of one of the kinds, its graph, and a random generator."""
    settings, rng = KINDS[draw(st.sampled_from(kinds))], np.random.default_rng(draw(st.integers(0, 2**32)))
    while (example := prosqa.make_example(rng, settings)) is None:
        pass
    return example, from_example(example), rng


def steps_of(graph: Graph, path: list[str]) -> list[str]:
    """The steps of a path, as the data write them."""
    concepts = {child for _, child in graph.edges}
    text = prosqa.compact([], [], path) if graph.compact else prosqa.sentences([], [], path, concepts)
    return text["steps"]


def all_paths(graph: Graph) -> list[tuple[str, ...]]:
    """Every path from a source with one or more edges, by exhaustive search."""
    heads = {child for _, child in graph.edges}
    paths = [(name,) for name in graph.names if name not in heads]
    for path in paths:  # the loop extends the list
        paths += [(*path, child) for parent, child in graph.edges if parent == path[-1]]
    return [path for path in paths if len(path) > 1]


def plainly(graph: Graph, whole: list[tuple[str, ...]], walk: list[str], k: int) -> str:
    """The class of a walk by definition: from the whole paths that equal it or, with k > 0, end with it."""
    skipped = int(graph.compact)  # the first node is omitted
    fits = [path for path in whole if path[skipped:] == tuple(walk) or (k and path[skipped:][-len(walk) :] == walk)]
    if not fits:
        return "hallucination"
    if walk[-1] != graph.target:
        return "wrong target"
    lengths = [len(path) for path in fits if path[0] == graph.root]
    if not lengths:
        return "hallucination"
    shortest = min(len(path) for path in whole if (path[0], path[-1]) == (graph.root, graph.target))
    return "correct path" if min(lengths) == shortest else "longer path"


@given(drawn(), st.integers(0, 6))
def test_gold_steps_are_a_correct_path(of_example, k):
    """With k = 0 all steps; with k > 0 also the steps from any one on."""
    example, graph, _ = of_example
    steps = example["steps"]
    for first in range(len(steps) if k else 1):
        for separator in "\n", " ", "":
            written = separator.join(steps[first:])
            assert classify(graph, written, example["answer"], k) == "correct path"
    assert classify(graph, "", example["answer"], k) == "correct label"
    assert classify(graph, "", example["answer"].replace(graph.target, graph.other), k) == "incorrect label"


@settings(max_examples=200)
@given(drawn(kinds=[kind for kind in KINDS if not kind.startswith("paper")]), st.integers(0, 2), st.data())
def test_walks_have_the_class_of_the_plain_definition(of_example, k, data):
    """Random walks from any node, some with a jump to a node without an edge."""
    _, graph, rng = of_example
    whole = all_paths(graph)
    for _ in range(30):
        walk = [str(rng.choice(graph.names if rng.random() < 0.5 else [graph.root]))]
        for _ in range(rng.integers(1, 7)):
            ways = graph.children[walk[-1]]
            if rng.random() < 0.1:
                ways = graph.names
            if not ways:
                break
            walk.append(str(rng.choice(ways)))
        if len(walk) == 1:
            continue
        nodes = tuple(walk[1:] if graph.compact else walk)
        assert classify(graph, "\n".join(steps_of(graph, walk)), "", k) == plainly(graph, whole, nodes, k)


@st.composite
def texts(draw, graph: Graph, example: dict) -> str:
    """Any text, or parts of outputs in any order."""
    words = ["Every", " is a ", ".", " ", "\n", "#", "### ", ",", *graph.names, *graph.sentences, *example["steps"]]
    pieces = st.lists(st.sampled_from(words) | st.text(max_size=3), max_size=12)
    return draw(st.text() | pieces.map("".join))


@settings(max_examples=300)
@given(drawn(), st.integers(0, 6), st.data())
def test_every_text_has_a_class(of_example, k, data):
    example, graph, _ = of_example
    text = data.draw(texts(graph, example))
    assert classify(graph, extract_steps(text), extract_answer(text), k) in CLASSES
    other = data.draw(texts(graph, example))
    assert classify(graph, text, other, k) in CLASSES


# --- Distances ---


def test_distances_of_a_graph():
    assert paths.distances(COMPACT, "c") == {"c": 0, "e": 1, "t": 1}
    assert paths.depths(COMPACT) == {"a": 0, "c": 1, "d": 1, "f": 1, "t": 2, "e": 2}
    assert paths.height(COMPACT) == dict(zip(SYMBOLS, (1, 2, 1, 1, 1, 0, 1, 1, 0, 2, 0), strict=True))
    assert [paths.frontier(COMPACT, k) for k in range(4)] == [{"a"}, {"c", "d", "f"}, {"t", "e"}, set()]
    unreachable = [paths.same_depth_unreachable(COMPACT, k) for k in range(4)]
    assert unreachable == [{"b", "s"}, {"g", "h"}, {"o"}, set()]


@given(drawn(kinds=("small", "mirror, compact", "chains, compact")))
def test_distances_are_lengths_of_paths(of_example):
    example, graph, _ = of_example
    parts = {path[place:] for path in all_paths(graph) for place in range(len(path))}
    lengths = {}
    for path in parts:
        lengths.setdefault((path[0], path[-1]), []).append(len(path) - 1)
    leaves = {name for name in graph.names if name not in {parent for parent, _ in graph.edges}}
    for start in graph.names:
        expected = {end: min(lengths[start, end]) for end in graph.names if (start, end) in lengths} | {start: 0}
        assert paths.distances(graph, start) == expected
        to_leaves = [length for leaf in leaves for length in lengths.get((start, leaf), [])]
        assert paths.height(graph)[start] == min(to_leaves, default=0)
    assert paths.depths(graph)[graph.target] == len(example["steps"])


@given(drawn(kinds=("mirror", "mirror, compact", "chains, compact")))
def test_the_frontiers_of_a_mirrored_graph(of_example):
    """The unreachable nodes at a depth are the copies of the reachable ones: node n of side s has index 2n + s."""
    example, graph, _ = of_example
    names = example["idx_to_symbol"]
    copy = {name: names[number ^ 1] for number, name in enumerate(names)}
    for k in range(len(names)):
        assert paths.same_depth_unreachable(graph, k) == {copy[name] for name in paths.frontier(graph, k)}


# --- Errors ---


def without(field: str) -> dict:
    return {name: value for name, value in example_of().items() if name != field}


@pytest.mark.parametrize(
    ("example", "complaint"),
    [
        *(
            (without(field), f"'{field}'")
            for field in ("answer", "idx_to_symbol", "edges", "root", "target", "neg_target")
        ),
        (example_of(idx_to_symbol=list("abcdefghoss")), "two names are the same"),
        (example_of(idx_to_symbol=[0, 1]), "has no valid ProsQA graph"),
        (example_of(edges=[[0, 1, 2]]), "has no valid ProsQA graph"),
        (example_of(edges=7), "has no valid ProsQA graph"),
        (example_of(edges=[[0, 11]]), "has no valid ProsQA graph"),
        (example_of(target="t"), "has no valid ProsQA graph"),
        (example_of(answer="o"), "answer 'o' is neither 't' nor 'a is a t.'"),
        (example_of(answer=3), "answer 3 is neither"),
        (example_of(EDGES + " ec"), "edges form a cycle: "),
        (example_of(EDGES + " ff"), "edges form a cycle: f - f"),
        (example_of("ac dt bo"), "root 'a' does not reach its target 't'"),
        (example_of(root=SYMBOLS.index("t")), "root 't' does not reach its target 't'"),
        (example_of(EDGES + " co"), "root 'a' reaches its neg_target 'o', as it does its target"),
        (example_of(idx_to_symbol=["Tom", *SYMBOLS[1:]]), "names ['Tom'] cannot be parsed"),
        (example_of(answer="a is a t.", idx_to_symbol=["a", "b.", *SYMBOLS[2:]]), "['b.'] cannot be parsed"),
    ],
)
def test_an_example_without_a_graph_raises(example, complaint):
    refuses(f"^the example.*{re.escape(complaint)}", from_example, example)


def test_distances_are_in_the_same_order_in_every_process(tmp_path):
    """Bug: they followed the order of a set, so that the same analysis wrote different files."""
    edges = [[0, node] for node in range(1, 9)] + [[1, 10]]
    example = {"idx_to_symbol": list("abcdefghijk"), "edges": [*edges, [9, 8]], "root": 0, "target": 10}
    example |= {"neg_target": 9, "answer": "k", "steps": ["b", "k"]}
    code = (
        "import json, sys; from analysis import paths; graph = paths.from_example(json.loads(sys.argv[1])); "
        "print(list(paths.depths(graph)), list(paths.fewest_edges(graph.children, graph.sources)))"
    )
    outputs = {python("-c", code, json.dumps(example), environment={"PYTHONHASHSEED": seed}).stdout for seed in "0123"}
    assert len(outputs) == 1
