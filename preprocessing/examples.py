"""Data files: a JSON list of {question, answer, steps}; other fields are kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from utils import UserError

JSON_SPACE = re.compile(r"[ \t\n\r]*")


def load_examples(path: str | Path, limit: int | None = None) -> list[dict]:
    """The examples of a file, or its first `limit`, as `read_examples` yields them."""
    return list(read_examples(path, limit))


def content_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal: which data it is, whatever its name. Raises UserError."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_examples(path: str | Path, limit: int | None = None) -> Iterator[dict]:
    """Reads a JSON list of {question: str, answer: str, steps: list of str}; other fields are kept.

    One example at a time: parsed all at once, GSM8K's training set would take a gigabyte. Raises UserError that names
    the file, and the record and field where one is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        for number, example in enumerate(_json_list(text)):
            if number == limit:
                return
            if problem := _record_problem(example):
                raise UserError(f"{path}: record {number} (counted from 0) {problem}")
            yield example
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} cannot be decoded") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except _NoListError:
        raise UserError(f"{path} must hold a JSON list of at least one example") from None
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: it is nested too deeply") from None
    except UserError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path} is not valid JSON: {error}") from None


class _NoListError(Exception):
    """JSON that is another value than a list, or an empty list."""


class _Twins(dict):
    """A JSON object with a key twice, of which JSON itself keeps the last."""

    twin: str


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        found = _Twins(found)
        keys = [key for key, _ in pairs]
        found.twin = next(key for key in keys if keys.count(key) > 1)
    return found


def _json_list(text: str) -> Iterator:
    """The items of a JSON list. Raises JSONDecodeError and _NoListError."""

    def skip_space(place: int) -> int:
        return JSON_SPACE.match(text, place).end()

    place = skip_space(0)
    if not text.startswith("[", place):
        json.loads(text)  # says what is wrong, if it is no JSON at all
        raise _NoListError
    place = skip_space(place + 1)
    if text.startswith("]", place):
        json.loads(text)
        raise _NoListError
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    while True:
        item, place = decoder.raw_decode(text, place)
        yield item
        place = skip_space(place)
        mark = text[place : place + 1]
        place = skip_space(place + 1)
        if mark == "]" and place == len(text):
            return
        if mark != ",":
            raise json.JSONDecodeError("Extra data" if mark == "]" else "Expecting ',' delimiter", text, place)


def _record_problem(example) -> str | None:
    if not isinstance(example, dict):
        return "is no object"
    if isinstance(example, _Twins):
        return f"has {example.twin!r} twice"
    for field in ("question", "answer", "steps"):
        if field not in example:
            return f"lacks {field!r}"
    for field in ("question", "answer"):
        if not isinstance(example[field], str):
            return f"has a {field!r} that is no text"
    steps = example["steps"]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        return "has 'steps' that are no list of texts"
    try:
        "".join([example["question"], example["answer"], *steps]).encode()
    except UnicodeEncodeError as error:
        return f"holds {error.object[error.start : error.end]!a}, half a character, which is no UTF-8"
    return None
