"""What `prosqa.py --check` measures of one ProsQA example: its graph, its question and its words."""

import re
from itertools import pairwise

import numpy as np
from graphs import fewest_edges


class Puzzle:
    """An example's graph. Raises ValueError where root and target do not fit it, KeyError for a missing field."""

    def __init__(self, example: dict):
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
    return _graph(puzzle) | _targets(puzzle, example["steps"]) | _text(puzzle, example["question"], example["steps"])


def _graph(puzzle: Puzzle) -> dict[str, list]:
    exclusive = [node for node in range(len(puzzle.symbols)) if (node in puzzle.mine) != (node in puzzle.others)]
    return {
        "nodes": [len(puzzle.symbols)],
        "edges": [len(puzzle.edges)],
        "leaves": [sum(not children for children in puzzle.children)],
        "in-degree of a node": [len(parents) for parents in puzzle.parents],
        "out-degree of a node": [len(children) for children in puzzle.children],
        "nodes of the root alone": [len(puzzle.mine.keys() - puzzle.others.keys())],
        "nodes of the other root alone": [len(puzzle.others.keys() - puzzle.mine.keys())],
        "nodes of both": [len(puzzle.mine.keys() & puzzle.others.keys())],
        "distance of a node of one root": [(puzzle.mine | puzzle.others)[node] for node in exclusive],
        "numbers between an edge's ends": [head - tail for tail, head in puzzle.edges],
    }


def _targets(puzzle: Puzzle, steps: list[str]) -> dict[str, list]:
    mine, others, target, wrong = puzzle.mine, puzzle.others, puzzle.target, puzzle.wrong
    leaves = [
        (mine | others)[node]
        for node, children in enumerate(puzzle.children)
        if not children and (node in mine) != (node in others)
    ]
    walked = tuple(puzzle.symbols.index(step.rstrip(".").split()[-1]) for step in steps)
    paths = puzzle.shortest_paths(target)
    return {
        "hops": [len(walked)],
        "shortest paths": [len(paths)],
        "steps are a shortest path": [(puzzle.root, *walked) in paths],
        "reached nodes nearer than the target": [np.mean([distance < mine[target] for distance in mine.values()])],
        "leaves as far as the target": [leaves.count(mine[target])],
        "leaves farther than the target": [sum(distance > mine[target] for distance in leaves)],
        "number of the target over nodes": [target / len(puzzle.symbols)],
        "target is reached by": [puzzle.reached_by(target)],
        "distance of the wrong target": [others.get(wrong, 0)],
        "out-degree of the wrong target": [len(puzzle.children[wrong])],
        "wrong target is reached by": [puzzle.reached_by(wrong)],
    }


def _text(puzzle: Puzzle, question: str, steps: list[str]) -> dict[str, list]:
    symbols = puzzle.symbols
    *facts, asked = (sentence.strip() for sentence in re.findall(r"[^.?]+[.?]", question))
    pairs = [(symbols.index(words[-4]), symbols.index(words[-1])) for words in (fact[:-1].split() for fact in facts)]
    if sorted(pairs) != sorted(puzzle.edges):
        raise ValueError("its sentences are not its edges")
    target, wrong = (asked[:-1].split().index(symbols[node]) for node in (puzzle.target, puzzle.wrong))
    return {
        "target is offered first": [target < wrong],
        "sentences in the order of their edges": [pairs.index(a) < pairs.index(b) for a, b in pairwise(puzzle.edges)],
        "steps in the order of their sentences": [facts.index(a) < facts.index(b) for a, b in pairwise(steps)],
        "words of the question": [len(question.split())],
        "which names": [symbols[node] for node, parents in enumerate(puzzle.parents) if not parents],
        "which concepts": [symbols[node] for node, parents in enumerate(puzzle.parents) if parents],
        "which root": [symbols[puzzle.root]],
        "which target": [symbols[puzzle.target]],
        "which wrong target": [symbols[puzzle.wrong]],
    }
