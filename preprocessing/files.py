"""What the scripts of this folder share: imports from the folder above, exit codes, files that appear whole."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocessing.examples import load_examples, read_bytes, read_json, read_text
from utils import UserError, print_error, replaced

__all__ = ["UserError", "command", "load_examples", "print_error", "publish", "read_bytes", "read_json", "read_text"]


def command(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Makes main(arguments) return the exit code: its own, or 0, or 2 after a UserError, which it prints."""

    @wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments) or 0
        except UserError as error:
            return print_error(error)

    return run


def publish(files: dict[Path, list[dict] | dict]) -> None:
    """Writes JSON files, making folders as needed: none of them appears before all are written. Raises UserError."""
    with ExitStack() as stack:
        asides = {path: stack.enter_context(replaced(path)) for path in files}
        for path, content in files.items():
            asides[path].write_text(json.dumps(content), encoding="utf-8")
