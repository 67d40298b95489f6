"""Classes of outputs on ProsQA: a shortest path, a longer one, a hallucination ... (paper, Section 5); and the graphs.

A graph is made from an example of ProsQA, the authors' or ours, mirrored or not, in either template; nodes go by name.
An output is the text after k latent thoughts, when the model is forced to begin with language there:

    graph = from_example(example)
    classify(graph, extract_steps(text), extract_answer(text), k)   # both from evaluate.py

The classes. The path decides; the answer decides only where there is no path: the paper scores answers apart, so a
right path before a wrong answer is a 'correct path'.

    correct path     a shortest path from the node asked about (the root) to the target, or the end of one
    longer path      another path from the root to the target, or the end of one
    hallucination    an edge that is not in the graph or does not go on from the one before; a path to the target that
                     does not come from the root; a broken step
    wrong target     a path of the graph, or the end of one, that ends in another node than the target
    correct label    no steps, and the right answer
    incorrect label  no steps, and another answer of its form
    other            neither a step nor an answer: the paper does not name it

With k > 0 a path may lack its beginning, which the thoughts replace: the shortest beginning that completes it counts.
The beginning may have any number of edges, also none or more than k: the analysis does not assume what a thought stands
for. With k = 0 a path begins with a source.

A 'wrong target' need not come from the root: a path from another source, all of whose edges exist, leads through the
wrong part of the graph, and is not made up. On mirrored data it is the other component, or another leaf of the right
one. The compact template leaves out a path's first node, so there the source is any that has such an edge, the root if
it has: both templates give a path the same class.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from preprocessing.graphs import fewest_edges
from utils import UserError

CORRECT_PATH = "correct path"
LONGER_PATH = "longer path"
HALLUCINATION = "hallucination"
WRONG_TARGET = "wrong target"
CORRECT_LABEL = "correct label"
INCORRECT_LABEL = "incorrect label"
OTHER = "other"
CLASSES = (CORRECT_PATH, LONGER_PATH, HALLUCINATION, WRONG_TARGET, CORRECT_LABEL, INCORRECT_LABEL, OTHER)

SENTENCE = re.compile(r"[^.]+ is a [^.]+\.")  # a step, or an answer, of whatever names
NAME = re.compile(r"[^.,#]+")  # what can be read back from a sentence and from an answer
CHARACTER = re.compile(r"\w")  # a step, or an answer, of the compact template


@dataclass(frozen=True)
class Graph:
    """A directed acyclic graph and its question: is `root` a `target`, which it reaches, or an `other`?"""

    names: tuple[str, ...]
    edges: frozenset[tuple[str, str]]  # (parent, child)
    root: str
    target: str
    other: str
    compact: bool  # the template: a step is a name, else a sentence

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Name -> the names that its edges lead to, in the order of the names."""
        return {name: [child for child in self.names if (name, child) in self.edges] for name in self.names}

    @cached_property
    def parents(self) -> dict[str, list[str]]:
        """Name -> the names whose edges lead to it, in the order of the names."""
        return {name: [parent for parent in self.names if (parent, name) in self.edges] for name in self.names}

    @cached_property
    def sources(self) -> frozenset[str]:
        """Where a path can begin: the nodes without parents, and the root, which in ProsQA is one of them."""
        return frozenset(name for name in self.names if not self.parents[name]) | {self.root}

    @cached_property
    def answer(self) -> str:
        """The right answer, as the data have it."""
        return self.target if self.compact else f"{self.root} is a {self.target}."

    @cached_property
    def sentences(self) -> dict[str, tuple[str, str]]:
        """Sentence -> its edge: 'Every lempus is a rorpus.', but 'Alex is a lempus.' of a node without parents."""
        return {
            f"{'Every ' if self.parents[parent] else ''}{parent} is a {child}.": (parent, child)
            for parent, child in self.edges
        }


def from_example(example: dict) -> Graph:
    """The graph of an example with ProsQA's fields.

    Raises UserError, without the example's number, where a field is missing or damaged, names are not different or
    cannot be read back from the template, edges go round in a circle, or the root does not reach the target alone.
    """
    try:
        names = tuple(example["idx_to_symbol"])
        if len({*names}) < len(names):
            raise ValueError("its names are not all different")
        edges = frozenset((names[parent], names[child]) for parent, child in example["edges"])
        root, target, other = (names[example[field]] for field in ("root", "target", "neg_target"))
        graph = Graph(names, edges, root, target, other, compact=example["answer"] == target)
        form = CHARACTER if graph.compact else NAME
        unreadable = [name for name in names if not form.fullmatch(name)]
        from_root = depths(graph)
        TopologicalSorter(graph.children).prepare()
    except CycleError as error:
        raise UserError(f"the example's edges go round in a circle: {' - '.join(error.args[1])}") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"the example is no graph of ProsQA's: {error!r}") from None
    for is_wrong, problem in (
        (example["answer"] != graph.answer, f"answer {example['answer']!r} is neither {target!r} nor {graph.answer!r}"),
        (unreadable, f"names {unreadable} cannot be read back from an output"),
        (not from_root.get(target), f"target {target!r} cannot be reached from its root {root!r}"),
        (other in from_root, f"neg_target {other!r} can be reached from its root {root!r}, as the target can"),
    ):
        if is_wrong:
            raise UserError(f"the example's {problem}")
    return graph


def distances(graph: Graph, start: str) -> dict[str, int]:
    """Name -> the fewest edges that lead to it from `start`, which is itself at 0; unreachable nodes are left out."""
    return fewest_edges(graph.children, [start])


def depths(graph: Graph) -> dict[str, int]:
    """Name -> its distance from the root, as `distances`."""
    return distances(graph, graph.root)


def height(graph: Graph) -> dict[str, int]:
    """Name -> the fewest edges from it to a leaf; a leaf has 0 (paper, Section 5)."""
    heights: dict[str, int] = {}
    for name in TopologicalSorter(graph.children).static_order():  # children first
        heights[name] = min((1 + heights[child] for child in graph.children[name]), default=0)
    return heights


def frontier(graph: Graph, k: int) -> set[str]:
    """The nodes at distance k from the root: what a search by breadth holds after k steps."""
    return {name for name, depth in depths(graph).items() if depth == k}


def same_depth_unreachable(graph: Graph, k: int) -> set[str]:
    """The control of `frontier`: nodes that the root does not reach, k edges from the nearest other source."""
    from_others = fewest_edges(graph.children, graph.sources - {graph.root})
    return {name for name, depth in from_others.items() if depth == k} - depths(graph).keys()


def classify(graph: Graph, reasoning: str, answer: str, k: int = 0) -> str:
    """The class of an output that began with language after k thoughts: one of CLASSES, whatever the text.

    reasoning: the text before the first '#'; answer: the answer as `evaluate.extract_answer` gives it. In
    either, spaces and line breaks count as one another, but a right answer is what evaluation takes for one.
    """
    assert k >= 0
    form = CHARACTER if graph.compact else SENTENCE
    reasoning = " ".join(reasoning.split())
    has_answer = form.fullmatch(" ".join(answer.split()))
    if not reasoning and has_answer:
        return CORRECT_LABEL if answer.strip() == graph.answer else INCORRECT_LABEL
    steps = [*reasoning.replace(" ", "")] if graph.compact else _split_sentences(reasoning)
    if not has_answer and not any(form.fullmatch(step) for step in steps):
        return OTHER
    path = _compact_path(graph, steps, k) if graph.compact else _path(graph, steps, k)
    if path is None:
        return HALLUCINATION
    return _class_of_path(graph, path, k)


def _split_sentences(text: str) -> list[str]:
    """The sentences with their full stops; last what has none."""
    return [part.strip() for part in re.split(r"(?<=\.)", text) if part.strip()]


def _path(graph: Graph, sentences: list[str], k: int) -> list[str] | None:
    """The nodes of the sentences, with the first subject; None where they are no path, or with k = 0 begin in the
    middle of one."""
    edges = [graph.sentences.get(sentence) for sentence in sentences]
    if None in edges or any(before[1] != after[0] for before, after in pairwise(edges)):
        return None
    path = [edges[0][0], *(child for _, child in edges)]
    return path if k or path[0] in graph.sources else None


def _compact_path(graph: Graph, names: list[str], k: int) -> list[str] | None:
    """The same of the compact template, whose first name is already a child."""
    before = graph.parents.get(names[0])
    if not before or any(edge not in graph.edges for edge in pairwise(names)):
        return None
    return names if k or graph.sources & {*before} else None


def _class_of_path(graph: Graph, path: list[str], k: int) -> str:
    """The class of a path of the graph, which may lack its beginning."""
    if path[-1] != graph.target:
        return WRONG_TARGET
    from_root = depths(graph)
    beginning = from_root.get(path[0])  # edges, of the shortest
    if beginning is None or (k == 0 and beginning > 1):  # it began with another source
        return HALLUCINATION
    shortest = beginning + len(path) - 1 == from_root[graph.target]
    return CORRECT_PATH if shortest else LONGER_PATH
