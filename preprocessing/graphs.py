"""The random graphs of prosqa.py: the paper's (Hao et al. 2024, A.2), with a question about two leaves, and those under
one root; and the ways through them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Node = TypeVar("Node", int, str)
ROOTS = (0, 1)
BIT = {0: 1, 1: 2}  # a node's label: which roots it descends from; 3 for both, 0 for neither


@dataclass(frozen=True)
class Graph:
    """A directed acyclic graph: nodes are numbered so that every edge (a, b) has a < b."""

    parents: list[list[int]]
    labels: list[int]
    depths: list[int]  # shortest distance to the node's root; 0 for nodes of both roots or of none


def draw_parents(rng: np.random.Generator, group: list[int], depths: list[int], least: int = 0) -> list[int]:
    """Poisson(1.5) nodes of a group, at least so many if it has them, deep ones with more weight."""
    weights = np.array([1 + 1.5 * depths[node] for node in group])
    count = min(max(int(rng.poisson(1.5)), least), len(group))
    return rng.choice(group, count, replace=False, p=weights / weights.sum()).tolist()


def grow_graph(rng: np.random.Generator, n_nodes: int) -> Graph:
    """Adds nodes one by one; a new node draws its parents from one group: nodes that descend from root 0 alone with
    probability .35; else, with a new random number, from root 1 alone with .7; else all nodes.
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


def grow_side(rng: np.random.Generator, n_nodes: int, hops: int) -> Graph:
    """A graph under one root, node 0, whose deepest nodes are `hops` below it, so they are leaves.

    Every new node draws a parent or more among the nodes less than `hops` deep. Where only so many nodes are left as
    depth is lacking, each goes one deeper. No parent is more than one edge deeper than its child, or a way against the
    edges would be shorter than the hops.
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
    """A path from root to target with the fewest edges, drawn among all such."""
    parents, children = defaultdict(list), defaultdict(list)
    for tail, head in edges:
        parents[head].append(tail)
        children[tail].append(head)
    distance = fewest_edges(children, [root])
    ways = {**dict.fromkeys(distance, 0), root: 1}  # the number of shortest paths from the root
    for node in distance:
        for child in children[node]:
            ways[child] += ways[node] * (distance[child] == distance[node] + 1)
    path = [target]
    while path[-1] != root:
        before = [node for node in parents[path[-1]] if distance.get(node, -2) == distance[path[-1]] - 1]
        weights = np.array([ways[node] for node in before], dtype=float)
        path.append(before[rng.choice(len(before), p=weights / weights.sum())])
    return path[::-1]


def fewest_edges(neighbours: Mapping[Node, list[Node]] | Sequence, starts: Iterable[Node]) -> dict[Node, int]:
    """Node -> the fewest edges from the nearest start, which has 0; nodes out of reach are left out.

    Ordered by distance, then by node, so that every process gets the same order.
    """
    distances = dict.fromkeys(sorted(starts), 0)
    frontier, edges = {*distances}, 0
    while frontier:
        edges += 1
        frontier = {neighbour for node in frontier for neighbour in neighbours[node]} - distances.keys()
        distances |= dict.fromkeys(sorted(frontier), edges)
    return distances
