"""What `prosqa.py --check` measures of one ProsQA example: its graph, its question and its words."""

import re
from itertools import pairwise

import numpy as np
from distances import fewest_edges


class Puzzle:
    """An example's graph. Raises ValueError where root and target do not fit it, KeyError for a missing field."""

    def __init__(self, example: dict):
        self.example = example
        self.root, self.target, self.wrong = (example[key] for key in ("root", "target", "neg_target"))
        self.symbols, self.edges = example["idx_to_symbol"], [(tail, head) for tail, head in example["edges"]]
        if self.root not in (0, 1):
            raise ValueError(f"its root is node {self.root}, not 0 or 1")
        nodes = range(len(self.symbols))
        self.parents = [[tail for tail, head in self.edges if head == node] for node in nodes]
        self.children = [[head for tail, head in self.edges if tail == node] for node in nodes]
        # node -> its distance, of the nodes that the root reaches, and of those that the other root reaches
        self.mine, self.others = (fewest_edges(self.children, [root]) for root in (self.root, 1 - self.root))
        if self.target not in self.mine:
            raise ValueError("its root does not reach its target")
        # the same without the nodes that both reach
        self.exclusive = (
            {node: distance for node, distance in self.mine.items() if node not in self.others},
            {node: distance for node, distance in self.others.items() if node not in self.mine},
        )

    def leaf_distances(self, side: int) -> list[int]:
        """Of the leaves that only the root (side 0) or only the other root (side 1) reaches."""
        return [distance for node, distance in self.exclusive[side].items() if not self.children[node]]

    def reached_by(self, node: int) -> str:
        return (("neither", "other"), ("root", "both"))[node in self.mine][node in self.others]

    def shortest_paths(self, end: int) -> list[tuple[int, ...]]:
        """All from the root, in order."""
        if end == self.root:
            return [(end,)]
        before = sorted(node for node in self.parents[end] if self.mine.get(node, -2) == self.mine[end] - 1)
        return [(*path, end) for node in before for path in self.shortest_paths(node)]


def measure(example: dict) -> dict[str, list]:
    """Statistic -> its numbers or words. Raises KeyError for a missing field, ValueError where fields disagree."""
    puzzle = Puzzle(example)
    return _graph(puzzle) | _targets(puzzle) | _text(puzzle)


def _graph(puzzle: Puzzle) -> dict[str, list]:
    depth = puzzle.exclusive[0] | puzzle.exclusive[1]
    reached = puzzle.mine.keys() | puzzle.others.keys()
    return {
        "nodes": [len(puzzle.symbols)],
        "edges": [len(puzzle.edges)],
        "names": [sum(not parents for parents in puzzle.parents)],
        "leaves": [sum(not children for children in puzzle.children)],
        "in-degree of a node": [len(parents) for parents in puzzle.parents],
        "out-degree of a node": [len(children) for children in puzzle.children],
        "out-degree of the root": [len(puzzle.children[puzzle.root])],
        "out-degree of the other root": [len(puzzle.children[1 - puzzle.root])],
        "nodes of the root alone": [len(puzzle.exclusive[0])],
        "nodes of the other root alone": [len(puzzle.exclusive[1])],
        "nodes of both": [len(puzzle.mine.keys() & puzzle.others.keys())],
        "nodes of neither": [len(puzzle.symbols) - len(reached)],
        "distance of a node of one root": list(depth.values()),
        "distance of an edge's tail": [depth.get(tail, 0) for tail, _ in puzzle.edges],
        "numbers between an edge's ends": [head - tail for tail, head in puzzle.edges],
        "edges listed by head": ["yes" if a[1] <= b[1] else "no" for a, b in pairwise(puzzle.edges)],
        "tails of a head listed in order": [
            "yes" if a[0] < b[0] else "no" for a, b in pairwise(puzzle.edges) if a[1] == b[1]
        ],
    }


def _targets(puzzle: Puzzle) -> dict[str, list]:
    target, wrong, n = puzzle.target, puzzle.wrong, len(puzzle.symbols)
    depth, wrong_depth = puzzle.mine[target], puzzle.others.get(wrong, 0)
    leaves = puzzle.leaf_distances(0) + puzzle.leaf_distances(1)
    paths = puzzle.shortest_paths(target)
    walked = tuple(puzzle.symbols.index(step.rstrip(".").split()[-1]) for step in puzzle.example["steps"])
    place = paths.index((puzzle.root, *walked)) if (puzzle.root, *walked) in paths else -1
    return {
        "number of the root": [puzzle.root],
        "hops": [len(walked)],
        "shortest paths": [len(paths)],
        "steps are a shortest path": ["no" if place < 0 else "yes"],
        "place of the steps among shortest paths": [place / (len(paths) - 1)] if len(paths) > 1 and place >= 0 else [],
        "reached nodes nearer than the target": [np.mean([distance < depth for distance in puzzle.mine.values()])],
        "leaves as far as the target": [leaves.count(depth)],
        "leaves farther than the target": [sum(distance > depth for distance in leaves)],
        "in-degree of the target": [len(puzzle.parents[target])],
        "out-degree of the target": [len(puzzle.children[target])],
        "number of the target over nodes": [target / n],
        "target is reached by": [puzzle.reached_by(target)],
        "distance of the wrong target": [wrong_depth],
        "in-degree of the wrong target": [len(puzzle.parents[wrong])],
        "out-degree of the wrong target": [len(puzzle.children[wrong])],
        "number of the wrong target over nodes": [wrong / n],
        "wrong target is reached by": [puzzle.reached_by(wrong)],
        "other leaves nearer than the wrong target": [
            distance < wrong_depth for distance in puzzle.leaf_distances(1) or [wrong_depth]
        ],
    }


def _text(puzzle: Puzzle) -> dict[str, list]:
    symbols, question, steps = puzzle.symbols, puzzle.example["question"], puzzle.example["steps"]
    *facts, asked = (sentence.strip() for sentence in re.findall(r"[^.?]+[.?]", question))
    pairs = [(symbols.index(words[-4]), symbols.index(words[-1])) for words in (fact[:-1].split() for fact in facts)]
    if sorted(pairs) != sorted(puzzle.edges):
        raise ValueError("its sentences are not its edges")
    place = {pair: number / max(len(pairs) - 1, 1) for number, pair in enumerate(pairs)}
    target, wrong = (asked[:-1].split().index(symbols[node]) for node in (puzzle.target, puzzle.wrong))
    return {
        "target is offered": ["first" if target < wrong else "second"],
        "place of a step's sentence": [facts.index(step) / max(len(facts) - 1, 1) for step in steps],
        "place of a name's sentence": [place[edge] for edge in puzzle.edges if not puzzle.parents[edge[0]]],
        "first half of edges: place of sentences": [place[edge] for edge in puzzle.edges[: len(pairs) // 2]],
        "sentences in the order of their edges": [
            "yes" if place[a] < place[b] else "no" for a, b in pairwise(puzzle.edges)
        ],
        "steps in the order of their sentences": [
            "yes" if facts.index(a) < facts.index(b) else "no" for a, b in pairwise(steps)
        ],
        "words of the question": [len(question.split())],
        "characters of the question": [len(question)],
        "words of a sentence": [len(fact.split()) for fact in facts],
        "words of the answer": [len(puzzle.example["answer"].split())],
        "which names": [symbols[node] for node, parents in enumerate(puzzle.parents) if not parents],
        "which concepts": [symbols[node] for node, parents in enumerate(puzzle.parents) if parents],
        "which root": [symbols[puzzle.root]],
        "which target": [symbols[puzzle.target]],
        "which wrong target": [symbols[puzzle.wrong]],
    }
