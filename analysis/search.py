"""Whether thoughts search a graph: values of nodes, the frontier, how many paths stay open (paper, Section 5).

A node's value after k thoughts is the probability of its name if language begins there. The next step then begins with
a node `Graphs.distance(k)` edges from the root. Legend: N questions, C names.
"""

from __future__ import annotations

import numpy as np

from analysis import paths
from analysis.tasks import Graphs

TOP = 3


def parallelism(values: np.ndarray) -> dict:
    """Returns {"mean": shares}: how much of the names' total value the likeliest 1, 2 and 3 names have together, a mean
    over the questions.

    values: (N, C), 0 in the columns that a question has no name for.
    """
    total = values.sum(1, keepdims=True)
    shares = np.sort(values / np.maximum(total, 1e-12), axis=1)[:, ::-1][:, :TOP].cumsum(1)  # (N, 3)
    return {"mean": shares.mean(0).tolist()}


def auc(inside, outside) -> float:
    """Returns the area under the ROC curve: the share of pairs in which the inside value is larger; a tie counts as
    half. Takes two arrays or tensors, of at least one value each."""
    pairs = inside[:, None] - outside
    return float((pairs > 0).sum() + 0.5 * (pairs == 0).sum()) / (len(inside) * len(outside))


def frontier(task: Graphs, values: np.ndarray, k: int) -> dict:
    """Compares, after k thoughts, the values of a breadth-first search's frontier and of unreachable nodes at the same
    depth: the mean area under the ROC curve within a question, and both mean values, renormalised over the names."""
    areas, of_frontier, of_others = [], [], []
    distance = task.distance(k)
    for graph, row in zip(task.graphs, values, strict=True):
        value = dict(zip(graph.names, row / max(row.sum(), 1e-12), strict=False))
        inside = np.array([value[name] for name in sorted(paths.frontier(graph, distance))])
        outside = np.array([value[name] for name in sorted(paths.same_depth_unreachable(graph, distance))])
        if len(inside) and len(outside):
            areas.append(auc(inside, outside))
            of_frontier.extend(inside)
            of_others.extend(outside)
    found = {"thoughts": k, "questions": len(areas)}
    if areas:
        means = {"auc": areas, "frontier": of_frontier, "others": of_others}
        found |= {name: float(np.mean(values)) for name, values in means.items()}
    return found


def by_height(task: Graphs, values: np.ndarray, k: int) -> list[dict]:
    """Returns the mean value of the frontier's nodes after k thoughts, renormalised over the frontier, by height
    (distance to a leaf) and by whether a node is right, that is on a shortest path to the target."""
    found: dict[tuple[int, bool], list[float]] = {}
    distance = task.distance(k)
    for graph, row in zip(task.graphs, values, strict=True):
        value, nodes = dict(zip(graph.names, row, strict=False)), sorted(paths.frontier(graph, distance))
        if len(nodes) < 2:
            continue  # renormalised, the only node has value 1
        shares = np.array([value[name] for name in nodes])
        shares = shares / max(shares.sum(), 1e-12)
        heights, left = paths.height(graph), paths.depths(graph)[graph.target] - distance
        for name, share in zip(nodes, shares, strict=True):
            is_right = paths.distances(graph, name).get(graph.target) == left
            found.setdefault((heights[name], is_right), []).append(float(share))
    return [
        {"thoughts": k, "height": height, "right": is_right, "nodes": len(shares), "value": float(np.mean(shares))}
        for (height, is_right), shares in sorted(found.items())
    ]


def tree(task: Graphs, index: int, values: np.ndarray) -> dict:
    """Returns the arguments of `figures.tree` for one question, with values, (N, C), renormalised over its names."""
    graph = task.graphs[index]
    row = values[index, : len(graph.names)]
    row = row / max(row.sum(), 1e-12)
    layers = paths.depths(graph)
    for source in sorted(graph.sources - {graph.root}):
        for name, depth in paths.distances(graph, source).items():
            layers[name] = min(depth, layers.get(name, depth))
    return {
        "nodes": layers,
        "edges": sorted(graph.edges),
        "values": dict(zip(graph.names, map(float, row), strict=True)),
        "marked": {graph.root: "root", graph.target: "target", graph.other: "other"},
    }
