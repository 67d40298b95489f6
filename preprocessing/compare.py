"""Are two data sets draws from one distribution? Permutation tests on many statistics of their examples, as a table.

A statistic gives every example numbers or words: how many nodes, the in-degree of each node, which names. What is
permuted is whole examples, for the values within one depend on each other; and most values are discrete with many
ties, which the textbook forms of two-sample tests do not allow for.

Each statistic becomes proportions per example: of the numbers up to each threshold, or of each word. The test statistic
is the sum over them of the squared difference of the two files' means, over the variance: the two-sample Anderson-
Darling distance for numbers, Pearson's for words. Holm's correction makes the chance of any false 'different' in a
table at most LEVEL.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from files import UserError, each

LEVEL = 0.01
LIMIT = 2000  # examples of a side that are measured
PERMUTATIONS = 19_999  # the smallest p is 1 over one more: Holm's correction must be able to leave it below LEVEL
FEWEST = 20  # examples of a side
THRESHOLDS = 32  # most of one statistic of numbers

Values = dict[str, list]  # statistic -> the numbers or words that one example has for it


class Row(NamedTuple):
    """One statistic: how it looks on either side, its p, and p after Holm's correction over the table."""

    name: str
    left: str
    right: str
    p: float
    holm: float

    @property
    def verdict(self) -> str:
        return "same" if self.holm >= LEVEL else "different"


def measure_all(examples: list[dict], measure: Callable[[dict], Values], origin: str, seed: int) -> list[Values]:
    """The statistics of at most LIMIT examples, drawn where there are more.

    Raises UserError that names the record that cannot be measured, or when there are too few.
    """
    if len(examples) < FEWEST:
        raise UserError(f"{origin}: {len(examples)} examples are too few to compare, it takes {FEWEST}")
    chosen = range(len(examples))
    if len(examples) > LIMIT:
        chosen = sorted(np.random.default_rng(seed).choice(len(examples), LIMIT, replace=False).tolist())
    named = ((f"record {number} (counted from 0)", examples[number]) for number in chosen)
    return each(measure, named, origin, "cannot be measured: ")


def compare(left: list[Values], right: list[Values], seed: int = 0) -> list[Row]:
    """A row for each statistic, in the order of the first example's."""
    columns = {name: [values[name] for values in left + right] for name in left[0]}
    p = _permutation_p(list(map(_features, columns.values())), len(left), np.random.default_rng(seed))
    numbers = zip(p.tolist(), _holm(p).tolist(), strict=True)
    n = len(left)
    return [
        Row(name, *_summaries(values[:n], values[n:]), *pair)
        for (name, values), pair in zip(columns.items(), numbers, strict=True)
    ]


def _features(values: list[list]) -> np.ndarray:
    """(examples, features): the proportion of an example's values at or below each threshold, or equal to each word."""
    flat = [value for row in values for value in row]
    if any(isinstance(value, str) for value in flat):
        marks = np.array(sorted(set(flat)))
        hits = [np.array(row)[:, None] == marks if row else [0.0 * (marks == "")] for row in values]
    else:
        marks = np.unique(np.array(flat, dtype=float))
        if len(marks) > THRESHOLDS:
            marks = np.unique(np.quantile(flat, np.linspace(0, 1, THRESHOLDS), method="nearest"))
        # the greatest stays: it separates examples without any value from the others
        hits = [np.array(row, dtype=float)[:, None] <= marks if row else [0.0 * marks] for row in values]
    return np.array([np.mean(of_row, axis=0) for of_row in hits]).reshape(len(values), len(marks))


def _permutation_p(features: list[np.ndarray], n_left: int, random: np.random.Generator) -> np.ndarray:
    """(statistics,) p values; all statistics see the same permutations of the examples."""
    stacked = np.concatenate(features, axis=1)
    deviation = stacked.std(axis=0)
    stacked = (stacked - stacked.mean(axis=0)) / np.where(deviation > 1e-12, deviation, np.inf)
    of_statistic = np.repeat(np.eye(len(features)), [matrix.shape[1] for matrix in features], axis=0)

    def distances(members: np.ndarray) -> np.ndarray:
        """(permutations, statistics); of standardised columns the right mean follows from the left one."""
        return (members @ stacked) ** 2 @ of_statistic

    n = len(stacked)
    observed = distances((np.arange(n) < n_left).astype(float)[None])[0]
    at_least = np.ones(len(features))
    for begin in range(0, PERMUTATIONS, 500):
        order = random.random((min(500, PERMUTATIONS - begin), n)).argpartition(n_left - 1, axis=1)
        members = np.zeros(order.shape)
        np.put_along_axis(members, order[:, :n_left], 1.0, axis=1)
        at_least += (distances(members) >= observed * (1 - 1e-9)).sum(axis=0)  # equal but for rounding is equal
    return at_least / (PERMUTATIONS + 1)


def _holm(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p, kind="stable")
    scaled = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(scaled, 1)[np.argsort(order)]


def _summaries(left: list[list], right: list[list]) -> tuple[str, str]:
    """Mean and standard deviation; of words, the share of the one that differs most."""
    flat = [[value for row in side for value in row] for side in (left, right)]
    words = sorted({value for side in flat for value in side if isinstance(value, str)})
    if not words:
        return tuple(f"{np.mean(side):.3f} ± {np.std(side):.3f}" if side else "none" for side in flat)
    shares = [[side.count(word) / max(len(side), 1) for side in flat] for word in words]
    word, share = max(zip(words, shares, strict=True), key=lambda pair: abs(pair[1][0] - pair[1][1]))
    return tuple(f"{word} {of_side:.1%}" for of_side in share)


def table(rows: list[Row], left: str, right: str) -> str:
    """The rows as text, under what the two sides are and above a line that sums up."""
    different = ", ".join(row.name for row in rows if row.verdict == "different")
    sum_up = f"different: {different}" if different else "all the same"
    smallest = min(row.holm for row in rows)
    return "\n".join(
        [
            f"left: {left}",
            f"right: {right}",
            "mean ± standard deviation; of words, the share of the one that differs most",
            "",
            f"{'statistic':<44} {'left':>20} {'right':>20} {'p':>7} {'Holm p':>7}  verdict",
            *(f"{r.name:<44} {r.left:>20} {r.right:>20} {r.p:>7.4f} {r.holm:>7.4f}  {r.verdict}" for r in rows),
            "",
            f"{len(rows)} statistics, {PERMUTATIONS:,} permutations, smallest Holm p {smallest:.4f}: {sum_up}",
        ]
    )


def check(
    paths: list[Path],
    read: Callable[[Path], list[dict]],
    make_splits: Callable[..., dict[str, list[dict]]],
    measure: Callable[[dict], Values],
    seed: int,
) -> int:
    """Prints the table of two files, or of one against what make_splits(sizes, seed=...) makes.

    Returns the exit code: 0, or 1 where any statistic is different.
    """
    sides = [(str(path), read(path)) for path in paths]
    if len(sides) == 1:
        # not the stream that the files of this seed come from: the file may be one of them
        made = make_splits({"check": LIMIT}, seed=(seed, 1))["check"]
        sides.append((f"generated with seed {seed}", made))
    left, right = (measure_all(examples, measure, origin, seed) for origin, examples in sides)
    rows = compare(left, right, seed)
    print(table(rows, *(f"{origin}, {min(len(examples), LIMIT):,} of {len(examples):,}" for origin, examples in sides)))
    return int(any(row.verdict == "different" for row in rows))
