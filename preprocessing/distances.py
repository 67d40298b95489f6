"""Distances in graphs, for `prosqa.py --check`, shortcuts.py and analysis/paths.py; imports no numpy."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

Node = TypeVar("Node", int, str)


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
