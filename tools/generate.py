"""Asks a trained model.

    python -m tools.generate checkpoints/breadth/last-0 AcfaKD                    # prints its output
    python -m tools.generate checkpoints/breadth/last-0 AcfaKD --show-thoughts    # and its thoughts
    python -m tools.generate checkpoints/breadth/last-0 AcfaKD --samples 8        # 8 answers with their counts
    python -m tools.generate checkpoints/breadth/last-0 --file questions.json --json > answers.jsonl
    echo '{"question": "AcfaKD"}' | python -m tools.generate checkpoints/breadth/last-0 --json

Without a question and a file, questions come from standard input, one a line, and are answered one by one; a line or a
file may hold JSON objects with a "question". On a terminal there is a prompt, with a history of lines, and :help.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

from config import MIN_TEMPERATURE, split_noise
from trainer.run_folder import check_checkpoint
from utils import UserError, parse_json, print_error

if TYPE_CHECKING:
    from coconut import Coconut  # imported when the arguments have been checked: it takes seconds

HELP = """\
a line is a question; beside questions there are
  :thoughts K   K latent thoughts from now on; without K as many as in training at the model's stage
  :show         show the likeliest tokens at each thought, or stop showing them
  :help         this
  :quit         or Ctrl-D, or Ctrl-C"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder, a run's folder (its newest checkpoint), or a hub id")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--file", type=Path, help="questions: a JSON list as in data/, or lines of text or JSON")
    parser.add_argument("--thoughts", type=int, metavar="K", help="latent thoughts (default: as in training)")
    parser.add_argument("--mode", help="of a model that was trained in several (default: latent)")
    parser.add_argument("--show-thoughts", action="store_true", help="the likeliest tokens at each thought")
    parser.add_argument("--sample", action="store_true", help="sample instead of greedy decoding")
    parser.add_argument("--samples", type=int, metavar="N", help="sample N answers, and print each with its count")
    parser.add_argument("--thought-noise", default="0", metavar="S", help="with --samples: the key thought_noise")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="with --sample or --samples (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="with --sample, from the K likeliest (default: all)")
    parser.add_argument("--top-p", type=float, metavar="P", help="with --sample, from the likeliest, P together")
    parser.add_argument("--seed", type=int, default=0, help="with --sample or --samples (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="with --file (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each question")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, of which each is possible by itself."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.question is not None and options.file is not None:
        parser.error("a question and --file exclude each other")
    if min(options.batch, options.max_new_tokens) < 1 or (options.thoughts or 0) < 0:
        parser.error("--batch and --max-new-tokens must be positive, --thoughts at least 0")
    if (options.top_k is not None and options.top_k < 1) or not (options.top_p is None or 0 < options.top_p <= 1):
        parser.error("--top-k must be at least 1, --top-p more than 0 and at most 1")
    is_greedy = options.samples and options.temperature == 0
    if not (options.temperature >= MIN_TEMPERATURE or is_greedy) or not 0 <= options.seed < 2**63:
        parser.error(f"--temperature must be at least {MIN_TEMPERATURE}, --seed at least 0 and less than 2^63")
    if options.samples is not None and options.samples < 1:
        parser.error("--samples must be at least 1")
    if options.samples and (options.sample or options.top_k or options.top_p or options.show_thoughts):
        parser.error("--samples excludes --sample, --top-k, --top-p and --show-thoughts")
    try:
        split_noise(options.thought_noise)
    except ValueError as error:
        parser.error(f"--thought-noise {error}, not {options.thought_noise!r}")
    return options


def read_questions(path: Path) -> list[dict]:
    """The records of a file: a JSON list as in data/, or one a line. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not text.lstrip().startswith("["):
        return list(questions_of_lines(text.splitlines(), str(path)))
    try:
        records = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return [_checked(record, f"{path}: record {number} (counted from 0)") for number, record in enumerate(records)]


def questions_of_lines(lines: Iterable[str], name: str) -> Iterator[dict]:
    """The record of each line, a text or a JSON object; empty lines are skipped. Raises UserError."""
    try:
        for number, line in enumerate(map(str.strip, lines), start=1):
            if line.startswith("{"):
                try:
                    yield _checked(parse_json(line), f"{name}: line {number}")
                except UserError:
                    raise
                except ValueError as error:
                    raise UserError(f"{name}: line {number} is not valid JSON: {error}") from None
            elif line:
                yield {"question": line}
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8") from None


def _checked(record, where: str) -> dict:
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        raise UserError(f"{where} has no 'question' that is a text")
    return record


def load(checkpoint: str, seed: int = 0) -> Coconut:
    """The model of a checkpoint folder or a run's folder, on a GPU if there is one. Raises UserError."""
    import torch
    from transformers.utils import logging

    from coconut import Coconut

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(seed)
    return Coconut.from_pretrained(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")


def check_asking(model: Coconut, asking: dict) -> None:
    """Raises UserError where the model has no thoughts to count or no such mode."""
    from trainer import inference

    inference.config_for(model, asking["n_thoughts"], asking["mode"])


def make_asker(options: argparse.Namespace) -> Callable[[Coconut, list[str], dict], list[dict]]:
    """(model, questions, options of Coconut.answers) -> what that returns or, with --samples, {"samples": {answer: its
    count}} of each question; random numbers are those of (seed, number of the question)."""
    if options.samples is None:
        return lambda model, questions, asking: model.answers(questions, **asking)
    numbers = count()

    def ask(model: Coconut, questions: list[str], asking: dict) -> list[dict]:
        from trainer import inference

        keys = [(options.seed, next(numbers)) for _ in questions]
        policy = inference.Policy(options.temperature, options.thought_noise)
        how = {name: asking[name] for name in ("max_new_tokens", "n_thoughts", "mode")}
        return [{"samples": one} for one in inference.samples(model, questions, keys, options.samples, policy, **how)]

    return ask


def as_json(record: dict, result: dict) -> str:
    """The record without its steps, its answer named gold, and the result, in one line."""
    kept = {"gold" if name == "answer" else name: value for name, value in record.items() if name != "steps"}
    return json.dumps(kept | result, ensure_ascii=False)


def as_text(_, result: dict) -> str:
    """A line for each thought, then the output; or a line for each sampled answer."""
    if "samples" in result:
        return "\n".join(f"{n:>6}  {answer}" for answer, n in result["samples"].items())
    lines = []
    for number, tokens in enumerate(result.get("thoughts", []), start=1):
        lines.append(f"thought {number}: " + "  ".join(f"{token!r} {share:.1%}" for token, share in tokens))
    return "\n".join([*lines, result["output"].rstrip("\n")])


def converse(model: Coconut, ask: Callable, asking: dict, form) -> None:
    """A prompt on a terminal until its end or Ctrl-C; commands change `asking`, the options of Coconut.answers."""
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401 (it gives `input` a history and keys to move in a line)
    with suppress(EOFError, KeyboardInterrupt):
        print("a question, or :help", flush=True)
        while (line := input("> ").strip()) != ":quit":
            try:
                if line.startswith(":"):
                    print(_obey(line, model, asking), flush=True)
                elif line:
                    (result,) = ask(model, [line], asking)
                    print(form({"question": line}, result), flush=True)
            except UserError as error:
                print(f"error: {error}", flush=True)
        return
    print()


def _obey(line: str, model: Coconut, asking: dict) -> str:
    """Carries out a command and returns its reply. Raises UserError for an unknown one."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == ":help":
        return HELP
    if command == ":show":
        asking["show_thoughts"] = not asking["show_thoughts"]
        return f"the tokens at thoughts are {'shown' if asking['show_thoughts'] else 'no longer shown'}"
    if command != ":thoughts":
        raise UserError(f"there is no command {command}; :help lists them")
    if argument and not argument.isdecimal():
        raise UserError(f":thoughts takes a number, at least 0, not {argument!r}")
    number = int(argument) if argument else None
    check_asking(model, asking | {"n_thoughts": number})
    asking["n_thoughts"] = number
    return f"{'as many thoughts as in training' if number is None else f'{number} thoughts'} from now on"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    form, ask = as_json if options.json else as_text, make_asker(options)
    asking = {"max_new_tokens": options.max_new_tokens, "n_thoughts": options.thoughts, "mode": options.mode}
    asking["show_thoughts"] = options.show_thoughts
    if options.sample:
        chosen = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        asking |= {"do_sample": True} | {name: value for name, value in chosen.items() if value is not None}
    try:
        check_checkpoint(options.checkpoint)
        if options.question is not None:
            records = iter([{"question": options.question}])
        elif options.file is not None:
            records = iter(read_questions(options.file))
        else:
            records = questions_of_lines(sys.stdin, "standard input")
        model = load(options.checkpoint, options.seed)
        check_asking(model, asking)
        if options.question is None and options.file is None and sys.stdin.isatty():
            converse(model, ask, asking, form)
            return 0
        while batch := list(islice(records, options.batch if options.file else 1)):
            results = ask(model, [record["question"] for record in batch], asking)
            for record, result in zip(batch, results, strict=True):
                print(form(record, result), flush=True)
    except UserError as error:
        return print_error(error)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        if not isinstance(error, BrokenPipeError):  # `| head -1` has read enough
            return print_error(UserError(f"standard output cannot be written: {error.strerror or error}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
