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
from files import UserError

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
    result = []
    for number in chosen:
        try:
            result.append(measure(examples[number]))
        except KeyError as error:
            raise UserError(f"{origin}: record {number} (counted from 0) lacks {error}") from None
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"{origin}: record {number} (counted from 0) cannot be measured: {error}") from None
    return result


def compare(left: list[Values], right: list[Values], seed: int = 0) -> list[Row]:
    """A row for each statistic, in the order of the first example's."""
    names = list(left[0])
    features = [_features([values[name] for values in left + right]) for name in names]
    p = _permutation_p(features, len(left), np.random.default_rng(seed))
    holm = _holm(p)
    rows = []
    for name, *numbers in zip(names, p.tolist(), holm.tolist(), strict=True):
        sides = _summaries([values[name] for values in left], [values[name] for values in right])
        rows.append(Row(name, *sides, *numbers))
    return rows


def _features(values: list[list]) -> np.ndarray:
    """(examples, features): the proportion of an example's values at or below each threshold, or equal to each word."""
    flat = [value for row in values for value in row]
    if any(isinstance(value, str) for value in flat):
        marks = sorted(set(flat))
        hits = [[sum(value == mark for value in row) / max(len(row), 1) for mark in marks] for row in values]
    else:
        marks = np.unique(np.array(flat, dtype=float))
        if len(marks) > THRESHOLDS:
            marks = np.unique(np.quantile(flat, np.linspace(0, 1, THRESHOLDS), method="nearest"))
        # the greatest stays: it separates examples without any value from the others
        hits = [
            (np.asarray(row, dtype=float)[:, None] <= marks).mean(axis=0) if row else np.zeros(len(marks))
            for row in values
        ]
    return np.array(hits, dtype=float).reshape(len(values), len(marks))


def _permutation_p(features: list[np.ndarray], n_left: int, random: np.random.Generator) -> np.ndarray:
    """(statistics,) p values; all statistics see the same permutations of the examples."""
    widths = [matrix.shape[1] for matrix in features]
    owner = np.repeat(np.arange(len(features)), widths)
    stacked = np.concatenate(features, axis=1)
    deviation = stacked.std(axis=0)
    varies = deviation > 1e-12
    stacked, owner = (stacked - stacked.mean(axis=0))[:, varies] / deviation[varies], owner[varies]

    starts = np.flatnonzero(np.diff(owner, prepend=-1))  # where the columns of each statistic that varies begin

    def distances(members: np.ndarray) -> np.ndarray:
        """(permutations, statistics); of standardised columns the right mean follows from the left one."""
        sums = np.zeros((len(members), len(features)))
        if len(starts):
            sums[:, owner[starts]] = np.add.reduceat((members @ stacked) ** 2, starts, axis=1)
        return sums

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
    result = np.empty(len(p))
    result[order] = np.minimum(scaled, 1)
    return result


def _summaries(left: list[list], right: list[list]) -> tuple[str, str]:
    """Mean and standard deviation; of words, the share of the one that differs most."""
    flat = [[value for row in side for value in row] for side in (left, right)]
    words = sorted({value for side in flat for value in side if isinstance(value, str)})
    if not words:
        return tuple(f"{np.mean(side):.3f} ± {np.std(side):.3f}" if side else "none" for side in flat)
    shares = [{word: side.count(word) / max(len(side), 1) for word in words} for side in flat]
    word = max(words, key=lambda word: abs(shares[0][word] - shares[1][word]))
    return tuple(f"{word} {share[word]:.1%}" for share in shares)


def table(rows: list[Row], left: str, right: str) -> str:
    """The rows as text, under what the two sides are and above a line that sums up."""
    lines = [
        f"left: {left}",
        f"right: {right}",
        "mean ± standard deviation; of words, the share of the one that differs most",
        "",
        f"{'statistic':<44} {'left':>20} {'right':>20} {'p':>7} {'Holm p':>7}  verdict",
    ]
    lines += [f"{r.name:<44} {r.left:>20} {r.right:>20} {r.p:>7.4f} {r.holm:>7.4f}  {r.verdict}" for r in rows]
    different = [row.name for row in rows if row.verdict == "different"]
    sum_up = f"different: {', '.join(different)}" if different else "all the same"
    smallest = min(row.holm for row in rows)
    lines += ["", f"{len(rows)} statistics, {PERMUTATIONS:,} permutations, smallest Holm p {smallest:.4f}: {sum_up}"]
    return "\n".join(lines)


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
