"""analysis/page.py, figures.py: the page is self-contained, figures hold text, series differ not only in colour."""

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_hex

from analysis import figures, report
from analysis.page import Figure, Section, page

NASTY = "<script>alert('&')</script> \"quoted\" & done"


def all_kinds() -> dict[str, str]:
    """An SVG of each kind of figure."""
    loss = {"one": [(1, 4.0), (2, math.nan), (3, 0.5)], "two & <more>": [(1, 3.0), (2, 2.0)], "none yet": []}
    values = {"root": 1, "a": 0.25, "b": 0}
    made = {
        "lines": figures.lines(loss, "step", "loss", [(1.5, "stage 1")]),
        "scatter": figures.lines({"here": [(0, 1)], "there": [(1, 0)]}, "x", "y", joined=False),
        "bars": figures.bars(["g", "h"], {"one": [0.5, None], "two": [0.2, 0.1]}, "y"),
        "stacked": figures.stacked(["g", "h"], {"right": [0.5, 0.25], "wrong": [0.5, 0.75]}, "thoughts", "share"),
        "tree": figures.tree({"root": 0, "a": 1, "b": 1}, [("root", "a"), ("root", "b")], values, {"root": "root"}),
    }
    return {kind: figures.svg(figure) for kind, figure in made.items()}


def whole_page() -> str:
    drawn = [Figure(svg, f"the {kind}", ["x", "y"], [["1", "2.5"]]) for kind, svg in all_kinds().items()]
    first = Section("First", "Words.\n\nMore `code`.", drawn, [("look", "<pre>closely</pre>")])
    return page("A page", [first, Section("Second")], [("seed", "0")])


class Reader(HTMLParser):
    """Parses a page as a browser does: its tags with attributes, its text, and the tags that are still open."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def test_everything_except_svg_and_body_is_escaped():
    figure = Figure("<svg><g/></svg>", NASTY, [NASTY, "b"], [[NASTY, "1"]])
    section = Section(NASTY, NASTY, [figure], [(NASTY, "<em>body</em>")])
    reader = Reader(page(NASTY, [section, section], [(NASTY, NASTY)]))
    assert not reader.open
    assert "script" not in dict(reader.tags)
    assert {"em", "svg"} <= set(dict(reader.tags))
    labels = [attributes["aria-label"] for _, attributes in reader.tags if attributes.get("role") == "img"]
    assert labels == [NASTY, NASTY]
    assert reader.text.count(NASTY) == 2 + 2 + 2 * 6  # title and h1, facts; a section


def test_the_page_is_self_contained_and_deterministic():
    html = whole_page()
    assert html == whole_page()
    tags = Reader(html).tags
    assert html.startswith("<!DOCTYPE html>")
    assert ("html", {"lang": "en"}) in tags
    assert {"title", "main"} <= set(dict(tags))
    assert any(attributes.get("name") == "viewport" for _, attributes in tags)
    assert not {"script", "link", "img", "iframe", "object"} & set(dict(tags))
    for tag, attributes in tags:
        for name in ("src", "href", "srcset", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert not re.search(r"@import|url\((?!#)", html)
    targets = {name for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html) for name in pair if name}
    assert targets <= set(re.findall(r' id="([^"]+)"', html))


def test_markup_is_paragraphs_and_code():
    html = page("t", [Section("s", "one\ntwo\n\n \nthree `a < b` **four**\n")])
    assert "<p>one two</p>\n<p>three <code>a &lt; b</code> **four**</p>" in html


def test_the_table_follows_the_figure():
    def of(svg: str, head: list[str], rows: list[list[str]]) -> str:
        return page("t", [Section("s", figures=[Figure(svg, "c", head, rows)])])

    head, rows = ["name", "n"], [[f"r{n}", str(n)] for n in range(13)]
    short = of("<svg></svg>", head, rows[:12])
    assert short.index("</svg>") < short.index("<figcaption>c</figcaption>") < short.index("<table>")
    assert "<details>" not in short
    assert "<tr><td>r3</td><td>3</td></tr>" in short
    long = of("<svg></svg>", head, rows)
    assert long.index("<details><summary>the numbers, 13 rows</summary>") < long.index("<table>")
    assert "<table" not in of("<svg></svg>", head, [])
    alone = of("", head, rows[:1])
    assert 'role="img"' not in alone
    assert "<table>" in alone


def test_figures_are_well_formed_and_hold_their_text():
    expected = {
        "lines": {"step", "loss", "stage 1", "two & <more>"},
        "scatter": {"x", "y", "here", "there"},
        "bars": {"g", "h", "one", "two", "\N{EN DASH}"},
        "stacked": {"thoughts", "share", "right", "wrong"},
        "tree": {"root", "100%", "a", "25%", "b"},
    }
    for kind, svg in all_kinds().items():
        assert svg.startswith("<svg ")
        words = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert expected[kind] <= set(words)


def test_series_differ_in_more_than_colour():
    assert len({*zip(figures.MARKERS, figures.LINES, strict=True)}) == len(figures.COLOURS)
    for looks in (figures.COLOURS, figures.MARKERS, figures.HATCHES):
        assert len(set(looks)) == len(figures.COLOURS) == 7


def test_a_class_has_the_same_colour_and_hatch_in_every_figure(monkeypatch):
    """Bug: colours were assigned after classes without outputs were dropped, so that one class had several."""
    drawn = []
    monkeypatch.setattr(figures, "svg", lambda figure: drawn.append(figure) or "")
    counts = {"Coconut": (1, 2, 1), "control": (0, 3, 1), "other": (3, 0, 1)}
    classes = ["path", "longer", "label"]
    found = {
        name: [{"thoughts": 0, "questions": 4, "accuracy": 0.5, "classes": dict(zip(classes, row, strict=True))}]
        for name, row in counts.items()
    }
    report.sweep_section(found, {"classes": classes, "thoughts": dict.fromkeys(counts, 3)})
    for figure, row in zip(drawn, counts.values(), strict=True):
        shown = [number for number, count in enumerate(row) if count]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [classes[number] for number in shown]
        bars = [bar for group in figure.axes[0].containers for bar in group]
        wanted = [(figures.COLOURS[number], figures.HATCHES[number]) for number in shown]
        assert [(to_hex(bar.get_facecolor()), bar.get_hatch() or "") for bar in bars] == wanted


def test_percentages_share_an_axis():
    for figure in (figures.bars(["g"], {"a": [4.0]}, "x, %"), figures.lines({"a": [(0, 4.0)]}, "x", "y, %")):
        low, high = figure.axes[0].get_ylim()
        assert low <= 0 < 100 <= high


def test_labels_of_many_stages_are_rotated_or_omitted():
    series = {"run": [(n, n) for n in range(100)]}
    few = figures.lines(series, "x", "y", [(20, "stage 1"), (60, "stage 2")]).axes[0].texts
    assert [(text.get_text(), text.get_rotation()) for text in few] == [("stage 1", 0), ("stage 2", 0)]
    many = figures.lines(series, "x", "y", [(n + 0.5, f"stage {n}") for n in range(99)]).axes[0].texts
    places = [text.get_position()[0] for text in many]
    assert 10 < len(many) < 60
    assert min(after - before for before, after in pairwise(places)) >= 2
    assert {text.get_rotation() for text in many} == {90}


def test_the_layers_of_a_tree_avoid_crossings():
    nodes = {"root": 0, "a": 1, "b": 1, "c": 1, "of c": 2, "of b": 2, "of a": 2}
    edges = [("root", name) for name in "abc"] + [(name, f"of {name}") for name in "abc"]
    first, second, third = figures.layers(nodes, edges)
    assert first == ["root"]
    assert sorted(second) == ["a", "b", "c"]
    assert third == [f"of {name}" for name in second]
    figure = figures.tree(nodes, edges, dict.fromkeys(nodes, 0.5), {"root": "root", "of a": "target", "of b": "other"})
    below = {text.get_text(): text.xy[1] for text in figure.axes[0].texts if text.get_text()}
    assert below["root\n50%\nroot"] > below["a\n50%"] > below["of a\n50%\ntarget"]
    assert "of b\n50%\nother" in below


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_renders_the_page(tmp_path):
    (tmp_path / "page.html").write_text(whole_page(), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for words in ("A page", "The intro.", "More code", "the tree", "two & <more>", "stage 1"):
        assert words in Reader(done.stdout).text
