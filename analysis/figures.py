"""Figures: as SVG for `page`, as PNG for Markdown.

They do without pyplot, which looks for a display and keeps each figure until it is closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean

from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# series differ in colour, and also in marker and line style, or in hatch
COLOURS = ["#1f78b4", "#d95f02", "#1b9e77", "#cc5f9e", "#a08a00", "#8d6fd1", "#808080"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
LINES = ["-", "--", "-.", ":", "-", "--", "-."]
HATCHES = ["", "///", "xxx", "---", "\\\\\\", "|||", "+++"]
LOOK = {
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True},
    **{"grid.alpha": 0.3, "hatch.linewidth": 0.5, "legend.frameon": False},
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS) + cycler(linestyle=LINES),
    **{"svg.fonttype": "none", "svg.hashsalt": "coconut", "text.parse_math": False},
}
WIDTH, HEIGHT = 7.2, 4.0  # inches
MOST_MARKS = 25  # labels of stages that fit beside each other


@rc_context(LOOK)
def svg(figure: Figure) -> str:
    """Returns a figure as an <svg> element on white. The same numbers give the same bytes."""
    file = StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return file.getvalue()[file.getvalue().index("<svg") :]


@rc_context(LOOK)
def picture(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file."""
    figure.savefig(path, dpi=110, metadata={"Software": None})


def blank(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Returns an empty figure, width by height in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def finished(figure: Figure, ylabel: str, n_series: int) -> Figure:
    """Adds the y label and a legend of several series. An axis of percentages spans 0 to 100 in every figure."""
    (panel,) = figure.axes
    panel.set_ylabel(ylabel)
    if ylabel.endswith("%"):
        panel.set_ylim(-2 if panel.lines else 0, 102)
    if n_series > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


@rc_context(LOOK)
def lines(
    series: dict[str, list[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    marks: Sequence[tuple[float, str]] = (),
    joined: bool = True,
) -> Figure:
    """Draws each series of (x, y) as a line, with a gap where y is NaN, or as points.

    Args:
        marks: (x, label) of dotted vertical lines, such as the beginnings of stages; at most MOST_MARKS are drawn.
        joined: whether lines join the points.
    """
    figure, panel = blank()
    for name, points in series.items():
        x, y = zip(*points, strict=True) if points else ((), ())
        look = {"markevery": max(1, len(points) // 12)} if joined else {"linestyle": ""}
        panel.plot(x, y, label=name, **look)
    panel.set_xlabel(xlabel)
    if all(float(x).is_integer() for points in series.values() for x, _ in points):
        panel.xaxis.get_major_locator().set_params(integer=True)  # no tick at epoch 1.5
    turned = {"rotation": 90, "ha": "center"} if len(marks) > 5 else {}
    for x, label in marks[:: 1 + len(marks) // MOST_MARKS]:
        panel.axvline(x, color="0.6", linestyle=":", marker="", linewidth=1)
        panel.text(x, 1.01, label, transform=panel.get_xaxis_transform(), fontsize=8, va="bottom", **turned)
    return finished(figure, ylabel, len(series))


@rc_context(LOOK)
def make_logarithmic(figure: Figure) -> None:
    """Makes the y axis logarithmic, with plain numbers at the powers of ten."""
    figure.axes[0].set_yscale("log")
    figure.axes[0].yaxis.set_major_formatter("{x:g}")
    figure.axes[0].yaxis.set_minor_formatter("")


@rc_context(LOOK)
def bars(groups: list[str], series: dict[str, list[float | None]], ylabel: str) -> Figure:
    """Draws a bar for each series side by side in each group, and a dash for a value of None."""
    figure, panel = blank()
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        look = {"label": name, "color": COLOURS[number], "hatch": HATCHES[number]}
        places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        panel.bar(places, [value or 0 for value in values], 0.92 * width, **look)
        for x, value in zip(places, values, strict=True):
            if value is None:
                panel.text(x, 0, "\N{EN DASH}", ha="center", va="bottom")
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, groups)) > 8 else {}
    panel.set_xticks(range(len(groups)), groups, **slanted)
    return finished(figure, ylabel, len(series))


@rc_context(LOOK)
def stacked(groups: list[str], parts: dict[str, list[float]], xlabel: str, ylabel: str) -> Figure:
    """Draws a bar for each group that stacks the parts, the first at the bottom.

    A part's colour and hatch depend only on its index in `parts`. A part that is 0 in all groups is not in the legend.
    """
    figure, panel = blank()
    below = [0.0] * len(groups)
    for number, (name, values) in enumerate(parts.items()):
        if any(values):
            panel.bar(groups, values, 0.7, below, label=name, color=COLOURS[number], hatch=HATCHES[number])
            below = [low + value for low, value in zip(below, values, strict=True)]
    panel.set_xlabel(xlabel)
    return finished(figure, ylabel, len(parts))


SHAPES = {"root": ("s", COLOURS[0]), "target": ("*", COLOURS[1]), "other": ("^", COLOURS[2])}  # marker and colour
PLAIN = ("o", COLOURS[6])


@rc_context(LOOK)
def tree(
    nodes: dict[str, int], edges: list[tuple[str, str]], values: dict[str, float], marked: dict[str, str]
) -> Figure:
    """Draws a directed graph from top to bottom. A node's area shows its value; its name and value stand below it.

    Args:
        nodes: name -> layer, 0 for the root.
        edges: (from, to), names of nodes.
        values: name -> value, between 0 and 1.
        marked: name -> "root", "target" or "other", which sets the node's shape and stands below it.
    """
    rows = layers(nodes, edges)
    figure, panel = blank(max(WIDTH, 0.9 * max(map(len, rows))), 1.3 * len(rows) + 0.2)
    places = {name: ((n + 0.5) / len(row), -depth) for depth, row in enumerate(rows) for n, name in enumerate(row)}
    for start, end in edges:
        bend = 0 if nodes[end] == nodes[start] + 1 else 0.25  # a straight edge over several layers would cross nodes
        arrow = {"arrowstyle": "->", "alpha": 0.5, "shrinkA": 9, "shrinkB": 9, "connectionstyle": f"arc3,rad={bend}"}
        panel.annotate("", xy=places[end], xytext=places[start], arrowprops=arrow)
    for name, place in places.items():
        marker, colour = SHAPES[marked[name]] if name in marked else PLAIN
        size = 30 + 1000 * values[name]  # square points
        panel.scatter(*place, s=size, marker=marker, color=colour, zorder=4)
        words = "\n".join(filter(None, [name, f"{values[name]:.0%}", marked.get(name)]))
        panel.annotate(
            words, place, (0, -2 - size**0.5 / 2), textcoords="offset points", va="top", ha="center", zorder=5
        )
    panel.set(xlim=(0, 1), ylim=(0.3 - len(rows), 0.4))
    panel.axis("off")
    return figure


def layers(nodes: dict[str, int], edges: list[tuple[str, str]]) -> list[list[str]]:
    """Orders the nodes of each layer from left to right by the mean position of their parents (the barycentre method,
    Sugiyama et al. 1981), so that few edges cross."""
    rows = [[name for name, layer in nodes.items() if layer == depth] for depth in range(1 + max(nodes.values()))]
    place: dict[str, float] = {}
    for row in rows:
        above = {name: [place[start] for start, end in edges if end == name and start in place] for name in row}
        row.sort(key=lambda name, above=above: fmean(above[name] or [0.5]))
        place |= {name: (number + 0.5) / len(row) for number, name in enumerate(row)}
    return rows
