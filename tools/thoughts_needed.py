"""How many thoughts questions need: answers after each fixed number of thoughts, with the best number, with a head.

    python -m tools.thoughts_needed checkpoints/NAME data/machine/machine_test.json --out thoughts_needed.json

Language is forced after k = 0..K thoughts. The oracle gives each question the fewest thoughts with which it is right. A
model of method stopping is also evaluated at many thresholds.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.examples import load_examples
from trainer.files import write_whole
from trainer.run_folder import check_checkpoint
from utils import UserError, as_json, print_error, print_result, progress_bar

if TYPE_CHECKING:
    from coconut import Coconut  # imported when the arguments have been checked: it takes seconds

THRESHOLDS = (0.01, 0.05, *(n / 10 for n in range(1, 10)), 0.95, 0.99)
HEADER = f"{'':24}{'accuracy':>10}{'95 %':>18}{'thoughts':>10}{'tokens':>8}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder, a run's folder (its newest checkpoint), or a hub id")
    parser.add_argument("file", help="JSON list of {question, answer, steps}")
    parser.add_argument("--out", type=Path, default=Path("thoughts_needed.json"), help="(default: %(default)s)")
    parser.add_argument("--thoughts", type=int, metavar="K", help="the most (default: as in training)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--answer-match", choices=("text", "number"), default="text", help="(default: %(default)s)")
    parser.add_argument("--questions", type=int, metavar="N", help="the first so many (default: all)")
    parser.add_argument("--batch", type=int, default=250, metavar="N", help="questions at once (default: %(default)s)")
    return parser


def fewest_right(right: np.ndarray) -> np.ndarray:
    """(N, K + 1) bool, by question and number of thoughts -> (N,) the fewest with which it is right; K + 1: none."""
    return np.where(right.any(axis=1), right.argmax(axis=1), right.shape[1])


def stops_at(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """(N, K + 1) -> (N,) after how many thoughts a threshold stops each question: K at the latest."""
    above = probabilities > threshold
    above[:, -1] = True
    return above.argmax(axis=1)


def measure(
    model: Coconut, examples: list[dict], most: int | None, max_new_tokens: int, answer_match: str, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """By question and number of thoughts k = 0..K, (N, K + 1) each: whether the answer is right, the new tokens, and of
    a model with a head the probabilities p_k; else None. Raises UserError for a model without latents."""
    from dataset import collate_prompts
    from trainer.evaluate import generate_tokens, is_right
    from trainer.inference import prompts
    from trainer.pretrained import Pretrained

    pretrained, device = Pretrained(model, model.tokenizer, model.markers), model.base_causallm.device
    questions, eos = [example["question"] for example in examples], model.markers.eos
    if most is None:
        most = prompts(model, questions[:1])[0].count(model.markers.latent)
    longest, limit = max(map(len, prompts(model, questions, n_thoughts=most))), model.max_positions or math.inf
    if longest >= limit:
        raise UserError(f"a question with {most} thoughts takes {longest} tokens, and the model has {limit} positions")
    right = np.zeros((len(examples), most + 1), dtype=bool)
    tokens, probabilities = np.zeros(right.shape, dtype=int), None
    if hasattr(model, "stop_head"):
        probabilities, model.stop_threshold = np.zeros(right.shape), 1.0
    for k in progress_bar(range(most + 1), "thoughts", "", shown=True):
        rows = prompts(model, questions, n_thoughts=k)
        for begin in range(0, len(rows), batch):
            part = slice(begin, begin + batch)
            written = generate_tokens(pretrained, model.config.method, rows[part], max_new_tokens, device)
            for index, ids in enumerate(written, start=begin):
                text = model.tokenizer.decode(ids, skip_special_tokens=True)
                gold = examples[index]["answer"].replace(",", "").strip()
                right[index, k], tokens[index, k] = is_right(text, gold, answer_match), len(ids)
            if k == most > 0 and probabilities is not None:
                inputs = collate_prompts(rows[part], eos)
                ids, mask = (inputs[name].to(device) for name in ("input_ids", "attention_mask"))
                probabilities[part] = model.probabilities(ids, mask).cpu().numpy()
    return right, tokens, probabilities


def summarize(right: np.ndarray, tokens: np.ndarray, probabilities: np.ndarray | None) -> dict:
    """The rows of the table: `fixed`, one for each k; `oracle`, whose thoughts are a mean over the questions that any k
    answers; `stopping`, one for each threshold."""
    from trainer.evaluate import wilson

    def row(correct: np.ndarray, thoughts: np.ndarray, written: np.ndarray) -> dict:
        accuracy = float(correct.mean())
        found = {"accuracy": accuracy, "accuracy_95": wilson(accuracy, len(correct))}
        return found | {"thoughts": float(thoughts.mean()), "tokens": float(written.mean())}

    every, most = np.arange(len(right)), right.shape[1] - 1
    at = {k: row(right[:, k], np.array(k), tokens[:, k]) for k in range(most + 1)}
    fewest = fewest_right(right)
    solved = fewest <= most
    oracle = {"accuracy": float(solved.mean()), "accuracy_95": wilson(float(solved.mean()), len(solved))}
    if solved.any():
        oracle |= {"thoughts": float(fewest[solved].mean())}
        oracle |= {"tokens": float(tokens[every[solved], fewest[solved]].mean())}
    found = {"fixed": list(at.values()), "oracle": oracle}
    if probabilities is not None:
        stops = {threshold: stops_at(probabilities, threshold) for threshold in THRESHOLDS}
        found["stopping"] = [
            {"threshold": threshold, **row(right[every, k], k, tokens[every, k])} for threshold, k in stops.items()
        ]
    return found


def table(found: dict) -> str:
    rows = [(f"fixed, k = {k}", row) for k, row in enumerate(found["fixed"])]
    rows += [("oracle, fewest k", found["oracle"])]
    rows += [(f"threshold {row['threshold']:g}", row) for row in found.get("stopping", [])]
    lines = [HEADER]
    for title, row in rows:
        low, high = row["accuracy_95"]
        means = "".join(f"{row[name]:>{width}.2f}" for name, width in (("thoughts", 10), ("tokens", 8)) if name in row)
        lines.append(f"{title:24}{row['accuracy']:>10.1%}{f'{low:.1%} to {high:.1%}':>18}{means}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    questions = 1 if options.questions is None else options.questions
    if min(options.batch, options.max_new_tokens, questions) < 1 or (options.thoughts or 0) < 0:
        parser.error("--batch, --max-new-tokens and --questions must be positive, --thoughts at least 0")
    try:
        check_checkpoint(options.checkpoint)
        examples = load_examples(options.file, options.questions)
        from tools.generate import load

        model = load(options.checkpoint)
        how = (options.max_new_tokens, options.answer_match)
        right, tokens, probabilities = measure(model, examples, options.thoughts, *how, options.batch)
        found = summarize(right, tokens, probabilities)
        fewest = [k if k < right.shape[1] else None for k in fewest_right(right).tolist()]
        about = {"checkpoint": options.checkpoint, "file": options.file, "examples": len(examples)}
        about |= {"max_new_tokens": options.max_new_tokens, "answer_match": options.answer_match}
        write_whole(options.out, as_json(about | found | {"fewest": fewest}))
        print_result(table(found))
    except UserError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
