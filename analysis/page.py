"""A page of figures and tables: one HTML file that needs nothing else, in light and dark, on paper too.

    section = Section("Accuracy", "Both start at stage 0.", [Figure(svg, "accuracy by epoch", ["epoch", "%"], rows)])
    Path("page.html").write_text(page("A run", "What it came to.", [section]), encoding="utf-8")

No script, no font, nothing from the network. The same input gives the same bytes: there is no date in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

ROWS_SHOWN = 12  # longer tables are collapsed
NUMBER = re.compile(r"[-+\N{MINUS SIGN}]?\d[\d,.]*(e[-+]?\d+)?( ?%)?")  # such cells stand right


@dataclass
class Figure:
    """A drawing, its caption, and its numbers as a table."""

    svg: str  # goes into the page as it is; "" where the table is all there is
    caption: str
    head: list[str]
    rows: list[list[str]]  # none: no table


@dataclass
class Example:
    """A closer look, collapsed."""

    title: str
    body: str  # HTML, which goes into the page as it is


@dataclass
class Section:
    title: str
    text: str = ""  # paragraphs, a blank line between them; `code` is all that is interpreted
    figures: list[Figure] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


def page(title: str, intro: str, sections: list[Section], facts: Sequence[tuple[str, str]] = ()) -> str:
    """The HTML of a whole page: title, intro, facts, a table of contents, the sections.

    Everything is escaped but `Figure.svg` and `Example.body`, which must be well-formed.

    Args:
        intro: as `Section.text`.
        facts: (name, value), such as the checkpoint, the data, the seeds.
    """
    parts = [f"<h1>{escape(title)}</h1>", paragraphs(intro)]
    if facts:
        rows = (f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in facts)
        parts.append(f'<div class="wide" tabindex="0"><table class="facts">{"".join(rows)}</table></div>')
    if len(sections) > 1:
        links = (f'<li><a href="#s{n}">{escape(section.title)}</a></li>' for n, section in enumerate(sections, 1))
        parts.append(f'<nav aria-label="Contents"><ol>{"".join(links)}</ol></nav>')
    for number, section in enumerate(sections, 1):
        parts.append(f'<section id="s{number}">\n<h2>{escape(section.title)}</h2>')
        parts.append(paragraphs(section.text))
        parts += map(figure_html, section.figures)
        parts += map(example_html, section.examples)
        parts.append("</section>")
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def paragraphs(text: str) -> str:
    """Plain text as HTML: a paragraph between blank lines, `code` in backticks."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return "\n".join(f"<p>{coded(block)}</p>" for block in blocks if block)


def coded(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def figure_html(figure: Figure) -> str:
    """A drawing, its caption and its table, which is collapsed where it is long."""
    label = escape(figure.caption.replace("`", ""))
    drawing = (
        f'<div class="wide" tabindex="0" role="img" aria-label="{label}">{figure.svg}</div>\n' if figure.svg else ""
    )
    numbers = table_html(figure.head, figure.rows) if figure.rows else ""
    if len(figure.rows) > ROWS_SHOWN:
        numbers = f"<details><summary>the numbers, {len(figure.rows)} rows</summary>\n{numbers}\n</details>"
    return f"<figure>\n{drawing}<figcaption>{coded(figure.caption)}</figcaption>\n{numbers}\n</figure>"


def table_html(head: list[str], rows: list[list[str]]) -> str:
    """A table; a column stands right if its first filled cell is a number, as its head does then."""
    right = []
    for column in range(len(head)):
        first = next((row[column] for row in rows if row[column]), "")
        right.append(' class="number"' if NUMBER.fullmatch(first) else "")
    heads = "".join(f'<th scope="col"{side}>{escape(cell)}</th>' for cell, side in zip(head, right, strict=True))
    lines = ("".join(f"<td{side}>{escape(cell)}</td>" for cell, side in zip(row, right, strict=True)) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    table = f"<table><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return f'<div class="wide" tabindex="0">{table}</div>'


def example_html(example: Example) -> str:
    return f"<details><summary>{escape(example.title)}</summary>\n{example.body}\n</details>"


# --paper is also the halo of the letters in a drawing, which keeps them readable across its lines; a shadow at the edge
# of .wide shows that it can be scrolled there
STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1f2328; --soft: #59636e; --line: #d5d9de; --shade: #f1f3f5;
  --link: #0b5cad; --edge: #59636e80; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e7ea; --soft: #a0a8b1; --line: #3a4149;
  --shade: #20252b; --link: #7ab8ff; --edge: #a0a8b180; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
a { color: var(--link); }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; background: var(--shade); border-radius: .25em; }
code { padding: .1em .3em; }
pre { padding: .6em .8em; overflow-x: auto; }
figure { margin: 1.8rem 0; }
figcaption { color: var(--soft); font-size: .92rem; margin: .4rem 0 .8rem; }
.wide { overflow-x: auto; background: linear-gradient(90deg, var(--paper) 40%, transparent) local,
  linear-gradient(270deg, var(--paper) 40%, transparent) right local,
  linear-gradient(90deg, var(--edge), transparent), linear-gradient(270deg, var(--edge), transparent) right;
  background-repeat: no-repeat; background-size: 2.5rem 100%, 2.5rem 100%, .7rem 100%, .7rem 100%; }
svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
svg text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .8em .3em 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.facts td { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--soft); }
@media print { body { font-size: 10pt; } main { max-width: none; padding: 0; } svg { min-width: 0 !important; }
  figure, tr { break-inside: avoid; } h2, figcaption { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""
