"""Generates a trained model's answers.

    python -m tools.generate checkpoints/breadth/last-0 HgdaJO                    # prints the output
    python -m tools.generate checkpoints/breadth/last-0 HgdaJO --show-thoughts    # prints the thoughts too
    python -m tools.generate checkpoints/breadth/last-0 HgdaJO --samples 8        # prints 8 answers with their counts
    python -m tools.generate checkpoints/breadth/last-0 --file questions.json --json > answers.jsonl
    echo '{"question": "HgdaJO"}' | python -m tools.generate checkpoints/breadth/last-0 --json

Without a question and --file, the command reads questions from standard input and answers each line at once; on a
terminal it shows a prompt. A line is a question or, in a file or a pipe, a JSON object with a "question".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

from config import MIN_TEMPERATURE, split_noise
from methods import LARGEST_SAMPLE
from preprocessing.examples import read_json, read_text
from trainer import commands
from trainer.run_folder import check_checkpoint
from utils import UserError

if TYPE_CHECKING:
    from coconut import Coconut  # takes seconds, so it is imported after all checks of arguments


NEEDS = {  # option -> the options without which it would have no effect
    "thought_noise": ["samples"],
    "top_k": ["sample"],
    "top_p": ["sample"],
    "temperature": ["sample", "samples"],
    "seed": ["sample", "samples"],
}


def make_parser() -> argparse.ArgumentParser:
    parser = commands.make_parser(__doc__)
    parser.add_argument("checkpoint", help=commands.CHECKPOINT)
    parser.add_argument("question", nargs="?")
    parser.add_argument("--file", type=Path, help="questions: a JSON list as in data/, or one on each line")
    parser.add_argument("--thoughts", type=int, metavar="K", help="latent thoughts (default: as in training)")
    parser.add_argument("--mode", help="the key mode, of a model that has several (default: latent)")
    parser.add_argument("--show-thoughts", action="store_true", help="print the likeliest tokens at each thought")
    parser.add_argument("--sample", action="store_true", help="sample instead of greedy decoding")
    parser.add_argument("--samples", type=int, metavar="N", help="sample N answers and print each with its count")
    parser.add_argument("--thought-noise", default="0", metavar="S", help="with --samples, as the key thought_noise")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="with --sample or --samples (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="with --sample, from the K likeliest (default: all)")
    parser.add_argument("--top-p", type=float, metavar="P", help="with --sample, from the likeliest that sum to P")
    parser.add_argument("--seed", type=int, default=0, help="with --sample or --samples (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="with --file (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each question")
    parser.add_argument("--trust-remote-code", action="store_true", help=commands.TRUST_REMOTE_CODE)
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the arguments and checks what needs no model."""
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    if options.question is not None and options.file is not None:
        parser.error("a question and --file exclude each other")
    if min(options.batch, options.max_new_tokens) < 1 or (options.thoughts or 0) < 0:
        parser.error("--batch and --max-new-tokens must be positive, --thoughts at least 0")
    if (options.top_k is not None and options.top_k < 1) or not (options.top_p is None or 0 < options.top_p <= 1):
        parser.error("--top-k must be at least 1, --top-p more than 0 and at most 1")
    is_greedy = options.samples and options.temperature == 0
    if not (options.temperature >= MIN_TEMPERATURE or is_greedy) or not 0 <= options.seed < 2**63:
        parser.error(f"--temperature must be at least {MIN_TEMPERATURE}, --seed at least 0 and less than 2^63")
    if options.samples is not None and not 1 <= options.samples <= LARGEST_SAMPLE:
        parser.error(f"--samples must be from 1 to {LARGEST_SAMPLE}")
    if options.samples and (options.sample or options.top_k or options.top_p or options.show_thoughts):
        parser.error("--samples excludes --sample, --top-k, --top-p and --show-thoughts")
    for name, needed in NEEDS.items():
        is_given = getattr(options, name) != parser.get_default(name)
        if is_given and not any(getattr(options, one) for one in needed):
            parser.error(f"--{name.replace('_', '-')} needs {' or '.join(f'--{one}' for one in needed)}")
    try:
        split_noise(options.thought_noise)
    except ValueError as error:
        parser.error(f"--thought-noise {error}, not {options.thought_noise!r}")
    return options


def read_questions(path: Path) -> list[dict]:
    """Reads the records of a file: a JSON list as in data/, or one record on each line. Raises UserError."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return list(questions_of_lines(text.split("\n"), str(path)))  # a question may hold U+2028
    records = read_json(path, text)
    if not records:
        raise UserError(f"{path} is empty")
    return [_checked(record, f"{path}: record {number} (counted from 0)") for number, record in enumerate(records)]


def questions_of_lines(lines: Iterable[str], name: str) -> Iterator[dict]:
    """Yields the record of each line that is not empty: a question or a JSON object. Raises UserError."""
    try:
        for number, line in enumerate(map(str.strip, lines), start=1):
            where = f"{name}: line {number}"
            if line.startswith("{"):
                yield _checked(read_json(where, line), where)
            elif line:
                yield {"question": line}
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8") from None


def _checked(record, where: str) -> dict:
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        raise UserError(f"{where} has no 'question' that is a text")
    return record


def make_asker(model: Coconut, options: argparse.Namespace) -> Callable[[list[str]], list[dict]]:
    """Returns a function from questions to results: those of Coconut.answers or, with --samples, for each question
    {"samples": {answer: count}}, drawn with random numbers of (seed, index of the question). Raises UserError if the
    model has no such thoughts or mode."""
    from trainer import inference

    inference.config_for(model, options.thoughts, options.mode)
    how = {"max_new_tokens": options.max_new_tokens, "n_thoughts": options.thoughts, "mode": options.mode}
    if options.samples is not None:
        policy, numbers = inference.Policy(options.temperature, options.thought_noise), count()

        def sample(questions: list[str]) -> list[dict]:
            keys = [(options.seed, next(numbers)) for _ in questions]
            drawn = inference.samples(model, questions, keys, options.samples, policy, **how)
            return [{"samples": answers} for answers in drawn]

        return sample
    if options.sample:
        chosen = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        how |= {"do_sample": True} | {name: value for name, value in chosen.items() if value is not None}
    return partial(model.answers, show_thoughts=options.show_thoughts, **how)


def as_json(record: dict, result: dict) -> str:
    """Returns a JSON line: the record without its steps and with `gold` for its answer, and the result."""
    kept = {"gold" if name == "answer" else name: value for name, value in record.items() if name != "steps"}
    return json.dumps(kept | result, ensure_ascii=False)


def as_text(_, result: dict) -> str:
    """Returns a line for each thought and the output, or a line for each sampled answer."""
    if "samples" in result:
        return "\n".join(f"{n:>6}  {answer}" for answer, n in result["samples"].items())
    lines = []
    for number, tokens in enumerate(result.get("thoughts", []), start=1):
        lines.append(f"thought {number}: " + "  ".join(f"{token!r} {share:.1%}" for token, share in tokens))
    return "\n".join([*lines, result["output"].rstrip("\n")])


def converse(ask: Callable[[list[str]], list[dict]], form: Callable[[dict, dict], str]) -> None:
    """Answers questions at a prompt until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401 (gives `input` a history and keys for editing)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            if line := input("> ").strip():
                try:
                    (result,) = ask([line])
                    print(form({"question": line}, result), flush=True)
                except UserError as error:
                    print(f"error: {error}", flush=True)
    print()


@commands.command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    with suppress(AttributeError):  # closed, or no file
        sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may not be UTF-8
    form = as_json if options.json else as_text
    try:
        check_checkpoint(options.checkpoint)
        if options.question is not None:
            records = iter([{"question": options.question}])
        elif options.file is not None:
            records = iter(read_questions(options.file))
        elif sys.stdin is None:
            raise UserError("standard input is closed: name a question, or a --file")
        else:
            records = questions_of_lines(sys.stdin, "standard input")
        from trainer.inference import load_for_use

        model = load_for_use(options.checkpoint, options.seed, options.trust_remote_code)
        ask = make_asker(model, options)
        if options.question is None and options.file is None and sys.stdin.isatty():
            converse(ask, form)
            return
        while batch := list(islice(records, options.batch if options.file else 1)):
            results = ask([record["question"] for record in batch])
            for record, result in zip(batch, results, strict=True):
                print(form(record, result), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at its exit
        if not isinstance(error, BrokenPipeError):  # `| head -1` closes the pipe
            raise UserError(f"standard output cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())
