"""Updates the generated parts of the documentation: README.md's line counts and quickstart table, and the keys in
docs/configuration.md.

    python -m tools.docs        # after a change of a key, of a file that README lists, or of results/quickstart.md
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import methods
from config import Config
from trainer.commands import make_parser

ROOT = Path(__file__).resolve().parents[1]
COUNTED = re.compile(r"^(\| \[`([\w./]+\.py)`\]\(\2\) \| )\d+( \|)", re.MULTILINE)  # | [`run.py`](run.py) | 340 |


def updated(path: Path) -> str:
    """Returns the text of a Markdown file with its line counts and generated blocks up to date."""
    text = path.read_text(encoding="utf-8")
    text = COUNTED.sub(lambda row: f"{row[1]}{len((ROOT / row[2]).read_text('utf-8').splitlines())}{row[3]}", text)
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}: written by python -m tools.docs -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        if found:
            text = before + begin + make() + rest[rest.index(end) :]
    return text


def keys() -> str:
    """Returns a table of all keys of Config."""
    rows = []
    for field in dataclasses.fields(Config):
        text = field.metadata["help"].replace(" | ", " / ").replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{json.dumps(field.default)}` | {text} |")
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows, ""])


def defaults() -> str:
    """Returns a table of the keys that `method: NAME` sets."""
    rows = [
        f"| `{name}` | {', '.join(f'`{key}` `{json.dumps(value)}`' for key, value in rules.defaults.items())} |"
        for name, rules in methods.all_rules().items()
        if rules.defaults
    ]
    return "\n".join(["| method | defaults |", "|---|---|", *rows, ""])


def quickstart() -> str:
    """Returns the table of results/quickstart.md."""
    text = (ROOT / "results" / "quickstart.md").read_text(encoding="utf-8")
    return "".join(line + "\n" for line in text.splitlines() if line.startswith("|"))


BLOCKS = {"keys": keys, "defaults": defaults, "quickstart": quickstart}
PAGES = (ROOT / "README.md", ROOT / "docs" / "configuration.md")


def main() -> None:
    make_parser(__doc__).parse_args()
    for path in PAGES:
        text = updated(path)
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} is updated")


if __name__ == "__main__":
    main()
