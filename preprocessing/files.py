"""What the scripts of this folder share: the modules one folder up, and files that appear whole or not at all."""

import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocessing.examples import load_examples
from utils import UserError, parse_json, print_error, replaced

__all__ = ["UserError", "load_examples", "print_error", "publish", "read_json", "read_text", "replaced"]


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises UserError that says why it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        lines = path.read_bytes().split(b"\n")
        number = next(number for number, line in enumerate(lines, start=1) if not _is_utf8(line))
        raise UserError(f"{path}: line {number} is not UTF-8") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_json(path: Path):
    """What a JSON file holds. Raises UserError that says why it cannot be read."""
    text = read_text(path)
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def publish(files: dict[Path, list[dict] | dict]) -> None:
    """Writes JSON files, making folders as needed: none of them appears before all are written.

    Raises UserError that names what cannot be written.
    """
    asides = {path: path.with_name(path.name + ".writing") for path in files}
    try:
        for path, examples in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise UserError(f"cannot write {path}: it is a folder")
            asides[path].write_text(json.dumps(examples), encoding="utf-8")
        for path, aside in asides.items():
            aside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from None
    finally:
        for aside in asides.values():
            with contextlib.suppress(OSError):  # renamed already, or its folder could not be made
                aside.unlink()
