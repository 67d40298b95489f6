"""Makes the test sets for models that were trained on GSM8K: GSM-Hard, SVAMP and MultiArith.

Each is made from its original file, which is downloaded, or given by --from, and whose content is verified by its git
blob id. No set has written steps.

- gsm_hard: 1,319 questions, those of GSM8K's test set with greater numbers. Answers are floats up to
  9,284,017,268,534.4, 146 negative, 303 not whole, many with rounding noise such as 5186630.5999999996: they are
  written with 15 significant digits, which takes the noise off (299 are not whole then) and changes none by more than
  1e-7. 31 are nearer to 0 than 0.001 and not 0: compared as numbers, 0 is right there. As in GSM8K, 335 have double
  blanks.
- svamp: 1,000 questions, each with a body that stands apart. 358 bodies lack their full stop: it is added. Answers are
  floats, all whole, none negative.
- multiarith: 600 questions, with blanks around them, which go. 20 are duplicates, and stay: papers report on all 600,
  or on CODI's split of 180, which is multiarith_180.json. No licence is known: do not pass it on.

    python preprocessing/ood.py gsm_hard svamp multiarith       # data/{gsm_hard,svamp,multiarith,multiarith_180}.json
    python preprocessing/ood.py svamp --from SVAMP.json         # where there is no network
"""

import argparse
import hashlib
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from files import UserError, command, publish, read_bytes

GITHUB = "https://raw.githubusercontent.com"
CODI_180 = """
0 1 5 6 9 24 25 27 29 30 32 44 46 47 48 54 56 67 70 71 73 78 80 81 82 89 91 94 95 99 101 103 104 112 114 122 123
126 127 128 134 136 142 146 150 152 157 159 163 165 166 167 174 175 185 191 195 196 197 203 204 214 216 217 219
220 222 223 224 225 228 232 233 234 238 239 250 252 256 259 260 270 271 273 274 275 276 281 283 284 287 296 298
299 300 305 306 311 320 321 322 323 327 328 332 342 344 348 349 363 367 368 369 370 373 379 381 382 384 386 387
388 389 390 393 398 405 410 413 429 430 432 440 445 448 450 453 454 459 461 464 469 470 471 473 483 485 489 491
499 506 511 512 515 517 519 521 524 526 529 533 547 549 550 555 558 561 565 571 572 574 576 577 585 589 590 592
593 594 596
"""  # values of iIndex


class Source(NamedTuple):
    """The original file of a set, and what is made of it."""

    url: str
    blob: str  # the id that git gives its content
    convert: Callable[[bytes], dict[str, list[dict]]]  # -> the examples of each file, by its name without .json


def number_text(value: float) -> str:
    """A number as an answer: without exponent, rounding noise or decimals that are 0."""
    return format(Decimal(format(value, ".15g")), "f")


def example(question: str, answer: float, **others) -> dict:
    return {"question": question.strip(), "steps": [], "answer": number_text(answer), **others}


def gsm_hard(content: bytes) -> dict[str, list[dict]]:
    # not splitlines(): a question may hold the other characters that it takes for line ends
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
    """A file of a megabyte at most, kept in memory: a broken download leaves nothing. Raises UserError."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except urllib.error.URLError as error:  # HTTPError is one
        reason = error.reason
    except http.client.IncompleteRead as error:
        reason = f"it broke off after {len(error.partial):,} bytes"
    except (OSError, http.client.HTTPException) as error:
        reason = error
    raise UserError(f"{url} cannot be had: {reason or 'no reason is given'}; a copy of it is read by --from FILE")


def verify(content: bytes, origin: Path | str, source: Source) -> None:
    """Raises UserError where the content is not that of the original file."""
    found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if found != source.blob:
        raise UserError(
            f"{origin} is not the expected {source.url.rpartition('/')[2]}: its blob id is {found}, not {source.blob}"
        )


def described(examples: list[dict]) -> Iterator[str]:
    """Counts, each with what is counted."""
    numbers = [float(row["answer"]) for row in examples]
    yield f"{len(examples):,} examples"
    yield f"{sum(number < 0 for number in numbers):,} negative answers"
    yield f"{sum(number != int(number) for number in numbers):,} not whole"
    yield f"{len(examples) - len({row['question'] for row in examples}):,} duplicate questions"


@command
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=SOURCES, metavar="SET", help=" | ".join(SOURCES))
    parser.add_argument("--from", dest="file", type=Path, metavar="FILE", help="the original file of the one SET")
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.file is not None and len(options.sets) > 1:
        parser.error("--from is the file of one set: name one")
    for name in options.sets:
        source = SOURCES[name]
        content = download(source.url) if options.file is None else read_bytes(options.file)
        verify(content, options.file or source.url, source)
        made = {options.out / f"{file}.json": examples for file, examples in source.convert(content).items()}
        for path, examples in made.items():
            if path.is_file() and read_bytes(path) != json.dumps(examples).encode():
                raise UserError(f"{path} exists with other content: move it away, or name another folder by --out")
        publish(made)
        for path, examples in made.items():
            print(f"{path}: {', '.join(described(examples))}")


if __name__ == "__main__":
    sys.exit(main())
