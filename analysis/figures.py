"""Figures for `page`: matplotlib's, as SVG for an HTML page. Their colours work on white and on black.

matplotlib takes a second to import. Figures are made without pyplot, which would look for a display and keep each of
them until it is closed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Style(NamedTuple):
    """What distinguishes one series from the others: never its colour alone."""

    colour: str
    marker: str
    line: str | tuple  # matplotlib's linestyle
    hatch: str


# Colours of middle lightness, 3 : 1 or more against both of the page's backgrounds, and apart for the colour-blind;
# orange and ochre, blue and violet are the nearest to each other, and so not beside each other
STYLES = [
    Style("#1f78b4", "o", "-", ""),
    Style("#d95f02", "s", "--", "///"),
    Style("#1b9e77", "^", "-.", "xxx"),
    Style("#cc5f9e", "D", (0, (1, 1)), "---"),
    Style("#a08a00", "v", (0, (5, 1, 1, 1, 1, 1)), "\\\\\\"),
    Style("#8d6fd1", "P", (0, (8, 3)), "|||"),
    Style("#808080", "X", (0, (3, 3)), "+++"),
]
INK = "#010203"  # text and axes: `svg` makes it currentColor, the colour of the page's text
LETTERS, SMALL = 10, 8  # points; small are the names of marks
LOOK = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **{"axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "font.size": LETTERS, "hatch.linewidth": 0.8},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": INK, "grid.alpha": 0.12, "lines.linewidth": 1.5},
    **{"svg.fonttype": "none", "svg.hashsalt": "coconut", "text.parse_math": False},
}
WIDTH, HEIGHT = 7.2, 4.0  # inches
LETTER = 0.6  # a letter's width, at most, as a share of its size
FAINT = 0.3  # opacity of areas
SHRUNK = 0.75  # least share of its width that a drawing has on a narrow screen: a smaller one is unreadable

# ---------------------------------------------------------------------------------------------------------------
# From matplotlib to a page
# ---------------------------------------------------------------------------------------------------------------


@rc_context(LOOK)
def svg(figure: Figure) -> str:
    """A figure as an <svg> element: text in the page's font, neutral colours as the page's text, no background.

    The same numbers give the same bytes. Ids begin with a digest of the drawing, so that several fit in one page.
    """
    file = StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    elements = list(root.iter())
    for element in elements:
        element.tag = element.tag.rpartition("}")[2]
        # names without their namespaces: in HTML, svg has none to declare, and href needs no xlink
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if style := element.get("style"):
            element.set("style", re.sub(r"font-family: [^;]*; ", "", style).replace(INK, "currentColor"))
    for definitions in root.findall("defs"):
        if definitions.find("style") is not None:
            root.remove(definitions)  # its rule would apply to the whole page: the root's style takes its place
    narrowest = f"{SHRUNK * 72 * figure.get_figwidth():.0f}pt"
    root.set("style", f"stroke-linejoin: round; stroke-linecap: butt; min-width: {narrowest}")
    root.set("xmlns", "http://www.w3.org/2000/svg")
    digest = hashlib.sha256(ElementTree.tostring(root)).hexdigest()[:10]
    references = {value for element in elements for value in element.attrib.values() if "#" in value}
    used = set(re.findall(r"(?<=#)\w+", " ".join(references)))
    for element in elements:
        for name, value in list(element.attrib.items()):
            if name == "id" and value in used:
                element.set("id", f"f{digest}-{value}")
            elif name == "id":
                del element.attrib["id"]  # figure_1, text_1: not referenced
            else:
                element.set(name, re.sub(r"^#|(?<=url\()#", f"#f{digest}-", value))
    return ElementTree.tostring(root, encoding="unicode")


def picture(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG on white, for Markdown."""
    with rc_context(LOOK):
        figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})


def blank(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty figure, of so many inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def style_of(number: int) -> Style:
    """Of the series with that number; from the eighth on colours come again, with another marker, line and hatch."""
    colour, again = STYLES[number % len(STYLES)], STYLES[(number + number // len(STYLES)) % len(STYLES)]
    return again._replace(colour=colour.colour)


def add_legend(figure: Figure, handles: Sequence, names: Sequence[str]) -> None:
    """Names under the drawing, where they hide nothing; a single series has its name in the caption."""
    if len(names) > 1:
        column = 50 + LETTERS * LETTER * max(map(len, names))  # points
        columns = int(max(1, min(len(names), 72 * figure.get_figwidth() // column)))
        figure.legend(handles, names, loc="outside lower center", ncols=columns)


# ---------------------------------------------------------------------------------------------------------------
# Lines, points, bars
# ---------------------------------------------------------------------------------------------------------------


@rc_context(LOOK)
def lines(
    series: dict[str, list[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    marks: Sequence[tuple[float, str]] = (),
    joined: bool = True,
) -> Figure:
    """A line for each series of (x, y), or points that are not joined; where y is NaN there is a gap.

    Args:
        marks: (x, label) of dotted lines, such as where a stage begins; those too close to the one before are left out.
    """
    figure, panel = blank()
    handles = []
    for number, points in enumerate(series.values()):
        style = style_of(number)
        x, y = zip(*points, strict=True) if points else ((), ())
        look = {"linestyle": style.line, "markersize": 5, "markevery": max(1, len(points) // 12)}
        look = look if joined else {"linestyle": "", "markersize": 6, "alpha": 0.8}
        handles += panel.plot(x, y, color=style.colour, marker=style.marker, **look)
    panel.set_xlabel(xlabel)
    name_values(panel, ylabel)
    every_x = {x for points in series.values() for x, _ in points}
    if all(float(x).is_integer() for x in every_x):
        panel.xaxis.get_major_locator().set_params(integer=True)  # epochs have no halves
    if len(every_x) == 1:
        panel.set_xlim(min(every_x) - 0.5, min(every_x) + 0.5)
    add_marks(panel, marks)
    add_legend(figure, handles, list(series))
    return figure


def name_values(panel: Axes, ylabel: str) -> None:
    """The name of the y axis; percentages go from 0 to 100 in every figure, so that figures can be compared."""
    panel.set_ylabel(ylabel)
    if ylabel.endswith("%"):
        panel.set_ylim(-2 if panel.lines else 0, 102)


def add_marks(panel: Axes, marks: Sequence[tuple[float, str]]) -> None:
    """Dotted lines with their labels above the axes, on end where they would run into each other."""
    left, right = panel.get_xlim()
    point = (right - left) / (72 * 0.85 * WIDTH)  # of the x axis
    kept: list[tuple[float, str]] = []
    for x, label in sorted(marks):
        if not kept or x - kept[-1][0] > 1.5 * SMALL * point:
            kept.append((x, label))
    neighbours = pairwise([*kept, (right, "")])
    tight = any(after - x < SMALL * LETTER * len(label) * point for (x, label), (after, _) in neighbours)
    turned = {"rotation": 90, "ha": "center"} if tight else {"ha": "left"}
    for x, label in kept:
        panel.axvline(x, color=INK, alpha=0.5, linestyle=":", linewidth=1)
        panel.text(x, 1.01, label, transform=panel.get_xaxis_transform(), fontsize=SMALL, va="bottom", **turned)
    panel.set_xlim(left, right)


@rc_context(LOOK)
def make_logarithmic(figure: Figure) -> None:
    """Gives a figure a logarithmic y axis, with plain numbers at the powers of ten."""
    figure.axes[0].set_yscale("log")
    figure.axes[0].yaxis.set_major_formatter("{x:g}")
    figure.axes[0].yaxis.set_minor_formatter("")


@rc_context(LOOK)
def bars(groups: list[str], series: dict[str, list[float | None]], ylabel: str) -> Figure:
    """Bars side by side in each group, one for each series; a dash where there is no value."""
    figure, panel = blank()
    width = 0.8 / max(1, len(series))
    handles = []
    for number, values in enumerate(series.values()):
        positions = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        known = [(x, value) for x, value in zip(positions, values, strict=True) if value is not None]
        handles.append(add_bars(panel, known, 0.92 * width, style_of(number)))
        for x in set(positions) - {x for x, _ in known}:
            panel.text(x, 0, "\N{EN DASH}", ha="center", va="bottom")
    name_groups(panel, groups, ylabel)
    add_legend(figure, handles, list(series))
    return figure


@rc_context(LOOK)
def stacked(groups: list[str], parts: dict[str, list[float]], xlabel: str, ylabel: str) -> Figure:
    """A bar for each group, made of the parts, the first at the bottom. A part has the same style in every figure with
    the same parts, and is not in the legend where it is 0 everywhere."""
    figure, panel = blank()
    below = [0.0] * len(groups)
    handles = {}
    for number, (name, values) in enumerate(parts.items()):
        if any(values):
            handles[name] = add_bars(panel, list(enumerate(values)), 0.7, style_of(number), below)
            below = [low + value for low, value in zip(below, values, strict=True)]
    name_groups(panel, groups, ylabel)
    panel.set_xlabel(xlabel)
    add_legend(figure, list(handles.values()), list(handles))
    return figure


def add_bars(
    panel: Axes, bars: list[tuple[float, float]], width: float, style: Style, below: Sequence[float] = ()
) -> tuple:
    """Bars (x, height), hatched; returns their handles for a legend."""
    options = {"bottom": below or 0, "width": width}
    x, heights = zip(*bars, strict=True) if bars else ((), ())
    # twice: in an SVG the hatch has the opacity of the face behind it
    face = panel.bar(x, heights, color=style.colour, alpha=FAINT, **options)
    hatch = panel.bar(x, heights, color="none", edgecolor=style.colour, hatch=style.hatch, **options)
    return face, hatch


def name_groups(panel: Axes, groups: list[str], ylabel: str) -> None:
    """The names of the groups, slanted where they are long."""
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, groups)) > 8 else {}
    panel.set_xticks(range(len(groups)), groups, **slanted)
    panel.grid(False, axis="x")
    name_values(panel, ylabel)


# ---------------------------------------------------------------------------------------------------------------
# A graph in layers
# ---------------------------------------------------------------------------------------------------------------

# role -> marker, number of its colour, its area as a share of its square
SHAPES = {"root": ("s", 0, 1.0), "target": ("*", 1, 0.28), "other": ("^", 2, 0.5)}
PLAIN = ("o", 6, 0.785)
LARGEST = 1000  # square points, of a node with the value 1
SMALLEST = 30  # that can still be seen


@rc_context(LOOK)
def tree(
    nodes: dict[str, int], edges: list[tuple[str, str]], values: dict[str, float], marked: dict[str, str]
) -> Figure:
    """A directed graph from the top down: a node has its name and its value under it, and an area by its value.

    Args:
        nodes: name -> layer, 0 for the root's.
        edges: (from, to), names of nodes.
        values: name -> a share of 1; a node without one has its name only.
        marked: name -> "root", "target" or "other": its shape, and a word under it.
    """
    rows = layers(nodes, edges)
    shapes = {name: SHAPES[marked[name]] if name in marked else PLAIN for name in nodes}
    size = {name: max(SMALLEST, LARGEST * values.get(name, 0)) / shapes[name][2] for name in nodes}  # square points
    radius = {name: size[name] ** 0.5 / 2 for name in nodes}
    column = (12 + max(LETTERS * LETTER * max(map(len, nodes)), 2 * max(radius.values()))) / 72  # inches
    figure, panel = blank(max(WIDTH, column * max(map(len, rows))), 1.3 * len(rows) + 0.2)
    places = {
        name: ((place + 0.5) / len(row), -depth) for depth, row in enumerate(rows) for place, name in enumerate(row)
    }
    for start, end in edges:
        # an edge that does not go to the next layer would run through nodes
        bent = 0 if nodes[end] == nodes[start] + 1 else 0.25
        arrow = {"arrowstyle": "-|>", "color": INK, "alpha": 0.5, "linewidth": 0.9, "mutation_scale": 8}
        arrow |= {"shrinkA": radius[start] + 1, "shrinkB": radius[end] + 2, "connectionstyle": f"arc3,rad={bent}"}
        panel.annotate("", xy=places[end], xytext=places[start], arrowprops=arrow)
    for name, (x, y) in places.items():
        marker, number, _ = shapes[name]
        panel.scatter(x, y, s=size[name], marker=marker, color=STYLES[number].colour, linewidths=0, zorder=4)
        words = [name, f"{values[name]:.0%}" if name in values else "", marked.get(name, "")]
        below = {"xytext": (0, -radius[name] - 2), "textcoords": "offset points", "va": "top", "ha": "center"}
        panel.annotate("\n".join(filter(None, words)), (x, y), **below, zorder=5)
    panel.set(xlim=(0, 1), ylim=(0.7 - len(rows), 0.4))
    panel.axis("off")
    return figure


def layers(nodes: dict[str, int], edges: list[tuple[str, str]]) -> list[list[str]]:
    """The nodes of each layer from left to right, so that few edges cross: a node goes to the mean place of those that
    it is tied to in the layers above, then of those below, in turns (barycentres, Sugiyama et al. 1981)."""
    rows: list[list[str]] = [[] for _ in range(max(nodes.values()) + 1)]
    for name, depth in nodes.items():
        rows[depth].append(name)
    above: dict[str, list[str]] = {name: [] for name in nodes}
    below: dict[str, list[str]] = {name: [] for name in nodes}
    for start, end in edges:
        if nodes[start] != nodes[end]:
            high, low = sorted((start, end), key=nodes.__getitem__)
            above[low].append(high)
            below[high].append(low)
    place = {name: (at + 0.5) / len(row) for row in rows for at, name in enumerate(row)}
    for ties, order in [(above, rows), (below, rows[::-1])] * 4 + [(above, rows)]:
        for row in order:
            row.sort(key=lambda name, ties=ties: mean(place[tied] for tied in ties[name] or [name]))
            place.update((name, (at + 0.5) / len(row)) for at, name in enumerate(row))
    return rows
