"""Shared by the command lines of all folders: a parser, and the exit code of a `main`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import wraps

from utils import UserError, print_error

# help texts of arguments that several commands have
CHECKPOINT = "a checkpoint folder, a run's folder (its newest epoch checkpoint), or a hub id"
TRUST_REMOTE_CODE = "run Python code that the model brings: read it first"


def make_parser(description: str, **options) -> argparse.ArgumentParser:
    """Returns a parser whose --help prints the description with its line breaks. options: of ArgumentParser."""
    shape = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=shape, **options)


def command(main: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """Decorates main(arguments) to return the exit code: 0, or 2 after a UserError, which it prints."""

    @wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            main(arguments)
        except UserError as error:
            return print_error(error)
        return 0

    return run
