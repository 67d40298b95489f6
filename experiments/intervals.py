"""95 % confidence intervals of a row of a table, without scipy.

S seeds, Q questions, R resamples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
SMALLEST_SPREAD = 5e-4  # standard deviation over seeds: less is no width in a table
LARGEST_GAP = 0.2  # between the accuracies of neighbouring seeds of a row with one mode


def clopper_pearson(k: int, n: int) -> tuple[float, float]:
    """Returns the exact interval of a probability after k successes in n trials (Clopper and Pearson 1934): the
    probabilities at which at least k, and at most k, successes have a probability of at least 2.5 %."""
    tail = (1 - CONFIDENCE) / 2

    def at_most(most: int, share: float) -> float:
        return sum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(most + 1))

    low = 0.0 if k == 0 else _bisect(lambda share: at_most(k - 1, share), 1 - tail, 1.0)
    high = 1.0 if k == n else _bisect(lambda share: at_most(k, share), tail, 1.0)
    return low, high


def t_quantile(freedom: int) -> float:
    """Returns the two-sided quantile of Student's t: half the width of a mean's interval, in standard errors."""
    return _bisect(lambda t: 1 - _within(t, freedom), 1 - CONFIDENCE, 1e3)


def _within(t: float, freedom: int) -> float:
    """Returns P(|T| <= t), a finite sum for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for i in range(freedom // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * i + 1 + odd) / (2 * i + 2 + odd)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def _bisect(function: Callable[[float], float], level: float, high: float) -> float:
    """Returns the x in [0, high] at which a decreasing function equals `level`."""
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > level else (low, middle)
    return (low + high) / 2


def has_one_mode(values: Sequence[float]) -> bool:
    """Whether neighbouring seeds are at most LARGEST_GAP apart; otherwise the mean describes none of them."""
    ordered = sorted(values)
    return all(after - before <= LARGEST_GAP + 1e-9 for before, after in pairwise(ordered))


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns the t interval of the mean accuracy, cut to 0..1; None for one seed, seeds with several modes, and seeds
    that are equal in a table: their spread is then that of the questions, which the interval leaves out."""
    if len(values) < 2 or not has_one_mode(values) or statistics.stdev(values) < SMALLEST_SPREAD:
        return None
    mean = statistics.mean(values)
    reach = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return max(0.0, mean - reach), min(1.0, mean + reach)


def difference(rows: dict[int, np.ndarray], control: dict[int, np.ndarray]) -> tuple[float, ...] | None:
    """Returns (mean, low, high) of the accuracy minus the control's, over the seeds that both have; (mean,) for one
    such seed, None for none. rows, control: seed -> (Q,) 0 or 1 per question, of the same questions.

    The interval is a paired two-level bootstrap: each of R resamples draws S seeds with replacement, then Q questions,
    the same ones for every seed and for both rows.
    """
    seeds = [seed for seed in rows if seed in control and len(rows[seed]) == len(control[seed])]
    if not seeds:
        return None
    pairs = np.stack([rows[seed] - control[seed] for seed in seeds])  # (S, Q)
    if len(seeds) == 1:
        return (float(pairs.mean()),)
    random = np.random.default_rng(0)
    n_questions = pairs.shape[1]
    drawn = random.integers(len(seeds), size=(RESAMPLES, len(seeds)))  # (R, S)
    means = np.empty(RESAMPLES)
    for number, seeds_drawn in enumerate(drawn):
        counts = np.bincount(random.integers(n_questions, size=n_questions), minlength=n_questions)  # (Q,)
        means[number] = (pairs @ counts)[seeds_drawn].mean() / n_questions
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(pairs.mean()), float(low), float(high)
