"""Reads data files, lists of {"question": str, "steps": list of str, "answer": str}; other fields are kept."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import shlex
from pathlib import Path

from utils import UserError, parse_json

PANDAS = """python -c 'import pandas, sys; pandas.read_{}(sys.argv[1]).to_json("NEW.json", orient="records")' {{}}"""
ARROW = (
    "python -c 'import pyarrow, sys; "
    """pyarrow.ipc.open_stream(sys.argv[1]).read_pandas().to_json("NEW.json", orient="records")' {}"""
)
ICONV = "iconv -f {} -t UTF-8 {{}} > NEW"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
FORMATS = {  # the first bytes of a file -> its format, a command that converts it
    LFS_POINTER: ("a Git LFS pointer", "git lfs pull"),
    b"PAR1": ("a Parquet file", PANDAS.format("parquet")),
    b"ARROW1": ("an Arrow file", PANDAS.format("feather")),
    b"\xff\xff\xff\xff": ("an Arrow stream", ARROW),
    b"\x1f\x8b": ("compressed by gzip", "gzip -dc {} > NEW"),
    b"BZh": ("compressed by bzip2", "bzip2 -dc {} > NEW"),
    b"\xfd7zXZ": ("compressed by xz", "xz -dc {} > NEW"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "zstd -dc {} > NEW"),
    b"PK\x03\x04": ("a ZIP archive", "unzip -p {} > NEW"),
    # UTF-32 first: it begins as UTF-16
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), ("UTF-32", ICONV.format("UTF-32"))),
    **dict.fromkeys((b"[\0\0\0", b"{\0\0\0"), ("UTF-32", ICONV.format("UTF-32LE"))),
    **dict.fromkeys((b"\0\0\0[", b"\0\0\0{"), ("UTF-32", ICONV.format("UTF-32BE"))),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), ("UTF-16", ICONV.format("UTF-16"))),
    **dict.fromkeys((b"[\0", b"{\0"), ("UTF-16", ICONV.format("UTF-16LE"))),
    **dict.fromkeys((b"\0[", b"\0{"), ("UTF-16", ICONV.format("UTF-16BE"))),
}
TABLES = {".csv": ("a CSV file", PANDAS.format("csv")), ".tsv": ("a TSV file", PANDAS.format("table"))}


def load_examples(path: str | Path, limit: int | None = None) -> list[dict]:
    """Returns the first `limit` examples (default: all) of a JSON list or a JSON Lines file.

    A numeric answer becomes its text. Raises UserError that names the file, the record and the wrong field.
    """
    text = read_text(path)
    first_line = text.lstrip().partition("\n")[0].rstrip()
    if first_line.startswith("{") and first_line.endswith("}"):
        lines = enumerate(text.split("\n"), start=1)
        examples = [read_json(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    elif first_line.startswith("{"):  # an object on several lines
        examples = [read_json(path, text)]
    elif not first_line.startswith("[") and (table := TABLES.get(Path(path).suffix.lower())):
        raise _other_format(path, *table)
    else:
        examples = read_json(path, text)
    if not isinstance(examples, list) or not examples:
        raise UserError(f"{path} must hold a JSON list of at least one example, or one example in each line")
    for number, example in enumerate(examples[:limit]):
        if problem := _record_problem(example):
            raise UserError(f"{path}: record {number} (counted from 0) {problem}")
    return examples[:limit]


def content_digest(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal. Raises UserError."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def read_bytes(path: str | Path) -> bytes:
    """Returns a file's bytes. Raises UserError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_text(path: str | Path) -> str:
    """Returns the text of a UTF-8 file without its byte order mark. Raises UserError, which names other formats."""
    content = read_bytes(path)
    for first_bytes, (name, command) in FORMATS.items():
        if content.startswith(first_bytes):
            raise _other_format(path, name, command)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise UserError(f"{path}: line {line} is not UTF-8") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def _other_format(path: str | Path, name: str, command: str) -> UserError:
    return UserError(f"{path} is {name}; this converts it: {command.format(shlex.quote(str(path)))}")


def read_json(path: str | Path, text: str | None = None):
    """Parses a JSON file, or `text` in its place. Raises UserError that names the file and the problem."""
    text = read_text(path) if text is None else text
    try:
        return parse_json(text, object_pairs_hook=_object)
    except ValueError as error:  # also for a number of thousands of digits and for a repeated key
        problem = str(error) if "\n" in text else str(error).replace("line 1 column", "column")
        raise UserError(f"{path} is not valid JSON: {problem}") from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Returns a JSON object as a dict. Raises ValueError for a repeated key, whose first value json would drop."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the object {json.dumps(dict(pairs)):.80} has {twice!r} twice")
    return dict(pairs)


def _record_problem(example) -> str | None:
    """Returns what is wrong with a record, or None. Replaces a numeric answer by its text."""
    if not isinstance(example, dict):
        return "is not an object"
    for field in ("question", "answer", "steps"):
        if field not in example:
            return f"lacks {field!r}"
    number = example["answer"]
    if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
        example["answer"] = str(example["answer"])
    for field in ("question", "answer"):
        if not isinstance(example[field], str):
            return f"has a {field!r} that is not a string"
    steps = example["steps"]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        return "has 'steps' that are not a list of strings"
    try:
        "".join([example["question"], example["answer"], *steps]).encode()
    except UnicodeEncodeError as error:
        return f"holds {error.object[error.start : error.end]!a}, half a character, which UTF-8 cannot encode"
    return None
