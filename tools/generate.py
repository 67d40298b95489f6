"""Asks a trained model.

    python -m tools.generate checkpoints/state_tracking/coconut-0 Msnqw                    # prints what it writes
    python -m tools.generate checkpoints/state_tracking/coconut-0 Msnqw --show-thoughts    # and its thoughts
    python -m tools.generate checkpoints/state_tracking/coconut-0 --file questions.json --json > answers.jsonl
    echo '{"question": "Msnqw"}' | python -m tools.generate checkpoints/state_tracking/coconut-0 --json

Without a question and a file, questions come from standard input, a line each, and are answered one by one; a line or
a file may hold JSON objects with a "question". On a terminal there is a prompt, with a history of lines, and :help.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from curriculum import MODES

LEAST_TEMPERATURE = 0.001  # below it logits overflow, and the likeliest word is what is drawn anyway
HELP = """\
a line is a question; beside questions there are
  :thoughts K   K latent thoughts from now on; without K as many as the model's stage was trained with
  :show         show the likeliest words at each thought, or no longer
  :help         this
  :quit         or Ctrl-D, or Ctrl-C"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder, a run's folder (its newest checkpoint), or a hub id")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--file", type=Path, help="questions: a JSON list as in data/, or lines of text or JSON")
    parser.add_argument("--thoughts", type=int, metavar="K", help="latent thoughts (default: as its stage trained)")
    parser.add_argument("--mode", choices=MODES, help="of a model of method multi_mode (default: latent)")
    parser.add_argument("--show-thoughts", action="store_true", help="the likeliest words at each thought")
    parser.add_argument("--sample", action="store_true", help="draw the words instead of taking the likeliest")
    parser.add_argument("--temperature", type=float, default=1.0, help="with --sample (default: %(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K", help="with --sample, of the K likeliest (default: of all)")
    parser.add_argument("--top-p", type=float, metavar="P", help="with --sample, of the likeliest with P together")
    parser.add_argument("--seed", type=int, default=0, help="with --sample (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=32, metavar="N", help="with --file, at once (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object a question")
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # --help and mistakes are answered before the slow imports below

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice

import torch
from transformers.utils import logging

from tools.trained import Coconut
from utils import UserError, parse_json, print_error


def load(checkpoint: str) -> Coconut:
    """The model of a checkpoint folder or a run's folder, on a GPU where there is one. Raises UserError."""
    return Coconut.from_pretrained(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")


def records_of_file(path: Path) -> list[dict]:
    """The questions of a file: a JSON list as in data/, or a line each. Raises UserError that says what is wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark before it
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not text.lstrip().startswith("["):
        return list(records_of_lines(text.splitlines(), str(path)))
    try:
        records = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return [_checked(record, f"{path}: record {number} (counted from 0)") for number, record in enumerate(records)]


def records_of_lines(lines: Iterable[str], name: str) -> Iterator[dict]:
    """The questions of lines, each a text or a JSON object; empty lines are passed over."""
    for number, line in enumerate(_decoded(lines, name), start=1):
        line = line.strip()
        if not line.startswith("{"):
            if line:
                yield {"question": line}
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{name}: line {number} is not valid JSON: {error}") from None
        yield _checked(record, f"{name}: line {number}")


def _decoded(lines: Iterable[str], name: str) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8") from None


def _checked(record, where: str) -> dict:
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        raise UserError(f"{where} has no 'question' that is a text")
    return record


def as_json(record: dict, result: dict) -> str:
    """A line: the record, its answer called gold and its steps left out, and the result."""
    kept = {"gold" if name == "answer" else name: value for name, value in record.items() if name != "steps"}
    return json.dumps(kept | result, ensure_ascii=False)


def as_text(_, result: dict) -> str:
    """A line for each thought, then what the model wrote."""
    lines = []
    for number, words in enumerate(result.get("thoughts", []), start=1):
        lines.append(f"thought {number}: " + "  ".join(f"{token!r} {share:.1%}" for token, share in words))
    return "\n".join([*lines, result["output"].rstrip("\n")])


def converse(checkpoint: str, mode: str | None, asking: dict, written: Callable[[dict, dict], str]) -> int:
    """A prompt on a terminal, until its end or Ctrl-C; `asking` are the options of Coconut.answers, which commands
    change. A question that cannot be answered is said to be so, and the next one is waited for."""
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401 (it gives `input` a history, and keys to move in a line)
    try:
        model = load(checkpoint).in_mode(mode)
        model.config_with(asking["n_thoughts"])
        print("a question, or :help", flush=True)
        while (line := input("> ").strip()) != ":quit":
            try:
                if line.startswith(":"):
                    print(_obey(line, model, asking), flush=True)
                elif line:
                    (result,) = model.answers([line], **asking)
                    print(written({"question": line}, result), flush=True)
            except UserError as error:
                print(f"error: {error}", flush=True)
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


def _obey(line: str, model: Coconut, asking: dict) -> str:
    """Carries out a command; returns what there is to say. Raises UserError where it is none."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == ":help":
        return HELP
    if command == ":show":
        asking["show_thoughts"] = not asking["show_thoughts"]
        return f"the words at thoughts are {'shown' if asking['show_thoughts'] else 'no longer shown'}"
    if command != ":thoughts":
        raise UserError(f"there is no {command}; :help says what there is")
    if argument and not argument.isdecimal():
        raise UserError(f":thoughts takes a number, at least 0, not {argument!r}")
    number = int(argument) if argument else None
    model.config_with(number)
    asking["n_thoughts"] = number
    return f"{'as many thoughts as in training' if number is None else f'{number} thoughts'} from now on"


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.question is not None and options.file is not None:
        parser.error("a question and --file exclude each other")
    if min(options.batch, options.max_new_tokens) < 1 or (options.thoughts or 0) < 0 or not options.temperature > 0:
        parser.error("--batch, --max-new-tokens and --temperature must be positive, --thoughts at least 0")
    if (options.top_k is not None and options.top_k < 1) or not 0 < (
        1.0 if options.top_p is None else options.top_p
    ) <= 1:
        parser.error("--top-k must be at least 1, --top-p more than 0 and at most 1")
    if options.temperature < LEAST_TEMPERATURE or not 0 <= options.seed < 2**63:
        parser.error(f"--temperature must be at least {LEAST_TEMPERATURE}, --seed at least 0 and less than 2^63")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(options.seed)
    sampling = {}
    if options.sample:
        chosen = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        sampling = {"do_sample": True} | {name: value for name, value in chosen.items() if value is not None}
    asking = {"max_new_tokens": options.max_new_tokens, "n_thoughts": options.thoughts}
    asking |= {"show_thoughts": options.show_thoughts, **sampling}
    try:
        if options.question is not None:
            records = iter([{"question": options.question}])
        elif options.file is not None:
            records = iter(records_of_file(options.file))
        elif sys.stdin.isatty():
            return converse(options.checkpoint, options.mode, asking, as_json if options.json else as_text)
        else:
            records = records_of_lines(sys.stdin, "standard input")
        model = load(options.checkpoint).in_mode(options.mode)
        model.config_with(options.thoughts)  # no answer is waited for where it is an error
        while batch := list(islice(records, options.batch if options.file else 1)):
            results = model.answers([record["question"] for record in batch], **asking)
            for record, result in zip(batch, results, strict=True):
                print(as_json(record, result) if options.json else as_text(record, result), flush=True)
    except UserError as error:
        return print_error(error)
    except BrokenPipeError:  # the reader has seen enough; the interpreter must not flush to it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
