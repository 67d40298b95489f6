"""Asks a trained model.

    python generate.py checkpoints/state_tracking/coconut-0 Msnqw                    # prints what it writes
    python generate.py checkpoints/state_tracking/coconut-0 Msnqw --show-thoughts    # and what its thoughts would say
    python generate.py checkpoints/state_tracking/coconut-0 --file data/machine/machine_test.json --json > answers.jsonl
    echo '{"question": "Msnqw"}' | python generate.py checkpoints/state_tracking/coconut-0 --json

Without a question and a file, questions come from standard input, a line each, and are answered one by one; a line or
a file may hold JSON objects with a "question".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

TOP = 5  # words shown of a thought


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder, or a run's folder: its newest checkpoint")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--file", type=Path, help="questions: a JSON list as in data/, or lines of text or JSON")
    parser.add_argument("--thoughts", type=int, metavar="K", help="latent thoughts (default: as its stage trained)")
    parser.add_argument("--show-thoughts", action="store_true", help=f"the {TOP} likeliest words at each thought")
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
import math
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from transformers.utils import logging

from checkpoint import DESCRIBED
from coconut import Coconut
from config import Config
from curriculum import Markers, prompt
from dataset import collate_prompts
from evaluate import extract_answer
from load_path import resolve
from pretrained import load_model, read_description
from utils import UserError, report


class Asked(NamedTuple):
    """A model, and the prompt that it was trained for."""

    model: Coconut
    tokenizer: object
    markers: Markers
    config: Config
    stage: int


def load(checkpoint: str, n_thoughts: int | None = None) -> Asked:
    """The model of a checkpoint folder or a run's folder, on a GPU where there is one; with n_thoughts latents instead
    of those of its stage.

    Raises UserError where it is none, or where there is no latent to ask for.
    """
    folder = resolve(checkpoint)
    description = read_description(folder)
    if description is None:
        raise UserError(
            f"{folder} lacks coconut.json, which says how a model was trained: it is no checkpoint of run.py"
        )
    known = {name: description[name] for name in DESCRIBED if name in description}
    config = Config(model_id=str(folder), **known)
    stage = description["stage"]
    if n_thoughts is not None:
        if config.method != "coconut":
            raise UserError(f"--thoughts is for models with latents, but {folder} is of method {config.method}")
        config.eval_latents = n_thoughts
    model, tokenizer, markers = load_model(config, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Asked(model.to(device).eval(), tokenizer, markers, config, stage)


def answer(
    asked: Asked, questions: list[str], max_new_tokens: int = 128, show_thoughts: bool = False, **sampling
) -> list[dict]:
    """What the model says to each question: {"output", "answer"}, and with show_thoughts "thoughts", for each latent
    the TOP likeliest [token, probability] pairs of the position that the thought is made from.

    sampling: options of Coconut.generate; without any it decodes greedily.
    Raises UserError where a question does not fit the model.
    """
    ids = asked.tokenizer([question + "\n" for question in questions])["input_ids"]
    prompts = [prompt(row, [], asked.stage, asked.config, asked.markers) for row in ids]
    limit = asked.model.max_positions or math.inf
    for question, row in zip(questions, prompts, strict=True):
        if len(row) >= limit:
            raise UserError(f"a question of {len(row)} tokens leaves no room in {limit} positions: {question[:60]!r}")
    batch = collate_prompts(prompts, asked.markers.eos)
    device = asked.model.base_causallm.device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    room = min(max_new_tokens, limit - batch["input_ids"].shape[1])
    rows = asked.model.generate(**batch, max_new_tokens=room, **sampling).tolist()
    results = []
    for row in rows:
        new = row[: row.index(asked.markers.eos)] if asked.markers.eos in row else row
        text = asked.tokenizer.decode(new, skip_special_tokens=True)
        results.append({"output": text, "answer": extract_answer(text)})
    if show_thoughts:
        for result, thoughts in zip(results, decoded_thoughts(asked, batch), strict=True):
            result["thoughts"] = thoughts
    return results


def decoded_thoughts(asked: Asked, batch: dict[str, torch.Tensor]) -> list[list[list[tuple[str, float]]]]:
    """For each row, for each latent: (token, probability) pairs, the likeliest first (paper, Section 5.2)."""
    top = asked.model.thought_logits(**batch).float().softmax(dim=-1).topk(TOP)  # (B, K, TOP) each

    def pairs(ids: list[int], shares: list[float]) -> list[tuple[str, float]]:
        return [(asked.tokenizer.decode([token]), round(share, 4)) for token, share in zip(ids, shares, strict=True)]

    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[pairs(ids, shares) for ids, shares in zip(*row, strict=True)] for row in rows]


def records_of_file(path: Path) -> list[dict]:
    """The questions of a file: a JSON list as in data/, or a line each. Raises UserError that says what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not text.lstrip().startswith("["):
        return list(records_of_lines(text.splitlines(), str(path)))
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    return [_checked(record, f"{path}: record {number} (counted from 0)") for number, record in enumerate(records)]


def records_of_lines(lines: Iterable[str], name: str) -> Iterator[dict]:
    """The questions of lines, each a text or a JSON object; empty lines are passed over."""
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line.startswith("{"):
            if line:
                yield {"question": line}
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}: line {number} is not valid JSON: {error.msg}") from None
        yield _checked(record, f"{name}: line {number}")


def _checked(record, where: str) -> dict:
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        raise UserError(f"{where} has no 'question' that is a text")
    return record


def as_json(record: dict, result: dict) -> str:
    """A line: the record, its answer called gold and its steps left out, and the result."""
    kept = {"gold" if name == "answer" else name: value for name, value in record.items() if name != "steps"}
    return json.dumps(kept | result, ensure_ascii=False)


def as_text(result: dict) -> str:
    """A line for each thought, then what the model wrote."""
    lines = []
    for number, words in enumerate(result.get("thoughts", []), start=1):
        lines.append(f"thought {number}: " + "  ".join(f"{token!r} {share:.1%}" for token, share in words))
    return "\n".join([*lines, result["output"].rstrip("\n")])


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.question is not None and options.file is not None:
        parser.error("a question and --file exclude each other")
    if min(options.batch, options.max_new_tokens) < 1 or (options.thoughts or 0) < 0 or not options.temperature > 0:
        parser.error("--batch, --max-new-tokens and --temperature must be positive, --thoughts at least 0")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(options.seed)
    sampling = {}
    if options.sample:
        chosen = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        sampling = {"do_sample": True} | {name: value for name, value in chosen.items() if value is not None}
    try:
        if options.question is not None:
            records = iter([{"question": options.question}])
        elif options.file is not None:
            records = iter(records_of_file(options.file))
        else:
            records = records_of_lines(sys.stdin, "standard input")
        asked = load(options.checkpoint, options.thoughts)
        while batch := list(islice(records, options.batch if options.file else 1)):
            questions = [record["question"] for record in batch]
            results = answer(asked, questions, options.max_new_tokens, options.show_thoughts, **sampling)
            for record, result in zip(batch, results, strict=True):
                print(as_json(record, result) if options.json else as_text(result), flush=True)
    except UserError as error:
        return report(error)
    except BrokenPipeError:  # the reader has seen enough; the interpreter must not flush to it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
