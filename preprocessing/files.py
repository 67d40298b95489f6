"""What the scripts of this folder share: imports from the folder above, command lines, files that appear whole."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocessing.examples import load_examples, read_bytes, read_json, read_text
from trainer.files import replaced
from utils import UserError, print_error

__all__ = ["UserError", "command", "each", "load_examples", "make_parser", "publish", "read_bytes", "read_json"]
__all__ += ["read_text", "refuse"]


def command(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Makes main(arguments) return the exit code: its own, or 0, or 2 after a UserError, which it prints."""

    @wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments) or 0
        except UserError as error:
            return print_error(error)

    return run


def make_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def refuse(parser: argparse.ArgumentParser, problems: dict[str, object]) -> None:
    """Exits with the first problem, a sentence, that there is."""
    for problem, is_there in problems.items():
        if is_there:
            parser.error(problem)


def each(function: Callable, items: Iterable[tuple[object, object]], origin: object, complaint: str = "") -> list:
    """function(item) of each (name, item). Raises UserError where it raises KeyError, ValueError, ..., with the origin
    and the item's name before the complaint and the error's text."""
    found = []
    for name, item in items:
        try:
            found.append(function(item))
        except KeyError as error:
            raise UserError(f"{origin}: {name} lacks {error}") from None
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"{origin}: {name} {complaint}{error}") from None
    return found


def publish(files: dict[Path, list[dict] | dict]) -> None:
    """Writes JSON files, making folders as needed: none of them appears before all are written. Raises UserError."""
    with ExitStack() as stack:
        asides = {path: stack.enter_context(replaced(path)) for path in files}
        for path, content in files.items():
            asides[path].write_text(json.dumps(content), encoding="utf-8")
