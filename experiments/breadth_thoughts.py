"""Reads and replaces the thoughts of the breadth grid's models: do they hold the frontier? Writes breadth_thoughts.json
and breadth_thoughts.md to results/.

    python experiments/breadth_thoughts.py checkpoints/breadth/last-{0,1,2} checkpoints/breadth/token_st-{0,1,2}

For each checkpoint, on the test questions of experiments/breadth.yaml:

- Accuracy by the size of the last frontier. The k-th frontier is the set of states reachable after k buttons.
- The LM head at the position that makes thought k: AUC, the share of (reachable, unreachable) pairs of states that its
  probabilities order correctly, mean over the questions; and mass, the probability of all reachable states.
- Accuracy with each thought replaced before the next one is made: by the embedding of the likeliest token (what thought
  `token` feeds back), by the mean embedding under the LM head's probabilities, or by that of the frontier's states. A
  thought of `last` is ten times as long as an embedding, so also by these vectors with the norm of the thought they
  replace, and by the thought itself with the norm of the likeliest token's embedding. An answer that is no candidate
  is wrong, so accuracy may be below 50 %. Also by the thought that another question with as many buttons has there: a
  model that answers as before does not use its thoughts.
- The accuracy of rules that know the machine: follow one random path, or one to the last button and then both of its
  states, and guess if no candidate is reached; take the candidate that more starts reach by this word, or that more
  orders of the word's buttons reach from this start.
- Superposition: thought 1 replaced by that of the same question with another start, or by the mean of the two. Accuracy
  on questions with one candidate that is reachable from exactly one of the two starts, and one reachable from neither.

Legend: N questions, B questions of a batch, K thoughts, S states, V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from itertools import chain
from itertools import permutations as orders_of
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing")]
from preprocessing.examples import load_examples
from trainer.commands import command, make_parser
from trainer.run_folder import check_checkpoint
from utils import UserError, as_json, print_error, print_result, read_object


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="runs' folders, or checkpoints")
    parser.add_argument("--data", type=Path, default=Path("data/breadth"), help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="(default: results/)")
    return parser.parse_args(arguments)


def read_data(folder: Path) -> tuple[list[dict], dict]:
    """Returns the test questions and their machine. Raises UserError."""
    return load_examples(folder / "path_test.json"), read_object(folder / "path_machine.json")


if __name__ == "__main__":  # answers --help and errors before the slow imports below
    try:
        options = parse()
        read_data(options.data)
        for run in options.runs:
            check_checkpoint(run)
    except UserError as error:
        sys.exit(print_error(error))

import torch
from machine import STATES, frontiers_of
from tables import markdown

from analysis.search import auc
from analysis.subject import Change, Subject
from trainer.files import write_whole
from trainer.inference import thought_logits

SEED = 0  # for drawing the pairs of starts


def word_of(example: dict) -> tuple[str, str]:
    """Returns (start, word) of a question, which ends with its two candidates."""
    return example["question"][0], example["question"][1:-2]


def accuracy(subject: Subject, **options) -> float | None:
    return share(map(is_right, subject.answers(**options), subject.examples))


def is_right(answer: str, example: dict) -> bool:
    return answer == example["answer"]


def share(values) -> float | None:
    values = list(values)
    return round(sum(values) / len(values), 5) if values else None


def by_rules(examples: list[dict], permutations: dict) -> dict[str, dict[str, float]]:
    """Returns rule -> number of buttons, or "all" -> accuracy; a rule that cannot decide is right in half of the
    questions."""

    def paths(start: str, word: str) -> list[str]:
        """Returns where each path ends."""
        return [end for state in paths(start, word[:-1]) for end in permutations[word[-1]][state]] if word else [start]

    def reached(candidate: str, questions) -> float:
        return sum(candidate in frontiers_of(permutations, *one)[-1] for one in questions)

    found: dict[str, dict[str, list[float]]] = {}
    for example in examples:
        start, word = word_of(example)
        wrong = next(state for state in example["question"][-2:] if state != example["answer"])
        ends, before = paths(start, word), paths(start, word[:-1])
        both = sum(example["answer"] in permutations[word[-1]][state] for state in before) / len(before)
        starts = [(state, word) for state in next(iter(permutations.values()))]
        orders = [(start, order) for order in orders_of(word)]
        right = {"one path": 0.5 + 0.5 * ends.count(example["answer"]) / len(ends)}
        right["one path, both last states"] = 0.5 + 0.5 * both
        for rule, questions in (("any start", starts), ("any order", orders)):
            margin = reached(example["answer"], questions) - reached(wrong, questions)
            right[rule] = 0.5 + 0.5 * ((margin > 0) - (margin < 0))
        for rule, value in right.items():
            for group in (str(len(word)), "all"):
                found.setdefault(rule, {}).setdefault(group, []).append(value)
    return {rule: {group: share(values) for group, values in sorted(of.items())} for rule, of in found.items()}


class Replacement(NamedTuple):
    """A `Change` that replaces each thought when it is made; see `Coconut.forward`."""

    make: Callable  # (rows, number, thought, seen) -> (B, 1, D)

    def of(self, rows: slice):
        return lambda number, thought, seen: self.make(rows, number, thought, seen).to(thought)


def with_norm_of(content: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns the content, rescaled to the norm of `other`; both are (B, 1, D)."""
    return content * (other.norm(dim=-1, keepdim=True) / content.norm(dim=-1, keepdim=True))


def donors_of(lengths: list[int]) -> list[int]:
    """Returns for each question another one of the same length, drawn at random; itself if there is none."""
    donors, order = [0] * len(lengths), random.Random(SEED).sample(range(len(lengths)), len(lengths))
    for length in {*lengths}:
        group = [index for index in order if lengths[index] == length]
        for index, donor in zip(group, group[1:] + group[:1], strict=True):
            donors[index] = donor
    return donors


def replacements(subject: Subject, frontiers: list[list[str]]) -> dict[str, Replacement]:
    others = subject.thoughts()[donors_of([len(found) for found in frontiers])]  # (N, K, D)
    model, embed = subject.model, subject.model.base_causallm.get_input_embeddings()
    states = dict(zip(STATES, subject.tokenizer.convert_tokens_to_ids(list(STATES)), strict=True))

    def likeliest(rows, number, thought, seen) -> torch.Tensor:
        return embed(model.head(seen.hidden).argmax(-1))

    def mean(rows, number, thought, seen) -> torch.Tensor:
        return model.head(seen.hidden).softmax(-1) @ embed.weight

    def frontier(rows, number, thought, seen) -> torch.Tensor:
        sets = [found[min(number, len(found) - 1)] for found in frontiers[rows]]
        return torch.stack([embed.weight[[states[state] for state in one]].mean(0) for one in sets])[:, None]

    def own_short(rows, number, thought, seen) -> torch.Tensor:
        return with_norm_of(thought, likeliest(rows, number, thought, seen))

    def as_long(make: Callable) -> Callable:
        return lambda rows, number, thought, seen: with_norm_of(make(rows, number, thought, seen), thought)

    makers = {"likeliest token": likeliest, "mean token": mean, "mean of the frontier": frontier}
    makers |= {f"{name}, as long as the thought": as_long(make) for name, make in makers.items()}
    makers["the thought, as long as a token"] = own_short
    makers["the thoughts of another question"] = lambda rows, number, *_: others[rows, number, None]
    return {name: Replacement(make) for name, make in makers.items()}


@torch.no_grad()
def read_off(subject: Subject, frontiers: list[list[str]], n_states: int) -> list[dict]:
    """Returns AUC and mass of the LM head at the position that makes each thought."""
    ids = subject.tokenizer.convert_tokens_to_ids(list(STATES[:n_states]))
    logits = torch.cat([thought_logits(subject.model, **inputs)[0] for _, inputs in subject.batches()])  # (N, K, V)
    probabilities = logits.float().softmax(-1)[..., ids]  # (N, K, S)
    found = []
    for k in range(subject.n_thoughts):
        aucs, masses = [], []
        for number, frontiers_of_question in enumerate(frontiers):
            if k < len(frontiers_of_question):
                inside = torch.tensor([state in frontiers_of_question[k] for state in STATES[:n_states]])
                aucs.append(auc(probabilities[number, k, inside], probabilities[number, k, ~inside]))
                masses.append(float(probabilities[number, k, inside].sum()))
        found.append({"thought": k + 1, "questions": len(aucs), "auc": share(aucs), "mass": share(masses)})
    return found


def superposed(subject: Subject, permutations: dict, n: int = 500) -> dict:
    """Returns the accuracy with thought 1 of the question's own start, of another start, and their mean, on questions
    with one candidate reachable from the own start only ("own"), or the other only ("other"), and one from neither."""
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
    """Returns all measurements of one checkpoint."""
    examples, machine = read_data(data)
    subject = Subject.load(checkpoint, examples)
    frontiers = [frontiers_of(machine["permutations"], *word_of(example)) for example in examples]
    by_size: dict[int, list[bool]] = {}  # size of the last frontier -> whether each answer is right
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
    """Returns the text of breadth_thoughts.md."""
    rules, found = found["rules"], found["runs"]
    names = [*dict.fromkeys(name for one in found.values() for name in one["replaced"])]  # older runs have fewer
    depth = max(len(one["read off"]) for one in found.values())
    sizes = sorted({int(size) for one in found.values() for size in one["by size"]})
    head = ["run", "accuracy", *(f"thought {k}: AUC, mass" for k in range(1, depth + 1)), *names]
    head += [
        f"reachable from {whose} start only: thought 1 of its own, of the other, mean" for whose in ("its", "the other")
    ]
    rows, by_size = [], []
    for name, one in found.items():
        pairs = [f"{of['auc']:.2f}, {of['mass']:.2f}" for of in one["read off"]]
        mixed = [one["superposed"][who].values() for who in ("own", "other")]
        replaced = ([one["replaced"][n]] if n in one["replaced"] else [] for n in names)
        shares = ([one["accuracy"]], *replaced, *mixed)
        whole, *others = (", ".join(f"{100 * value:.1f}" for value in of) for of in shares)
        rows.append([name, whole, *pairs, *others])
        cells = [one["by size"].get(str(size)) for size in sizes]
        by_size.append([name, *("" if cell is None else f"{100 * cell['accuracy']:.0f}" for cell in cells)])
    about = " ".join(__doc__.split("\n\n", 2)[2].partition("Legend:")[0].split()).replace(" - ", "\n- ")
    command = "    python experiments/breadth_thoughts.py RUN ..."
    lines = ["# Breadth: what the thoughts hold", "", command, "", about, "", *markdown(head, rows), ""]
    lines += ["Accuracy by the size of the last frontier:", "", *markdown(["run", *map(str, sizes)], by_size), ""]
    groups = list(next(iter(rules.values())))
    of_rules = [[rule, *(f"{100 * of[group]:.1f}" for group in groups)] for rule, of in rules.items()]
    lines += ["Accuracy of the rules, by number of buttons:", "", *markdown(["rule", *groups], of_rules), ""]
    return "\n".join(lines)


@command
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    examples, machine = read_data(options.data)
    names = [Path(run).name for run in options.runs]
    names = names if len({*names}) == len(names) else options.runs
    runs = {name: measure(run, options.data) for name, run in zip(names, options.runs, strict=True)}
    found = {"rules": by_rules(examples, machine["permutations"]), "runs": runs}
    write_whole(options.out / "breadth_thoughts.json", as_json(found))
    write_whole(options.out / "breadth_thoughts.md", as_text(found))
    print_result(as_text(found))


if __name__ == "__main__":
    sys.exit(main())
