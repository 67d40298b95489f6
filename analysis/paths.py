"""ProsQA's graphs, and the classes of outputs on them: correct path, longer path, hallucination ... (paper, Section 5).

Examples may be the authors' or ours, mirrored or not, in either template. An output is the text that the model writes
when it has to begin with language after k thoughts:

    graph = from_example(example)
    classify(graph, extract_steps(text), extract_answer(text), k)   # both functions from trainer/evaluate.py

The classes:

    correct path     a shortest path from the root (the node in the question) to the target, or the end of one
    longer path      another path from the root to the target, or the end of one
    hallucination    a step that is malformed, not in the graph, or not connected to the step before; a path to the
                     target that does not begin at the root
    wrong target     a path of the graph, or the end of one, to another node than the target
    correct label    no steps and the right answer
    incorrect label  no steps and a wrong answer of the right form
    other            neither a step nor an answer (not in the paper)

An output with steps gets its class from them, whatever its answer: the paper scores answers separately.

With k = 0 a path begins at a source. With k > 0 its beginning may be missing, since the thoughts replace it; it is then
completed by the shortest beginning, of any number of edges: the analysis does not assume that a thought is one edge.

The path of a 'wrong target' may begin at any source: all of its edges exist, so it is not made up. On mirrored data it
leads into the other component, or to another leaf of the root's. The compact template omits a path's first node: the
root if it has such an edge, else any source that has it. So both templates give a path the same class.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from preprocessing.graphs import fewest_edges
from utils import UserError

CLASSES = ("correct path", "longer path", "hallucination", "wrong target", "correct label", "incorrect label", "other")

SENTENCE = re.compile(r"[^.]+ is a [^.]+\.")  # a step or an answer, with any names
NAME = re.compile(r"[^.,#]+")  # a name that can be parsed from a sentence and from an answer
CHARACTER = re.compile(r"\w")  # a step or an answer in the compact template


@dataclass(frozen=True)
class Graph:
    """A directed acyclic graph with its question: does `root` reach `target` (it does) or `other`?"""

    names: tuple[str, ...]
    edges: frozenset[tuple[str, str]]  # (parent, child)
    root: str
    target: str
    other: str
    compact: bool  # whether a step is a name; else it is a sentence

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Each node's children, in the order of the names."""
        return {name: [child for child in self.names if (name, child) in self.edges] for name in self.names}

    @cached_property
    def parents(self) -> dict[str, list[str]]:
        """Each node's parents, in the order of the names."""
        return {name: [parent for parent in self.names if (parent, name) in self.edges] for name in self.names}

    @cached_property
    def sources(self) -> frozenset[str]:
        """The nodes that can begin a path: the root and all nodes without parents."""
        return frozenset(name for name in self.names if not self.parents[name]) | {self.root}

    @cached_property
    def answer(self) -> str:
        """The right answer as the data write it."""
        return self.target if self.compact else f"{self.root} is a {self.target}."

    @cached_property
    def sentences(self) -> dict[str, tuple[str, str]]:
        """Sentence -> edge: 'Every lempus is a rorpus.', without 'Every' if the parent has no parents itself."""
        return {
            f"{'Every ' if self.parents[parent] else ''}{parent} is a {child}.": (parent, child)
            for parent, child in self.edges
        }


def from_example(example: dict) -> Graph:
    """Returns the graph of an example with ProsQA's fields.

    Raises UserError (which does not name the example) for a missing or damaged field, equal names, names that cannot be
    parsed from the template, a cycle, a target that the root does not reach, and a neg_target that it does.
    """
    try:
        names = tuple(example["idx_to_symbol"])
        if len({*names}) < len(names):
            raise ValueError("two names are the same")
        edges = frozenset((names[parent], names[child]) for parent, child in example["edges"])
        root, target, other = (names[example[field]] for field in ("root", "target", "neg_target"))
        graph = Graph(names, edges, root, target, other, compact=example["answer"] == target)
        form = CHARACTER if graph.compact else NAME
        unreadable = [name for name in names if not form.fullmatch(name)]
        from_root = depths(graph)
        TopologicalSorter(graph.children).prepare()
    except CycleError as error:
        raise UserError(f"the example's edges form a cycle: {' - '.join(error.args[1])}") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"the example has no valid ProsQA graph: {error!r}") from None
    for is_wrong, problem in (
        (example["answer"] != graph.answer, f"answer {example['answer']!r} is neither {target!r} nor {graph.answer!r}"),
        (unreadable, f"names {unreadable} cannot be parsed from an output"),
        (not from_root.get(target), f"root {root!r} does not reach its target {target!r}"),
        (other in from_root, f"root {root!r} reaches its neg_target {other!r}, as it does its target"),
    ):
        if is_wrong:
            raise UserError(f"the example's {problem}")
    return graph


def distances(graph: Graph, start: str) -> dict[str, int]:
    """Returns the fewest edges from `start` to each node that it reaches, itself included (0)."""
    return fewest_edges(graph.children, [start])


def depths(graph: Graph) -> dict[str, int]:
    """Returns the `distances` from the root."""
    return distances(graph, graph.root)


def height(graph: Graph) -> dict[str, int]:
    """Returns the fewest edges from each node to a leaf, 0 for a leaf (paper, Section 5)."""
    heights: dict[str, int] = {}
    for name in TopologicalSorter(graph.children).static_order():  # children first
        heights[name] = min((1 + heights[child] for child in graph.children[name]), default=0)
    return heights


def frontier(graph: Graph, k: int) -> set[str]:
    """Returns the nodes at distance k from the root: the frontier of a breadth-first search after k steps."""
    return {name for name, depth in depths(graph).items() if depth == k}


def same_depth_unreachable(graph: Graph, k: int) -> set[str]:
    """Returns the control of `frontier`: nodes that the root does not reach, k edges from the nearest other source."""
    from_others = fewest_edges(graph.children, graph.sources - {graph.root})
    return {name for name, depth in from_others.items() if depth == k} - depths(graph).keys()


def classify(graph: Graph, reasoning: str, answer: str, k: int = 0) -> str:
    """Returns the class, one of CLASSES, of any text that the model wrote after k thoughts.

    Args:
        reasoning: the text before the first '#'.
        answer: as `trainer.evaluate.extract_answer` returns it.

    Spaces and line breaks are equivalent, except that an answer is right only if evaluation counts it as right.
    """
    assert k >= 0
    form = CHARACTER if graph.compact else SENTENCE
    reasoning = " ".join(reasoning.split())
    has_answer = form.fullmatch(" ".join(answer.split()))
    if not reasoning and has_answer:
        return "correct label" if answer.strip() == graph.answer else "incorrect label"
    steps = [*reasoning.replace(" ", "")] if graph.compact else _split_sentences(reasoning)
    if not has_answer and not any(form.fullmatch(step) for step in steps):
        return "other"
    path = _compact_path(graph, steps, k) if graph.compact else _path(graph, steps, k)
    if path is None:
        return "hallucination"
    return _class_of_path(graph, path, k)


def _split_sentences(text: str) -> list[str]:
    """Splits a text after each full stop; the last part may have none."""
    return [part.strip() for part in re.split(r"(?<=\.)", text) if part.strip()]


def _path(graph: Graph, sentences: list[str], k: int) -> list[str] | None:
    """Returns the nodes of a path in sentences; None if it is no path of the graph, or with k = 0 does not begin at a
    source."""
    edges = [graph.sentences.get(sentence) for sentence in sentences]
    if None in edges or any(before[1] != after[0] for before, after in pairwise(edges)):
        return None
    path = [edges[0][0], *(child for _, child in edges)]
    return path if k or path[0] in graph.sources else None


def _compact_path(graph: Graph, names: list[str], k: int) -> list[str] | None:
    """`_path` for the compact template: the first name is a child of the omitted first node."""
    before = graph.parents.get(names[0])
    if not before or any(edge not in graph.edges for edge in pairwise(names)):
        return None
    return names if k or graph.sources & {*before} else None


def _class_of_path(graph: Graph, path: list[str], k: int) -> str:
    """Returns the class of a path of the graph, whose beginning may be missing."""
    if path[-1] != graph.target:
        return "wrong target"
    from_root = depths(graph)
    beginning = from_root.get(path[0])  # edges of the shortest one
    if beginning is None or (k == 0 and beginning > 1):  # the path begins at another source
        return "hallucination"
    shortest = beginning + len(path) - 1 == from_root[graph.target]
    return "correct path" if shortest else "longer path"
