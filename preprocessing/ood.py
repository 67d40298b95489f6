"""Makes the test sets for models that were trained on GSM8K: GSM-Hard, SVAMP and MultiArith.

Downloads the original file of each set, or reads a copy (--from), verifies its git blob id and converts it. No set has
written steps. data/README.md lists the traps of each set.

- gsm_hard: answers are rounded to 15 significant digits, which removes the originals' rounding noise.
- svamp: bodies without a full stop get one.
- multiarith: the 20 duplicates stay, because papers report on all 600 questions or on CODI's 180 (multiarith_180.json).

    python preprocessing/ood.py gsm_hard svamp multiarith       # data/{gsm_hard,svamp,multiarith,multiarith_180}.json
    python preprocessing/ood.py svamp --from SVAMP.json         # without network
"""

import hashlib
import http.client
import json
import sys
import urllib.request
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from files import UserError, command, make_parser, print_result, publish, read_bytes, refuse

GITHUB = "https://raw.githubusercontent.com"
CODI_180 = """
0 1 5 6 9 24 25 27 29 30 32 44 46 47 48 54 56 67 70 71 73 78 80 81 82 89 91 94 95 99 101 103 104 112 114 122 123
126 127 128 134 136 142 146 150 152 157 159 163 165 166 167 174 175 185 191 195 196 197 203 204 214 216 217 219
220 222 223 224 225 228 232 233 234 238 239 250 252 256 259 260 270 271 273 274 275 276 281 283 284 287 296 298
299 300 305 306 311 320 321 322 323 327 328 332 342 344 348 349 363 367 368 369 370 373 379 381 382 384 386 387
388 389 390 393 398 405 410 413 429 430 432 440 445 448 450 453 454 459 461 464 469 470 471 473 483 485 489 491
499 506 511 512 515 517 519 521 524 526 529 533 547 549 550 555 558 561 565 571 572 574 576 577 585 589 590 592
593 594 596
"""  # the iIndex of each question


class Source(NamedTuple):
    """The original file of a set and its converter."""

    url: str
    blob: str  # git blob id of the content
    convert: Callable[[bytes], dict[str, list[dict]]]  # content -> {name of the file without .json: its examples}


def number_text(value: float) -> str:
    """Returns a number without exponent, rounding noise and trailing zeros."""
    return format(Decimal(format(value, ".15g")), "f")


def example(question: str, answer: float, **others) -> dict:
    return {"question": question.strip(), "steps": [], "answer": number_text(answer), **others}


def gsm_hard(content: bytes) -> dict[str, list[dict]]:
    # not splitlines(), which also splits at characters such as U+2028 inside a question
    rows = [json.loads(line) for line in content.decode().strip().split("\n")]
    return {"gsm_hard": [example(row["input"], row["target"]) for row in rows]}


def svamp(content: bytes) -> dict[str, list[dict]]:
    examples = []
    for row in json.loads(content):
        body = row["Body"].strip()
        question = f"{body if body.endswith('.') else body + '.'} {row['Question'].strip()}"
        examples.append(example(question, row["Answer"], id=row["ID"], type=row["Type"]))
    return {"svamp": examples}


def multiarith(content: bytes) -> dict[str, list[dict]]:
    rows = json.loads(content)
    everything = [example(row["sQuestion"], row["lSolutions"][0], index=row["iIndex"]) for row in rows]
    chosen = set(map(int, CODI_180.split()))
    return {"multiarith": everything, "multiarith_180": [row for row in everything if row["index"] in chosen]}


SOURCES = {
    "gsm_hard": Source(
        f"{GITHUB}/reasoning-machines/pal/HEAD/datasets/gsmhardv2.jsonl",  # Apache-2.0
        "b7e40dc829619f19ada3931fca88fba80bf2cc53",
        gsm_hard,
    ),
    "svamp": Source(
        f"{GITHUB}/arkilpatel/SVAMP/HEAD/SVAMP.json",  # MIT
        "aad093525105c6331581d7082250b9c22578271e",
        svamp,
    ),
    "multiarith": Source(
        f"{GITHUB}/kojima-takeshi188/zero_shot_cot/HEAD/dataset/MultiArith/MultiArith.json",
        "8b720d2f5b6658913bb3160fb0554aa57173ef3f",
        multiarith,
    ),
}


def download(url: str) -> bytes:
    """Downloads a file, at most a megabyte, into memory, so that a broken download leaves no file. Raises UserError."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{url} cannot be downloaded: {reason}; use --from FILE to read a copy") from None


def summary(examples: list[dict]) -> str:
    """Returns the counts that data/README.md lists, as text."""
    numbers = [float(row["answer"]) for row in examples]
    return (
        f"{len(examples):,} examples, {sum(number < 0 for number in numbers):,} negative answers, "
        f"{sum(number != int(number) for number in numbers):,} not integers, "
        f"{len(examples) - len({row['question'] for row in examples}):,} duplicate questions"
    )


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("sets", nargs="+", choices=SOURCES, metavar="SET", help=" | ".join(SOURCES))
    parser.add_argument(
        "--from", dest="file", type=Path, metavar="FILE", help="read the original file of the one SET from FILE"
    )
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    refuse(parser, {"--from is the file of one set: name a single SET": options.file and len(options.sets) > 1})
    for source in map(SOURCES.get, options.sets):
        content = read_bytes(options.file) if options.file else download(source.url)
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if found != source.blob:
            name = source.url.rpartition("/")[2]
            raise UserError(
                f"{options.file or source.url} is not the expected {name}: its blob id is {found}, not {source.blob}"
            )
        made = {options.out / f"{file}.json": examples for file, examples in source.convert(content).items()}
        for path, examples in made.items():
            if path.is_file() and read_bytes(path) != json.dumps(examples).encode():
                raise UserError(f"{path} exists with other content: move it away, or name another folder by --out")
        publish(made)
        for path, examples in made.items():
            print_result(f"{path}: {summary(examples)}")


if __name__ == "__main__":
    sys.exit(main())
