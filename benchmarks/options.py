"""The command-line options that benchmarks share. Imports no torch, so that --help and errors come at once."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing")]
from tiny_model import SHAPES

SIZES = {"tiny": (2, 256, 4), "small": (12, 768, 12)}  # layers, width, heads; small is GPT-2's


def not_negative(text: str) -> int:
    """Returns an option's text as an integer of at least 0."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """Returns an option's text as an integer of at least 1."""
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
    return number


class Parser(argparse.ArgumentParser):
    """A parser with shared options, chosen by name: Parser(__doc__, "json", repeats=3)."""

    def __init__(self, description: str, *shared: str, repeats: int | None = None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        if "model" in shared:
            self.add_argument("--shape", choices=SHAPES, default="gpt2", help="(default: %(default)s)")
            self.add_argument("--size", choices=list(SIZES), default="tiny", help="(default: %(default)s)")
        if repeats:
            self.add_count("--repeats", repeats, "measured runs per side")
        if "threads" in shared:
            self.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
        if "bf16" in shared:
            self.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision")
        if "json" in shared:
            self.add_argument("--json", type=Path, help="write the numbers to this file")

    def add_count(self, name: str, default: int | list[int], text: str, kind=positive) -> None:
        several = {"nargs": "+"} if isinstance(default, list) else {}
        text += f" (default: {' '.join(map(str, default)) if several else default})"
        self.add_argument(name, type=kind, default=default, help=text, **several)
