"""Generates ProsQA: "Is Tom a lempus or scrompus?" over a random graph in which only one of the two can be reached.

The graphs follow the paper's appendix (Hao et al. 2024, A.2): two roots; every new node descends from one of them, from
both or from neither; the question asks for a leaf that only one root reaches, against one that only the other reaches.
Fields as in the authors' files: question, answer, steps (one shortest path), idx_to_symbol, edges, root, target,
neg_target.

    python preprocessing/prosqa.py                        # data/prosqa_{train,valid,test}.json, 17,886/300/500
    python preprocessing/prosqa.py --train 2000 --nodes 14 --max-hops 4
    python preprocessing/prosqa.py --check FILE           # is FILE like what this generator makes?
    python preprocessing/prosqa.py --check FILE OTHER     # are the two alike? exit code 1 where they are not
"""

import argparse
import sys
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from compare import check
from files import UserError, load_examples, report
from prosqa_statistics import measure
from splits import add_drawing_options, add_split_options, draw, parse_splits, publish_splits

NAMES = [
    "Alex",
    "Bob",
    "Carol",
    "Davis",
    "Eva",
    "Fae",
    "Gabriel",
    "Jack",
    "Max",
    "Oliver",
    "Polly",
    "Rex",
    "Sally",
    "Sam",
    "Stella",
    "Tom",
    "Wren",
]
CONCEPTS = [
    "bompus",
    "boompus",
    "brimpus",
    "chorpus",
    "dumpus",
    "felpus",
    "fompus",
    "gerpus",
    "gorpus",
    "grimpus",
    "gwompus",
    "hilpus",
    "impus",
    "jelpus",
    "jompus",
    "kerpus",
    "lempus",
    "lorpus",
    "numpus",
    "quimpus",
    "rempus",
    "rompus",
    "rorpus",
    "scrompus",
    "shumpus",
    "sterpus",
    "storpus",
    "terpus",
    "timpus",
    "tumpus",
    "vumpus",
    "worpus",
    "wumpus",
    "yerpus",
    "yimpus",
    "yumpus",
    "zhorpus",
    "zumpus",
]
ROOTS = (0, 1)
BIT = {0: 1, 1: 2}  # a node's label: which roots it descends from; 3 for both, 0 for neither


@dataclass(frozen=True)
class Settings:
    """The size and words of the graphs. Hops are edges between the root and the target."""

    nodes: int = 28
    min_hops: int = 3
    max_hops: int = 6
    names: tuple[str, ...] = tuple(NAMES)
    concepts: tuple[str, ...] = tuple(CONCEPTS)


@dataclass(frozen=True)
class Graph:
    """A directed acyclic graph: nodes are numbered so that every edge (a, b) has a < b."""

    parents: list[list[int]]
    labels: list[int]
    depths: list[int]  # shortest distance to the node's root; 0 for nodes of both roots or of none


def grow_graph(rng: np.random.Generator, n_nodes: int) -> Graph:
    """Adds nodes one by one; a new node draws Poisson(1.5) parents, deep ones with more weight, from one group.

    The group: nodes that descend from root 0 alone with probability .35; else, the random number being drawn anew,
    from root 1 alone with .7; else all nodes.
    """
    parents: list[list[int]] = [[], []]
    labels, depths = [BIT[0], BIT[1]], [0, 0]
    for node in range(2, n_nodes):
        if rng.random() < 0.35:
            group = [other for other in range(node) if labels[other] == BIT[0]]
        elif rng.random() < 0.7:
            group = [other for other in range(node) if labels[other] == BIT[1]]
        else:
            group = list(range(node))
        weights = np.array([1 + 1.5 * depths[other] for other in group])
        count = min(int(rng.poisson(1.5)), len(group))
        drawn = rng.choice(group, count, replace=False, p=weights / weights.sum()).tolist()
        label = 0
        for parent in drawn:
            label |= labels[parent]
        parents.append(drawn)
        labels.append(label)
        single_root = label in BIT.values()
        depths.append(1 + min(depths[parent] for parent in drawn if labels[parent]) if single_root else 0)
    return Graph(parents, labels, depths)


def choose_question(rng: np.random.Generator, graph: Graph) -> tuple[int, int, int] | None:
    """(root, target, neg_target), or None where a root has no leaf of its own.

    The target is the deepest leaf that a single root reaches, ties drawn; the wrong target is drawn among the leaves
    that only the other root reaches.
    """
    inner = {parent for drawn in graph.parents for parent in drawn}
    leaves = {
        root: [node for node in range(2, len(graph.labels)) if graph.labels[node] == BIT[root] and node not in inner]
        for root in ROOTS
    }
    if not leaves[0] or not leaves[1]:
        return None
    deepest = max(graph.depths[leaf] for root in ROOTS for leaf in leaves[root])
    candidates = [(root, leaf) for root in ROOTS for leaf in leaves[root] if graph.depths[leaf] == deepest]
    root, target = candidates[rng.integers(len(candidates))]
    others = leaves[1 - root]
    return root, target, others[rng.integers(len(others))]


def shortest_path(rng: np.random.Generator, edges: list[tuple[int, int]], root: int, target: int) -> list[int]:
    """A path from root to target with the fewest edges, drawn among all such."""
    parents: dict[int, list[int]] = {}
    children: dict[int, list[int]] = {}
    for tail, head in edges:
        parents.setdefault(head, []).append(tail)
        children.setdefault(tail, []).append(head)
    distance, ways, queue = {root: 0}, {root: 1}, deque([root])
    while queue:
        node = queue.popleft()
        for child in children.get(node, []):
            if child not in distance:
                distance[child], ways[child] = distance[node] + 1, 0
                queue.append(child)
            if distance[child] == distance[node] + 1:
                ways[child] += ways[node]
    path = [target]
    while path[-1] != root:
        before = [node for node in parents[path[-1]] if distance.get(node, -2) == distance[path[-1]] - 1]
        weights = np.array([ways[node] for node in before], dtype=float)
        path.append(before[rng.choice(len(before), p=weights / weights.sum())])
    return path[::-1]


def make_example(rng: np.random.Generator, settings: Settings) -> dict | None:
    """One example, or None where the drawn graph has no question with the hops that are asked for."""
    graph = grow_graph(rng, settings.nodes)
    choice = choose_question(rng, graph)
    if choice is None or not settings.min_hops <= graph.depths[choice[1]] <= settings.max_hops:
        return None
    edges = [(parent, node) for node, drawn in enumerate(graph.parents) for parent in drawn]
    number = {node: place for place, node in enumerate(sorted({node for edge in edges for node in edge}))}
    edges = [(number[tail], number[head]) for tail, head in edges]
    root, target, neg_target = (number[node] for node in choice)
    heads = {head for _, head in edges}
    n_names = len(number) - len(heads)
    if n_names > len(settings.names) or len(heads) > len(settings.concepts):
        return None
    names = iter(rng.permutation(settings.names)[:n_names].tolist())
    concepts = iter(rng.permutation(settings.concepts)[: len(heads)].tolist())
    symbols = [next(concepts) if node in heads else next(names) for node in range(len(number))]

    def sentence(edge: tuple[int, int]) -> str:
        subject = f"Every {symbols[edge[0]]}" if edge[0] in heads else symbols[edge[0]]
        return f"{subject} is a {symbols[edge[1]]}."

    path = shortest_path(rng, edges, root, target)
    facts = [sentence(edges[place]) for place in rng.permutation(len(edges))]
    first, second = (target, neg_target) if rng.random() < 0.5 else (neg_target, target)
    return {
        "question": " ".join([*facts, f"Is {symbols[root]} a {symbols[first]} or {symbols[second]}?"]),
        "answer": f"{symbols[root]} is a {symbols[target]}.",
        "steps": [sentence(edge) for edge in pairwise(path)],
        "idx_to_symbol": symbols,
        "edges": [list(edge) for edge in edges],
        "root": root,
        "target": target,
        "neg_target": neg_target,
    }


def named_edges(example: dict) -> frozenset[tuple[str, str]]:
    """The graph whatever its nodes' numbers: two questions with different graphs are different."""
    symbols = example["idx_to_symbol"]
    return frozenset((symbols[tail], symbols[head]) for tail, head in example["edges"])


def make_splits(
    sizes: dict[str, int], settings: Settings, seed: int | tuple[int, ...], progress: bool = False
) -> dict[str, list[dict]]:
    """Splits of the given sizes; no graph, and so no question, occurs twice within a split or across them.

    Raises UserError where the settings hardly ever allow a question.
    """
    rng = np.random.default_rng(seed)
    hopeless = (
        f"graphs of {settings.nodes} nodes with these words hardly ever have a new question of "
        f"{settings.min_hops} to {settings.max_hops} hops"
    )
    return draw(sizes, lambda: make_example(rng, settings), progress, named_edges, hopeless)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_split_options(parser, train=17886, valid=300, test=500)
    parser.add_argument("--nodes", type=int, default=28, help="nodes before isolated ones go (default: %(default)s)")
    parser.add_argument("--min-hops", type=int, default=3, help="fewest steps (default: %(default)s)")
    parser.add_argument("--max-hops", type=int, default=6, help="most steps (default: %(default)s)")
    parser.add_argument("--names", nargs="+", default=NAMES, metavar="NAME", help="who is asked about")
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS, metavar="CONCEPT", help="what they may be")
    parser.add_argument("--prefix", default="prosqa", help="of the file names (default: %(default)s)")
    add_drawing_options(parser, checks=True)
    options, sizes = parse_splits(parser, arguments)
    if options.nodes < 4 or not 1 <= options.min_hops <= options.max_hops:
        parser.error("--nodes must be at least 4, and 1 <= min-hops <= max-hops")
    settings = Settings(
        options.nodes,
        options.min_hops,
        options.max_hops,
        tuple(dict.fromkeys(options.names)),
        tuple(dict.fromkeys(options.concepts)),
    )
    try:
        if options.check:
            generate = partial(make_splits, settings=settings)
            return check(options.check, load_examples, generate, measure, options.seed)
        publish_splits(make_splits(sizes, settings, options.seed, progress=True), options.out, options.prefix)
    except UserError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
