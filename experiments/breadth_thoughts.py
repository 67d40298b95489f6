"""What the thoughts of the breadth grid hold: the frontier, read off and changed. Writes breadth_thoughts.json and .md.

    python experiments/breadth_thoughts.py checkpoints/breadth/last-{0,1,2} checkpoints/breadth/token_st-{0,1,2}

For each checkpoint, on the test questions of experiments/breadth.yaml:

- Accuracy by the size of the last frontier, the states that can be reached at the end of the word.
- Of the position that makes thought k, how the LM head ranks the states that can be reached after k buttons above the
  others (AUC: the mean over questions of the share of pairs that are in order), and how much of its probability is on
  them (mass).
- Accuracy with each thought replaced, once it is made, before the next is: by the embedding of the likeliest token
  (what thought `token` feeds), by the mean embedding under the LM head's probabilities, by the mean embedding of the
  states that can be reached (the frontier itself and nothing else).
- Superposition: the first thought replaced by that of the same question with another start, and by the mean of the two.
  Is a state that can be reached from the other start alone then preferred to one that can be reached from neither, and
  one that can be reached from its own start alone still?

Legend: N questions, B of a batch, K thoughts, S states, V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing")]
from machine import STATES, frontiers_of
from tables import markdown

from analysis.subject import Change, Subject
from preprocessing.examples import load_examples
from trainer.files import write_whole
from trainer.inference import thought_logits
from utils import UserError, as_json, print_error, read_object

SEED = 0  # of the pairs of starts


def word_of(example: dict) -> tuple[str, str]:
    """(start, word) of a question: what is before its two candidates."""
    return example["question"][0], example["question"][1:-2]


def auc(values: torch.Tensor, inside: torch.Tensor) -> float:
    """Share of pairs of a state inside and one outside, (S,) each, of which the one inside has the larger value."""
    pairs = values[inside][:, None] - values[~inside][None]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).double().mean())


def accuracy(subject: Subject, **options) -> float | None:
    return share(map(is_right, subject.answers(**options), subject.examples))


def is_right(answer: str, example: dict) -> bool:
    return answer == example["answer"]


def share(values) -> float | None:
    values = list(values)
    return round(sum(values) / len(values), 5) if values else None


class Replaced(NamedTuple):
    """In place of a `Change`: puts something else in the place of each thought as it is made, see `Coconut.forward`."""

    make: Callable  # (rows, number, seen) -> (B, 1, D)

    def of(self, rows: slice):
        return lambda number, thought, seen: self.make(rows, number, seen).to(thought)


def replacements(subject: Subject, frontiers: list[list[str]]) -> dict[str, Replaced]:
    model, embed = subject.model, subject.model.base_causallm.get_input_embeddings()
    states = dict(zip(STATES, subject.tokenizer.convert_tokens_to_ids(list(STATES)), strict=True))

    def frontier(rows: slice, number: int, _) -> torch.Tensor:
        sets = [found[min(number, len(found) - 1)] for found in frontiers[rows]]
        return torch.stack([embed.weight[[states[state] for state in one]].mean(0) for one in sets])[:, None]

    makers = {
        "likeliest token": lambda _, __, seen: embed(model.head(seen.hidden).argmax(-1)),
        "mean token": lambda _, __, seen: model.head(seen.hidden).softmax(-1) @ embed.weight,
        "mean of the frontier": frontier,
    }
    return {name: Replaced(make) for name, make in makers.items()}


@torch.no_grad()
def read_off(subject: Subject, frontiers: list[list[str]], n_states: int) -> list[dict]:
    """For each thought how the LM head, at the position that it is made from, values the states."""
    ids = subject.tokenizer.convert_tokens_to_ids(list(STATES[:n_states]))
    logits = torch.cat([thought_logits(subject.model, **inputs)[0] for _, inputs in subject.batches()])  # (N, K, V)
    shares = logits.float().softmax(-1)[..., ids]  # (N, K, S)
    found = []
    for k in range(subject.n_thoughts):
        aucs, masses = [], []
        for number, of_question in enumerate(frontiers):
            if k < len(of_question):
                inside = torch.tensor([state in of_question[k] for state in STATES[:n_states]])
                aucs.append(auc(shares[number, k], inside))
                masses.append(float(shares[number, k, inside].sum()))
        found.append({"thought": k + 1, "questions": len(aucs), "auc": share(aucs), "mass": share(masses)})
    return found


def superposed(subject: Subject, permutations: dict, n: int = 500) -> dict:
    """Accuracy on pairs of a state that can be reached from the question's own start, or the other, alone, and one from
    neither, with the first thought as it is, that of the other start, and the mean of the two."""
    rng = random.Random(SEED)
    words = sorted({word_of(example)[1] for example in subject.examples})
    states = list(next(iter(permutations.values())))
    questions, others = {"own": [], "other": []}, []
    while len(others) < n:
        word, (start, other) = rng.choice(words), rng.sample(states, 2)
        ends = [set(frontiers_of(permutations, one, word)[-1]) for one in (start, other)]
        alone = {"own": sorted(ends[0] - ends[1]), "other": sorted(ends[1] - ends[0])}
        neither = sorted(set(states) - ends[0] - ends[1])
        if not (alone["own"] and alone["other"] and neither):
            continue
        wrong = rng.choice(neither)
        for whose, reached in alone.items():
            answer = rng.choice(reached)
            pair = "".join(rng.sample([answer, wrong], 2))
            questions[whose].append({"question": start + word + pair, "steps": list(word), "answer": answer})
        others.append((other, word))
    found = {"questions": n}
    for whose, examples in questions.items():
        asked = subject.asking(examples)
        donors = [
            {**example, "question": other + example["question"][1:]}
            for example, (other, _) in zip(examples, others, strict=True)
        ]
        own, others_own = asked.thoughts(), subject.asking(donors).thoughts()  # (n, K, D)
        contents = {"its own": own, "the other's": others_own, "the mean": (own + others_own) / 2}
        found[whose] = {
            name: accuracy(asked, change=Change(content, frozenset({0}))) for name, content in contents.items()
        }
    return found


def measure(checkpoint: str, data: Path) -> dict:
    """Everything of one checkpoint."""
    examples = load_examples(data / "path_test.json")
    machine = read_object(data / "path_machine.json")
    subject = Subject.load(checkpoint, examples)
    frontiers = [frontiers_of(machine["permutations"], *word_of(example)) for example in examples]
    by_size: dict[int, list[bool]] = {}
    for answer, example, found in zip(subject.answers(), examples, frontiers, strict=True):
        by_size.setdefault(len(found[-1]), []).append(is_right(answer, example))
    return {
        "accuracy": share(chain.from_iterable(by_size.values())),
        "by size": {str(n): {"questions": len(of), "accuracy": share(of)} for n, of in sorted(by_size.items())},
        "read off": read_off(subject, frontiers, len(machine["states"])),
        "replaced": {name: accuracy(subject, change=edit) for name, edit in replacements(subject, frontiers).items()},
        "superposed": superposed(subject, machine["permutations"]),
    }


def as_text(found: dict[str, dict]) -> str:
    """The tables of breadth_thoughts.md."""
    names = list(next(iter(found.values()))["replaced"])
    depth = max(len(one["read off"]) for one in found.values())
    sizes = sorted({int(size) for one in found.values() for size in one["by size"]})
    head = ["run", "accuracy", *(f"thought {k}: AUC, mass" for k in range(1, depth + 1)), *names]
    head += [
        f"reached from {who} start alone: thought 1 its own, the other's, the mean" for who in ("its", "the other")
    ]
    rows, by_size = [], []
    for name, one in found.items():
        pairs = [f"{of['auc']:.2f}, {of['mass']:.2f}" for of in one["read off"]]
        mixed = [one["superposed"][who].values() for who in ("own", "other")]
        shares = ([one["accuracy"]], *([one["replaced"][n]] for n in names), *mixed)
        whole, *others = (", ".join(f"{100 * value:.1f}" for value in of) for of in shares)
        rows.append([name, whole, *pairs, *others])
        cells = [one["by size"].get(str(size)) for size in sizes]
        by_size.append([name, *("" if cell is None else f"{100 * cell['accuracy']:.0f}" for cell in cells)])
    what = " ".join(__doc__.split("\n\n", 2)[2].partition("Legend:")[0].split()).replace(" - ", "\n- ")
    lines = [
        "# Breadth: what the thoughts hold",
        "",
        "    python experiments/breadth_thoughts.py RUN ...",
        "",
        what,
        "",
    ]
    lines += [*markdown(head, rows), "", "Accuracy by the size of the last frontier:", ""]
    return "\n".join([*lines, *markdown(["run", *map(str, sizes)], by_size), ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or checkpoints")
    parser.add_argument("--data", type=Path, default=Path("data/breadth"), help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="(default: results/)")
    options = parser.parse_args(arguments)
    try:
        found = {Path(run).name: measure(run, options.data) for run in options.runs}
        write_whole(options.out / "breadth_thoughts.json", as_json(found))
        write_whole(options.out / "breadth_thoughts.md", as_text(found))
    except UserError as error:
        return print_error(error)
    print(as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
