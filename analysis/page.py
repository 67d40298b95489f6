"""Pages of figures and tables: one self-contained HTML file each. The same input gives the same bytes.

section = Section("Accuracy", "Both start at stage 0.", [Figure(svg, "accuracy by epoch", ["epoch", "%"], rows)])
Path("page.html").write_text(page("A run", [section]), encoding="utf-8")
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

ROWS_SHOWN = 12  # longer tables are collapsed
STYLE = """
:root { color-scheme: light dark; }
body { max-width: 56rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }
h2 { margin-top: 2.5rem; border-top: 1px solid; }
figure { margin: 1.5rem 0; }
.wide { overflow-x: auto; background: linear-gradient(90deg, Canvas 40%, transparent) local,
  linear-gradient(270deg, Canvas 40%, transparent) right local, linear-gradient(90deg, #888, transparent),
  linear-gradient(270deg, #888, transparent) right; background-repeat: no-repeat;
  background-size: 3rem 100%, 3rem 100%, 1rem 100%, 1rem 100%; /* a shadow at an edge where it can be scrolled */ }
svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .3em .8em .3em 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8888; }
"""


@dataclass
class Figure:
    """A drawing with its caption and a table of its numbers."""

    svg: str  # copied into the page unescaped; "" for a table alone
    caption: str
    head: list[str]
    rows: list[list[str]]  # [] for a drawing alone


@dataclass
class Section:
    title: str
    text: str = ""  # paragraphs, separated by blank lines; the only markup is `code`
    figures: list[Figure] = field(default_factory=list)
    examples: list[tuple[str, str]] = field(default_factory=list)  # collapsed: (title, HTML copied unescaped)


def page(title: str, sections: list[Section], facts: Sequence[tuple[str, str]] = ()) -> str:
    """Returns a page as HTML. It escapes all but `Figure.svg` and the HTML of examples, which must be well-formed.

    facts: (name, value) rows above the sections, such as the checkpoint, the data, the seeds.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [table_html([], [list(fact) for fact in facts])] if facts else []
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>", paragraphs(section.text), *map(figure_html, section.figures)]
        parts += [collapsed(*example) for example in section.examples]
    body = "\n".join(filter(None, parts))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def paragraphs(text: str) -> str:
    """Returns text as HTML paragraphs, with `code` in backticks."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return "\n".join(f"<p>{coded(block)}</p>" for block in blocks if block)


def coded(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def collapsed(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{body}\n</details>"


def figure_html(figure: Figure) -> str:
    """Returns a drawing, its caption and its table as HTML; a long table is collapsed."""
    label = escape(figure.caption.replace("`", ""))
    drawing = f'<div class="wide" role="img" aria-label="{label}">{figure.svg}</div>\n' if figure.svg else ""
    numbers = table_html(figure.head, figure.rows) if figure.rows else ""
    if len(figure.rows) > ROWS_SHOWN:
        numbers = collapsed(f"the numbers, {len(figure.rows)} rows", numbers)
    return f"<figure>\n{drawing}<figcaption>{coded(figure.caption)}</figcaption>\n{numbers}\n</figure>"


def table_html(head: list[str], rows: list[list[str]]) -> str:
    def line(tag: str, cells: list[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    lines = [*([line("th", head)] if head else []), *(line("td", row) for row in rows)]
    return f'<div class="wide"><table>\n{chr(10).join(lines)}\n</table></div>'
