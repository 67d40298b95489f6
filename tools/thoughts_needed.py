"""Measures how many thoughts questions need: with fixed numbers, an oracle, and the stopping head's thresholds.

    python -m tools.thoughts_needed checkpoints/NAME data/machine/machine_test.json --out thoughts_needed.json

The model answers each question after k = 0..K thoughts. The oracle gives each question the fewest thoughts with which
its answer is right. Thresholds need a model of method stopping.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.examples import load_examples
from trainer.commands import CHECKPOINT, TRUST_REMOTE_CODE, command, make_parser
from trainer.files import write_whole
from trainer.run_folder import check_checkpoint
from utils import UserError, as_json, print_result, progress_bar

if TYPE_CHECKING:
    from coconut import Coconut  # takes seconds, so functions import it after the check of the arguments

THRESHOLDS = (0.01, 0.05, *(n / 10 for n in range(1, 10)), 0.95, 0.99)
HEADER = f"{'':24}{'accuracy':>10}{'95 %':>18}{'thoughts':>10}{'tokens':>8}"


def fewest_right(right: np.ndarray) -> np.ndarray:
    """Returns the fewest thoughts with which each of N questions is right, (N,); K + 1 if no number is enough.

    right: (N, K + 1) bool, by question and number of thoughts.
    """
    return np.where(right.any(axis=1), right.argmax(axis=1), right.shape[1])


def stops_at(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Returns the number of thoughts, at most K, after which each question's probability, (N, K + 1), is above a
    threshold."""
    above = probabilities > threshold
    above[:, -1] = True
    return above.argmax(axis=1)


def measure(
    model: Coconut, examples: list[dict], most: int | None, max_new_tokens: int, answer_match: str, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Answers all questions after k = 0..K thoughts. Raises UserError for a model without latents.

    Returns, by question and k, (N, K + 1) each: whether the answer is right, the number of new tokens, and the stopping
    head's probabilities p_k (None without a head).
    """
    from dataset import collate_prompts
    from trainer.evaluate import generate_tokens, gold_answer, is_right
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
            outputs = generate_tokens(pretrained, model.config.method, rows[part], max_new_tokens)
            for index, ids in enumerate(outputs, start=begin):
                text = model.tokenizer.decode(ids, skip_special_tokens=True)
                right[index, k] = is_right(text, gold_answer(examples[index]), answer_match)
                tokens[index, k] = len(ids)
            if k == most > 0 and probabilities is not None:
                inputs = collate_prompts(rows[part], eos)
                ids, mask = (inputs[name].to(device) for name in ("input_ids", "attention_mask"))
                probabilities[part] = model.probabilities(ids, mask).cpu().numpy()
    return right, tokens, probabilities


def summarize(right: np.ndarray, tokens: np.ndarray, probabilities: np.ndarray | None) -> dict:
    """Returns the rows of the table: `fixed`, one for each k; `oracle`; and `stopping`, one for each threshold.

    The oracle's thoughts and tokens are means over the questions that some k answers.
    """
    from trainer.evaluate import wilson

    def row(correct: np.ndarray, thoughts: np.ndarray, new_tokens: np.ndarray) -> dict:
        accuracy = float(correct.mean())
        found = {"accuracy": accuracy, "accuracy_95": wilson(accuracy, len(correct))}
        if len(thoughts):
            found |= {"thoughts": float(thoughts.mean()), "tokens": float(new_tokens.mean())}
        return found

    every, most = np.arange(len(right)), right.shape[1] - 1
    fewest = fewest_right(right)
    solved = np.flatnonzero(fewest <= most)
    found = {
        "fixed": [row(right[:, k], np.full(len(right), k), tokens[:, k]) for k in range(most + 1)],
        "oracle": row(fewest <= most, fewest[solved], tokens[solved, fewest[solved]]),
    }
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


@command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", help=CHECKPOINT)
    parser.add_argument("file", help="JSON list of {question, answer, steps}")
    parser.add_argument("--out", type=Path, default=Path("thoughts_needed.json"), help="(default: %(default)s)")
    parser.add_argument("--thoughts", type=int, metavar="K", help="at most K thoughts (default: as in training)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--answer-match", choices=("text", "number"), default="text", help="(default: %(default)s)")
    parser.add_argument("--questions", type=int, metavar="N", help="use the first N questions (default: all)")
    parser.add_argument("--batch", type=int, default=250, metavar="N", help="questions at once (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_REMOTE_CODE)
    options = parser.parse_args(arguments)
    questions = 1 if options.questions is None else options.questions
    if min(options.batch, options.max_new_tokens, questions) < 1 or (options.thoughts or 0) < 0:
        parser.error("--batch, --max-new-tokens and --questions must be positive, --thoughts at least 0")
    check_checkpoint(options.checkpoint)
    examples = load_examples(options.file, options.questions)
    from trainer.evaluate import gold_answers
    from trainer.inference import load_for_use

    gold_answers(examples, options.answer_match, options.file)
    model = load_for_use(options.checkpoint, trust_remote_code=options.trust_remote_code)
    how = (options.max_new_tokens, options.answer_match)
    right, tokens, probabilities = measure(model, examples, options.thoughts, *how, options.batch)
    found = summarize(right, tokens, probabilities)
    fewest = [k if k < right.shape[1] else None for k in fewest_right(right).tolist()]
    about = {"checkpoint": options.checkpoint, "file": options.file, "examples": len(examples)}
    about |= {"max_new_tokens": options.max_new_tokens, "answer_match": options.answer_match}
    write_whole(options.out, as_json(about | found | {"fewest": fewest}))
    print_result(table(found))


if __name__ == "__main__":
    sys.exit(main())
