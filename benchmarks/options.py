"""What the benchmarks' command lines share. Without torch: --help and mistakes are answered before it is imported."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing")]
from random_model import SHAPES

SIZES = {"tiny": (2, 256, 4), "small": (12, 768, 12)}  # layers, width, heads; small is GPT-2's


def positive(text: str) -> int:
    """The type of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def make_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="gpt2", help="(default: %(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="(default: %(default)s)")


def add_repeats_option(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument("--repeats", type=positive, default=repeats, help="measured runs a side (default: %(default)s)")


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads (default: torch's)")


def add_bf16_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, default=None, help="write the numbers to this file")
