"""Random graphs of ProsQA (Hao et al. 2024, appendix A.2) and of its mirrors, their questions, and shortest paths."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Node = TypeVar("Node", int, str)
ROOTS = (0, 1)
BIT = {0: 1, 1: 2}  # a node's label is the sum over the roots that it descends from: 3 for both, 0 for neither


@dataclass(frozen=True)
class Graph:
    """A directed acyclic graph. Every edge (a, b) has a < b."""

    parents: list[list[int]]
    labels: list[int]
    depths: list[int]  # shortest distance from the root; 0 for nodes of both roots or of none


def draw_parents(rng: np.random.Generator, group: list[int], depths: list[int], least: int = 0) -> list[int]:
    """Draws Poisson(1.5) nodes of a group, at least `least` if it has that many. Deeper nodes have more weight."""
    weights = np.array([1 + 1.5 * depths[node] for node in group])
    count = min(max(int(rng.poisson(1.5)), least), len(group))
    return rng.choice(group, count, replace=False, p=weights / weights.sum()).tolist()


def grow_graph(rng: np.random.Generator, n_nodes: int) -> Graph:
    """Grows the paper's graph node by node. A new node draws its parents from one group: with probability .35 the
    nodes that descend from root 0 alone; otherwise with probability .7 those of root 1 alone; otherwise all nodes.
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
        drawn = draw_parents(rng, group, depths)
        label = 0
        for parent in drawn:
            label |= labels[parent]
        parents.append(drawn)
        labels.append(label)
        single_root = label in BIT.values()
        depths.append(1 + min(depths[parent] for parent in drawn if labels[parent]) if single_root else 0)
    return Graph(parents, labels, depths)


def choose_question(rng: np.random.Generator, graph: Graph) -> tuple[int, int, int] | None:
    """Returns (root, target, neg_target), or None if a root has no leaf that only it reaches.

    The target is the deepest leaf that a single root reaches; ties are drawn. The wrong target is drawn from the leaves
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


def grow_side(rng: np.random.Generator, n_nodes: int, hops: int) -> Graph:
    """Grows a graph under one root, node 0, with a depth of exactly `hops`. Its deepest nodes are leaves.

    A new node draws one or more parents among the nodes at depths below `hops`. Once every remaining node is needed to
    reach the full depth, each goes one deeper. A parent is at most one edge deeper than its child: a deeper one would
    open a path against the edges that is shorter than the hops.
    """
    parents: list[list[int]] = [[]]
    depths = [0]
    for node in range(1, n_nodes):
        lacking = hops - max(depths)
        least = max(depths) if lacking == n_nodes - node else 0
        group = [other for other in range(node) if least <= depths[other] < hops]
        drawn = draw_parents(rng, group, depths, least=1)
        depth = 1 + min(depths[parent] for parent in drawn)
        parents.append([parent for parent in drawn if depths[parent] <= depth + 1])
        depths.append(depth)
    return Graph(parents, [BIT[0]] * n_nodes, depths)


def shortest_path(rng: np.random.Generator, edges: list[tuple[int, int]], root: int, target: int) -> list[int]:
    """Draws a path with the fewest edges from root to target, uniformly among all of them."""
    parents, children = defaultdict(list), defaultdict(list)
    for tail, head in edges:
        parents[head].append(tail)
        children[tail].append(head)
    distance = fewest_edges(children, [root])
    n_paths = {**dict.fromkeys(distance, 0), root: 1}  # node -> number of shortest paths from the root
    for node in distance:
        for child in children[node]:
            n_paths[child] += n_paths[node] * (distance[child] == distance[node] + 1)
    path = [target]
    while path[-1] != root:
        before = [node for node in parents[path[-1]] if distance.get(node, -2) == distance[path[-1]] - 1]
        weights = np.array([n_paths[node] for node in before], dtype=float)
        path.append(before[rng.choice(len(before), p=weights / weights.sum())])
    return path[::-1]


def fewest_edges(neighbours: Mapping[Node, list[Node]] | Sequence, starts: Iterable[Node]) -> dict[Node, int]:
    """Returns node -> number of edges from the nearest start. Starts have 0; unreachable nodes are absent.

    The order is by distance, then by node, so that it is the same in every process.
    """
    distances = dict.fromkeys(sorted(starts), 0)
    frontier, edges = {*distances}, 0
    while frontier:
        edges += 1
        frontier = {neighbour for node in frontier for neighbour in neighbours[node]} - distances.keys()
        distances |= dict.fromkeys(sorted(frontier), edges)
    return distances
