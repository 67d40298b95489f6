"""Whether thoughts hold a search: values of nodes, the frontier, how many paths are kept open (paper, Section 5).

A node's value after k thoughts is how likely its name is when language is forced there: the next step begins with a
node at `Graphs.distance(k)` from the root. Legend: N questions, C names.
"""

from __future__ import annotations

import numpy as np

from analysis import paths
from analysis.tasks import Graphs

TOP = 3


def parallelism(values: np.ndarray) -> dict:
    """{"mean": [3]}: how much of the value of all names the likeliest 1, 2 and 3 have together, on average over the
    questions, of one (N, C) of values. Names that a question lacks count as 0."""
    total = values.sum(1, keepdims=True)
    shares = np.sort(values / np.maximum(total, 1e-12), axis=1)[:, ::-1][:, :TOP].cumsum(1)  # (N, 3)
    return {"mean": shares.mean(0).tolist()}


def frontier(task: Graphs, values: np.ndarray, k: int) -> dict:
    """After k thoughts: how often a node that a search by breadth would name next is valued above one of the same depth
    that cannot be reached (the area under the ROC curve, ties as half), within a question; and the mean values of both,
    renormalised over the names."""
    areas, of_frontier, of_others = [], [], []
    distance = task.distance(k)
    for graph, example, row in zip(task.graphs, task.examples, values, strict=True):
        place = {name: number for number, name in enumerate(example["idx_to_symbol"])}
        row = row / max(row.sum(), 1e-12)
        inside = row[[place[name] for name in sorted(paths.frontier(graph, distance))]]
        outside = row[[place[name] for name in sorted(paths.same_depth_unreachable(graph, distance))]]
        if len(inside) and len(outside):
            areas.append(((inside[:, None] > outside).mean() + (inside[:, None] >= outside).mean()) / 2)
            of_frontier.extend(inside)
            of_others.extend(outside)
    found = {"thoughts": k, "questions": len(areas)}
    if areas:
        means = {"auc": areas, "frontier": of_frontier, "others": of_others}
        found |= {name: float(np.mean(values)) for name, values in means.items()}
    return found


def by_height(task: Graphs, values: np.ndarray, k: int) -> list[dict]:
    """After k thoughts: the mean value of the frontier's nodes, renormalised over the frontier, by their distance to a
    leaf; right ones, on a shortest path to the target, apart from the others."""
    found: dict[tuple[int, bool], list[float]] = {}
    distance = task.distance(k)
    for graph, example, row in zip(task.graphs, task.examples, values, strict=True):
        place = {name: number for number, name in enumerate(example["idx_to_symbol"])}
        nodes = sorted(paths.frontier(graph, distance))
        if len(nodes) < 2:
            continue  # the only node has all of the value
        shares = row[[place[name] for name in nodes]]
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
    """The arguments of `figures.tree`: layers, edges, renormalised values of one (N, C) of values, roles."""
    graph, example = task.graphs[index], task.examples[index]
    row = values[index, : len(example["idx_to_symbol"])]
    row = row / max(row.sum(), 1e-12)
    layers = paths.depths(graph)
    for source in sorted(graph.sources - {graph.root}):
        for name, depth in paths.distances(graph, source).items():
            layers[name] = min(depth, layers.get(name, depth))
    return {
        "nodes": layers,
        "edges": sorted(graph.edges),
        "values": dict(zip(example["idx_to_symbol"], map(float, row), strict=True)),
        "marked": {graph.root: "root", graph.target: "target", graph.other: "other"},
    }
