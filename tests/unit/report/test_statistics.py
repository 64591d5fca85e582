"""Means and intervals over prompts, against exact distributions and an independent resampling."""

from __future__ import annotations

import math
import random
from statistics import fmean

import numpy as np
import pytest

from rayalign.report.statistics import Bootstrap, estimate_mean, prompt_means


def test_samples_are_averaged_inside_a_prompt_first() -> None:
    nan = math.nan
    means = prompt_means(np.array([[1.0, 3.0], [nan, 5.0], [nan, nan]]))
    np.testing.assert_array_equal(means, [2.0, 5.0, nan])


def test_interval_of_a_share_is_the_binomial_one() -> None:
    """The mean of a resample of n values, k of them 1, is Binomial(n, k / n) / n: its quantiles are known exactly."""
    n, k = 40, 12
    values = np.array([1.0] * k + [0.0] * (n - k))
    cumulative = np.cumsum([math.comb(n, i) * 0.3**i * 0.7 ** (n - i) for i in range(n + 1)])
    low, high = (int(np.searchsorted(cumulative, tail)) / n for tail in (0.025, 0.975))
    found = estimate_mean(values, Bootstrap(resamples=20_000))
    assert found.mean == pytest.approx(0.3)
    assert found.n == n
    assert (found.low, found.high) == pytest.approx((low, high))


def test_interval_agrees_with_an_independent_resampling() -> None:
    values = np.random.default_rng(3).normal(0.6, 0.2, 50)
    chance = random.Random(11)
    means = sorted(fmean(chance.choices(values.tolist(), k=50)) for _ in range(20_000))
    found = estimate_mean(values, Bootstrap(resamples=20_000))
    standard_error = 0.2 / math.sqrt(50)
    assert found.low == pytest.approx(means[500], abs=0.1 * standard_error)
    assert found.high == pytest.approx(means[19_500], abs=0.1 * standard_error)


def test_equal_seeds_give_equal_intervals_and_others_do_not() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert estimate_mean(values, Bootstrap(seed=1)) == estimate_mean(values, Bootstrap(seed=1))
    assert estimate_mean(values, Bootstrap(seed=1)) != estimate_mean(values, Bootstrap(seed=2))


def test_missing_prompts_are_left_out_and_counted_out() -> None:
    found = estimate_mean(np.array([1.0, math.nan, math.nan]), Bootstrap())
    assert (found.mean, found.n) == (1.0, 1)
    assert math.isnan(found.low) and math.isnan(found.high)
    nothing = estimate_mean(np.array([math.nan]), Bootstrap())
    assert nothing.n == 0 and math.isnan(nothing.mean)
