"""analysis/: the page is one file without references to others; its figures hold text, and distinguish series by more
than colour."""

import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from PIL import Image

from analysis import figures, report
from analysis.page import Example, Figure, Section, page

NASTY = "<script>alert('&')</script> \"quoted\" & done"
SVG = "{http://www.w3.org/2000/svg}"


def all_kinds() -> dict[str, str]:
    """An SVG of each kind of figure."""
    loss = {"one": [(1, 4.0), (2, math.nan), (3, 0.5)], "two & <more>": [(1, 3.0), (2, 2.0)], "none yet": []}
    tied = {"root": 0, "a": 1, "b": 1}
    made = {
        "lines": figures.lines(loss, "step", "loss", [(1.5, "stage 1")]),
        "scatter": figures.lines({"here": [(0, 1)], "there": [(1, 0)]}, "x", "y", joined=False),
        "bars": figures.bars(["g", "h"], {"one": [0.5, None], "two": [0.2, 0.1]}, "y"),
        "stacked": figures.stacked(["g", "h"], {"right": [0.5, 0.25], "wrong": [0.5, 0.75]}, "thoughts", "share"),
        "tree": figures.tree(tied, [("root", "a"), ("root", "b")], {"root": 1, "a": 0.25}, {"root": "root"}),
    }
    return {kind: figures.svg(figure) for kind, figure in made.items()}


def whole_page() -> str:
    drawn = [Figure(svg, f"the {kind}", ["x", "y"], [["1", "2.5"]]) for kind, svg in all_kinds().items()]
    first = Section("First", "Words.\n\nMore `code`.", drawn, [Example("look", "<pre>closely</pre>")])
    return page("A page", "The intro.", [first, Section("Second")], [("seed", "0")])


class Reader(HTMLParser):
    """What a browser would make of a page: its tags with attributes, its text, and whether all tags are closed."""

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


# ---------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------


def test_everything_is_escaped_but_svg_and_body():
    figure = Figure("<svg><g/></svg>", NASTY, [NASTY, "b"], [[NASTY, "1"]])
    section = Section(NASTY, NASTY, [figure], [Example(NASTY, "<em>body</em>")])
    html = page(NASTY, NASTY, [section, section], [(NASTY, NASTY)])
    reader = Reader(html)
    assert not reader.open
    assert "script" not in dict(reader.tags)
    assert {"em", "svg"} <= set(dict(reader.tags))
    labels = [attributes["aria-label"] for _, attributes in reader.tags if attributes.get("role") == "img"]
    assert labels == [NASTY, NASTY]
    assert reader.text.count(NASTY) == 2 + 1 + 2 + 2 * 7  # title and h1, intro, facts; a section and its link


def test_it_stands_alone():
    html = whole_page()
    tags = Reader(html).tags
    assert html.startswith("<!DOCTYPE html>")
    assert ("html", {"lang": "en"}) in tags
    assert {"title", "main", "nav"} <= set(dict(tags))
    assert any(attributes.get("name") == "viewport" for _, attributes in tags)
    assert not {"script", "link", "img", "iframe", "object"} & set(dict(tags))
    for tag, attributes in tags:
        for name in ("src", "href", "srcset", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "prefers-color-scheme: dark" in html


def test_the_same_input_gives_the_same_bytes():
    assert whole_page() == whole_page()


def test_every_link_has_its_target_and_every_id_is_once():
    """matplotlib calls parts of every figure figure_1, axes_1, text_1, and styles all elements of the page."""
    html = whole_page()
    ids = Counter(re.findall(r' id="([^"]+)"', html))
    assert max(ids.values()) == 1
    targets = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html))
    assert {name for pair in targets for name in pair if name} == set(ids)
    assert html.count("<style") == 1


def test_text_is_paragraphs_and_code_and_nothing_else():
    html = page("t", "one\ntwo\n\n \nthree `a < b` **four**\n", [])
    assert "<p>one two</p>\n<p>three <code>a &lt; b</code> **four**</p>" in html


def test_numbers_stand_under_the_figure():
    rows = [[f"r{n}", str(n), "" if n == 0 else f"{n}.5 %"] for n in range(13)]
    short = page("t", "", [Section("s", figures=[Figure("<svg></svg>", "c", ["name", "n", "share"], rows[:12])])])
    assert short.index("</svg>") < short.index("<figcaption>c</figcaption>") < short.index("<table>")
    assert "<details>" not in short
    assert '<tr><td>r3</td><td class="number">3</td><td class="number">3.5 %</td></tr>' in short
    long = page("t", "", [Section("s", figures=[Figure("<svg></svg>", "c", ["name", "n", "share"], rows)])])
    assert long.index("<details><summary>the numbers, 13 rows</summary>") < long.index("<table>")
    none = page("t", "", [Section("s", figures=[Figure("<svg></svg>", "c", ["name"], [])])])
    assert "<table" not in none
    alone = page("t", "", [Section("s", figures=[Figure("", "c", ["name", "n", "share"], rows[:1])])])
    assert 'role="img"' not in alone
    assert "<table>" in alone


# ---------------------------------------------------------------------------------------------------------------
# The figures
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lines", "scatter", "bars", "stacked", "tree"])
def test_a_figure_is_well_formed_text_in_the_pages_colour(kind):
    svg = all_kinds()[kind]
    assert svg == all_kinds()[kind]
    assert svg.startswith("<svg ")
    root = ElementTree.fromstring(svg)
    words = [element.text for element in root.iter(f"{SVG}text")]
    expected = {
        "lines": {"step", "loss", "stage 1", "two & <more>"},
        "scatter": {"x", "y", "here", "there"},
        "bars": {"g", "h", "one", "two", "\N{EN DASH}"},
        "stacked": {"thoughts", "share", "right", "wrong"},
        "tree": {"root", "100%", "a", "25%", "b"},
    }
    assert expected[kind] <= set(words)
    assert figures.INK not in svg
    assert "currentColor" in svg
    assert "font-family" not in svg
    background = next(root.iter(f"{SVG}path"))
    assert background.get("style") == "fill: none"


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_are_seen_in_light_and_dark_and_are_never_alone():
    """3 : 1 is what WCAG 2.2 asks of graphical objects."""
    papers = re.findall(r"--paper: (#\w{6})", whole_page())
    assert len(papers) == 2
    for style in figures.STYLES:
        for paper in papers:
            dark, light = sorted((luminance(style.colour), luminance(paper)))
            assert (light + 0.05) / (dark + 0.05) >= 3, (style, paper)
    for own in zip(*figures.STYLES, strict=True):
        assert len(set(own)) == len(figures.STYLES)


def test_a_class_has_one_colour_and_hatch_in_every_figure(monkeypatch):
    """Classes without outputs were dropped before colours were given: on one page a class had several colours."""
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
        (legend,) = figure.legends
        shown = [number for number, count in enumerate(row) if count]
        assert [text.get_text() for text in legend.get_texts()] == [classes[number] for number in shown]
        wanted = [(to_rgba(figures.STYLES[number].colour), figures.STYLES[number].hatch) for number in shown]
        handles = legend.findobj(Rectangle)  # of each class its face and its hatch
        assert [(handle.get_edgecolor(), handle.get_hatch()) for handle in handles[1::2]] == wanted
        assert [handle.get_facecolor()[:3] for handle in handles[::2]] == [colour[:3] for colour, _ in wanted]
        bars = [group[0] for group in figure.axes[0].containers[1::2]]
        assert [(bar.get_edgecolor(), bar.get_hatch()) for bar in bars] == wanted


def test_percentages_share_an_axis_and_the_eighth_series_has_its_own_look():
    for figure in (figures.bars(["g"], {"a": [4.0]}, "x, %"), figures.lines({"a": [(0, 4.0)]}, "x", "y, %")):
        low, high = figure.axes[0].get_ylim()
        assert low <= 0 < 100 <= high
    assert len({figures.style_of(number) for number in range(14)}) == 14
    assert figures.style_of(7).colour == figures.style_of(0).colour


def test_stages_that_would_run_into_each_other_are_turned_or_left_out():
    series = {"run": [(n, n) for n in range(100)]}
    few = figures.lines(series, "x", "y", [(20, "stage 1"), (60, "stage 2")]).axes[0].texts
    assert [(text.get_text(), text.get_rotation()) for text in few] == [("stage 1", 0), ("stage 2", 0)]
    many = figures.lines(series, "x", "y", [(n + 0.5, f"stage {n}") for n in range(99)]).axes[0].texts
    places = [text.get_position()[0] for text in many]
    assert len(many) < 60
    assert min(after - before for before, after in pairwise(places)) >= 2
    assert {text.get_rotation() for text in many} == {90}


def test_a_tree_has_its_layers_in_the_order_with_fewest_crossings():
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


# ---------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def look(page_file, *arguments: str) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    profile = f"--user-data-dir={page_file.parent / 'profile'}"
    done = subprocess.run(
        [*command, profile, page_file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize(("scheme", "setting"), [("dark", 0), ("light", 1)])
def test_a_browser_shows_it(tmp_path, scheme, setting):
    file = tmp_path / "page.html"
    file.write_text(whole_page(), encoding="utf-8")
    seen = Reader(look(file, "--dump-dom"))
    for words in ("A page", "The intro.", "More code", "the tree", "two & <more>", "stage 1"):
        assert words in seen.text
    picture = tmp_path / "page.png"
    preference = f"--blink-settings=preferredColorScheme={setting}"
    look(file, preference, "--window-size=900,1400", f"--screenshot={picture}")
    with Image.open(picture) as opened:
        shades = opened.convert("L").histogram()
    paper, ink = shades.index(max(shades)), slice(180, 256) if scheme == "dark" else slice(80)  # ink: the letters
    assert paper < 40 if scheme == "dark" else paper > 215
    assert sum(shades[ink]) > 1000
