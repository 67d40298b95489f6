"""Data files: {question: str, answer: str, steps: list of str} each; other fields are kept."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
from pathlib import Path

from utils import UserError

PANDAS = """python -c 'import pandas; pandas.read_{}("{{}}").to_json("NEW.json", orient="records")'"""
ICONV = "iconv -f {} -t UTF-8 {{}} > NEW"
FORMATS = {  # how a file begins -> what it is, and the command that makes a readable one of it
    b"PAR1": ("a Parquet file", PANDAS.format("parquet")),
    b"ARROW1": ("an Arrow file", PANDAS.format("feather")),
    b"\x1f\x8b": ("compressed by gzip", "gzip -dc {} > NEW"),
    b"BZh": ("compressed by bzip2", "bzip2 -dc {} > NEW"),
    b"\xfd7zXZ": ("compressed by xz", "xz -dc {} > NEW"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "zstd -dc {} > NEW"),
    b"PK\x03\x04": ("a ZIP archive", "unzip -p {} > NEW"),
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), ("UTF-32", ICONV.format("UTF-32"))),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), ("UTF-16", ICONV.format("UTF-16"))),
    **dict.fromkeys((b"[\0", b"{\0"), ("UTF-16", ICONV.format("UTF-16LE"))),
    **dict.fromkeys((b"\0[", b"\0{"), ("UTF-16", ICONV.format("UTF-16BE"))),
}


def load_examples(path: str | Path, limit: int | None = None) -> list[dict]:
    """The first `limit` examples (default: all) of a JSON list, or of a file with a JSON object in each line.

    A number as an answer is read as its text. Raises UserError that names the file, and the record and field that is
    wrong.
    """
    text = read_text(path)
    if text.lstrip().startswith("{"):
        lines = enumerate(text.split("\n"), start=1)
        examples = [read_json(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    else:
        examples = read_json(path, text)
    if not isinstance(examples, list) or not examples:
        raise UserError(f"{path} must hold a JSON list of at least one example, or one example in each line")
    for number, example in enumerate(examples[:limit]):
        if problem := _record_problem(example):
            raise UserError(f"{path}: record {number} (counted from 0) {problem}")
    return examples[:limit]


def content_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises UserError."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_text(path: str | Path) -> str:
    """A UTF-8 file, without its byte order mark. Raises UserError that names the format of another file."""
    content = read_bytes(path)
    for begin, (name, convert) in FORMATS.items():
        if content.startswith(begin):
            raise UserError(f"{path} is {name}; this converts it: {convert.format(path)}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise UserError(f"{path}: line {line} is not UTF-8") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def read_json(path: str | Path, text: str | None = None):
    """The value in a JSON file, or in a text from it. Raises UserError that names the file and what is wrong."""
    text = read_text(path) if text is None else text
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:  # also a number of thousands of digits, and a key twice
        problem = str(error)
    raise UserError(f"{path} is not valid JSON: {problem}")


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Raises ValueError where it has a key twice: JSON itself would keep the last."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the object {json.dumps(dict(pairs)):.80} has {twice!r} twice")
    return dict(pairs)


def _record_problem(example) -> str | None:
    if not isinstance(example, dict):
        return "is no object"
    for field in ("question", "answer", "steps"):
        if field not in example:
            return f"lacks {field!r}"
    number = example["answer"]
    if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
        example["answer"] = str(example["answer"])
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
