"""Intervals, compared with quantiles of the beta and t distributions that mpmath computed."""

import intervals
import numpy as np
import pytest


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 1, 0, 0.975),
        (0, 3, 0, 0.707598),
        (3, 3, 0.292402, 1),
        (4, 5, 0.283582, 0.994949),
        (5, 10, 0.187086, 0.812914),
        (10, 10, 0.691503, 1),
        (19, 20, 0.751267, 0.998735),
    ],
)
def test_clopper_pearson(k, n, low, high):
    assert intervals.clopper_pearson(k, n) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (19, 2.093024), (1000, 1.962339)],
)
def test_quantiles_of_students_t(freedom, t):
    assert intervals.t_quantile(freedom) == pytest.approx(t, abs=1e-6)


def test_a_mean_has_an_interval_if_its_seeds_have_one_mode():
    low, high = intervals.mean_interval([0.70, 0.72, 0.74])
    assert (low + high) / 2 == pytest.approx(0.72)
    assert high - low == pytest.approx(2 * 4.302653 * 0.02 / 3**0.5)
    assert intervals.mean_interval([0.97, 0.99]) == (pytest.approx(0.98 - 12.706205 * 0.01), 1.0)
    assert intervals.mean_interval([0.97]) is None
    assert intervals.mean_interval([1.0, 1.0, 1.0]) is None  # bug: an interval without width
    assert intervals.mean_interval([0.99, 1.0, 0.05]) is None
    assert intervals.mean_interval([0.7, 0.9]) is not None  # bug: 20 points apart, and a little more in floats


def test_a_difference_resamples_seeds_and_questions():
    """Resampling questions only gave +76.0 to +77.1, though one seed of five had learnt nothing."""
    rows = {seed: np.full(1000, int(seed != 3)) for seed in range(5)}
    control = {seed: np.zeros(1000, dtype=int) for seed in range(5)}
    mean, low, high = intervals.difference(rows, control)
    assert mean == 0.8
    assert low == pytest.approx(0.4)  # 2 of 5 seeds: 0.7 % of the resamples have fewer, 5.8 % as many
    assert high == 1
    assert intervals.difference(control, control) == (0, 0, 0)
    assert intervals.difference({0: rows[0], 7: rows[0]}, control) == (1.0,)  # one common seed
    assert intervals.difference({7: rows[0]}, control) is None


def test_a_resample_has_the_same_questions_for_all_seeds_and_rows():
    """A difference that depends on the question only has the uncertainty of the questions, with any number of seeds:
    with 200 of 400 questions the standard deviation is 2.5 points."""
    right = np.arange(400) % 2
    mean, low, high = intervals.difference(dict.fromkeys(range(8), right), dict.fromkeys(range(8), 0 * right))
    assert mean == 0.5
    assert high - low == pytest.approx(2 * 1.96 * 0.025, rel=0.06)
