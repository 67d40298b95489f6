"""Figures for `page`: matplotlib's, as SVG text that stands in a page. Their colours work on white and on black.

Only what draws imports this module: matplotlib takes a second. Figures are made without pyplot, which would look for a
display and keep each of them until it is closed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from itertools import pairwise, zip_longest
from pathlib import Path
from statistics import mean
from typing import NamedTuple
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Style(NamedTuple):
    """How one series is told from the others: never by its colour alone."""

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
LETTER = 0.6  # of its size is a letter wide, or less
FAINT = 0.3  # opacity of areas
SHRUNK = 0.75  # of its width has a drawing on a narrow screen: a smaller one could not be read

# ---------------------------------------------------------------------------------------------------------------
# From matplotlib to a page
# ---------------------------------------------------------------------------------------------------------------


@rc_context(LOOK)
def svg(figure: Figure) -> str:
    """A figure as an <svg> element: the text is text, in the page's font; neutral colours are that of the page's text;
    the background is transparent.

    The same numbers give the same bytes. Ids begin with a digest of the drawing, so that several fit in one page; only
    drawings that are alike to the byte share theirs.
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
            root.remove(definitions)  # its rule is for all elements of the page: the root hands it down instead
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
                del element.attrib["id"]  # figure_1, text_1: nobody's
            else:
                element.set(name, re.sub(r"^#|(?<=url\()#", f"#f{digest}-", value))
    return ElementTree.tostring(root, encoding="unicode")


def picture(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG on white, for where a page cannot be shown."""
    with rc_context(LOOK):
        figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})


def blank(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty figure, of so many inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def style_of(number: int) -> Style:
    return STYLES[number % len(STYLES)]


def add_legend(figure: Figure, handles: Sequence, names: Sequence[str]) -> None:
    """Names under the drawing, where they hide nothing; those of one series alone are the caption's affair."""
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
    bands: Mapping[str, list[tuple[float, float, float]]] = {},
) -> Figure:
    """A line for each series of (x, y); where y is NaN there is a gap.

    Args:
        marks: (x, label) of dotted lines, such as where a stage begins; those too close to the one before are left out.
        bands: series -> (x, low, high) of the area around its line.
    """
    figure, panel = blank()
    handles = []
    for number, (name, points) in enumerate(series.items()):
        style = style_of(number)
        x, y = zip(*points, strict=True) if points else ((), ())
        every = max(1, len(points) // 12)
        options = {"color": style.colour, "linestyle": style.line, "marker": style.marker, "markersize": 5}
        handles += panel.plot(x, y, **options, markevery=every)
        if band := bands.get(name):
            x, low, high = zip(*band, strict=True)
            panel.fill_between(x, low, high, color=style.colour, alpha=FAINT, linewidth=0)
    panel.set(xlabel=xlabel, ylabel=ylabel)
    if all(float(x).is_integer() for points in series.values() for x, _ in points):
        panel.xaxis.get_major_locator().set_params(integer=True)  # epochs have no halves
    add_marks(panel, marks)
    add_legend(figure, handles, list(series))
    return figure


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
def scatter(series: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str) -> Figure:
    """A point for each (x, y), in the marker of its series."""
    figure, panel = blank()
    handles = []
    for number, points in enumerate(series.values()):
        style = style_of(number)
        x, y = zip(*points, strict=True) if points else ((), ())
        handles += panel.plot(x, y, color=style.colour, linestyle="", marker=style.marker, markersize=6, alpha=0.8)
    panel.set(xlabel=xlabel, ylabel=ylabel)
    add_legend(figure, handles, list(series))
    return figure


@rc_context(LOOK)
def bars(
    groups: list[str],
    series: dict[str, list[float | None]],
    ylabel: str,
    errors: dict[str, list[tuple[float, float]]] | None = None,
    rotate: bool = False,
) -> Figure:
    """Bars side by side in each group, one for each series; a dash where there is no value.

    Args:
        errors: series -> for each group the ends (low, high) of its interval, on the axis of the values.
        rotate: whether the groups' names are long and stand slanted.
    """
    figure, panel = blank()
    width = 0.8 / max(1, len(series))
    handles = []
    for number, (name, values) in enumerate(series.items()):
        places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        there = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        handles.append(add_bars(panel, there, 0.92 * width, style_of(number)))
        for place in set(places) - {place for place, _ in there}:
            panel.text(place, 0, "\N{EN DASH}", ha="center", va="bottom")
        for place, value, (low, high) in zip_longest(places, values, (errors or {}).get(name, ()), fillvalue=(0, 0)):
            if value is not None and low < high:
                middle, half = (low + high) / 2, (high - low) / 2
                panel.errorbar(place, middle, half, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
    name_groups(panel, groups, ylabel, rotate)
    add_legend(figure, handles, list(series))
    return figure


@rc_context(LOOK)
def stacked(groups: list[str], parts: dict[str, list[float]], ylabel: str) -> Figure:
    """A bar for each group, made of the parts, the first at the bottom."""
    figure, panel = blank()
    floor = [0.0] * len(groups)
    handles = []
    for number, values in enumerate(parts.values()):
        handles.append(add_bars(panel, list(enumerate(values)), 0.7, style_of(number), floor))
        floor = [low + value for low, value in zip(floor, values, strict=True)]
    name_groups(panel, groups, ylabel, rotate=sum(map(len, groups)) > 70)
    add_legend(figure, handles, list(parts))
    return figure


def add_bars(
    panel: Axes, bars: list[tuple[float, float]], width: float, style: Style, floor: Sequence[float] = ()
) -> tuple:
    """Bars (place, height), hatched; returns what a legend shows of them."""
    options = {"bottom": floor or 0, "width": width}
    places, heights = [place for place, _ in bars], [height for _, height in bars]
    # twice: in an SVG the hatch has the opacity of the face behind it
    face = panel.bar(places, heights, color=style.colour, alpha=FAINT, **options)
    hatch = panel.bar(places, heights, color="none", edgecolor=style.colour, hatch=style.hatch, **options)
    return face, hatch


def name_groups(panel: Axes, groups: list[str], ylabel: str, rotate: bool) -> None:
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if rotate else {}
    panel.set_xticks(range(len(groups)), groups, **slanted)
    panel.grid(False, axis="x")
    panel.set_ylabel(ylabel)


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
