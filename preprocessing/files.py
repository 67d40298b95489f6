"""Shared by the scripts of this folder: imports from the parent folder, command lines, atomic writing of JSON files."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocessing.examples import load_examples, read_bytes, read_json, read_text
from trainer.commands import command, make_parser
from trainer.files import replaced
from utils import UserError, print_result

__all__ = ["UserError", "command", "each", "load_examples", "make_parser", "print_result", "publish", "read_bytes"]
__all__ += ["read_json", "read_text", "refuse"]


def refuse(parser: argparse.ArgumentParser, problems: dict[str, object]) -> None:
    """Exits with the first message in problems, message -> condition, whose condition is true."""
    for problem, is_true in problems.items():
        if is_true:
            parser.error(problem)


def each(function: Callable, items: Iterable[tuple[object, object]], origin: object, complaint: str = "") -> list:
    """Returns function(item) for each (name, item).

    Raises UserError with the origin, the item's name, the complaint and the error's text where the function raises a
    LookupError, ValueError, TypeError or AttributeError.
    """
    results = []
    for name, item in items:
        try:
            results.append(function(item))
        except KeyError as error:
            raise UserError(f"{origin}: {name} lacks {error}") from None
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{origin}: {name} {complaint}{error}") from None
    return results


def publish(files: dict[Path, list[dict] | dict]) -> None:
    """Writes JSON files and missing folders. No file appears before all are written. Raises UserError."""
    with ExitStack() as stack:
        asides = {path: stack.enter_context(replaced(path)) for path in files}
        for path, content in files.items():
            asides[path].write_text(json.dumps(content), encoding="utf-8")
