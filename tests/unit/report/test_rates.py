"""Intervals of rates stay in [0, 1] and cover: simulated, with seeds, beside hand-made and printed numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from rayalign.report.length_control import lc_win_rate
from rayalign.report.replication import two_level
from rayalign.report.statistics import (
    Bootstrap,
    Estimate,
    estimate_mean,
    is_rate,
    rate_estimate,
    rate_interval,
    ratio_estimate,
)

QUICK = Bootstrap(resamples=200)
Random = np.random.Generator


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (15, 148, 0.0624, 0.1605), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval_of_the_printed_tables(successes: int, n: int, low: float, high: float) -> None:
    """Newcombe (1998), table I: method 3, whose variance is p (1 − p) / n and whose quantile is the normal one."""
    rate = successes / n
    found = rate_interval(rate, rate * (1 - rate) / n, n=n, df=1e9, level=0.95)
    assert found == pytest.approx((low, high), abs=1e-4)


def covers(make: Callable[[Random], Estimate], truth: float, *, runs: int, seed: int = 0) -> float:
    """The share of intervals that hold the truth; each of them lies in [0, 1] around its mean."""
    random, covered = np.random.default_rng(seed), 0
    for _ in range(runs):
        found = make(random)
        assert 0 <= found.low <= found.mean <= found.high <= 1
        covered += found.low <= truth <= found.high
    return covered / runs


def test_shares_are_covered_near_the_ends_too() -> None:
    """On average; counts are whole, so that at a single rate the coverage jumps, to 0.9 at the least."""

    def coverage(rate: float, n: int) -> float:
        return covers(lambda random: rate_estimate((random.random(n) < rate).astype(float), QUICK), rate, runs=400)

    found = [coverage(rate, n) for rate in (0.01, 0.1, 0.5, 0.75, 0.97) for n in (8, 60)]
    assert min(found) >= 0.89 and np.mean(found) >= 0.945


def test_percentiles_of_the_bootstrap_do_not_cover_there() -> None:
    """What was there before: of sixty prompts with 1 %, more than half of the samples have no failure at all."""

    def share(random: Random) -> Estimate:
        return estimate_mean((random.random(60) < 0.01).astype(float), QUICK)

    assert covers(share, 0.01, runs=200) < 0.6


@pytest.mark.parametrize(("a", "b"), [(8.0, 1.0), (0.3, 0.3), (30.0, 30.0)])
def test_means_of_win_shares_are_covered(a: float, b: float) -> None:
    assert covers(lambda random: rate_estimate(random.beta(a, b, 30), QUICK), a / (a + b), runs=400) >= 0.93


def test_pairs_of_one_ranking_count_together() -> None:
    """Rankings of 1 to 6 pairs that are mostly right or wrong as a whole: accuracy over pairs, rows resampled."""

    def accuracy(random: Random) -> Estimate:
        counts = random.integers(1, 7, 60)
        right = random.binomial(counts, random.beta(2.7, 0.3, 60))
        return ratio_estimate(right.astype(float), counts.astype(float), QUICK)

    assert covers(accuracy, 0.9, runs=400) >= 0.92


@pytest.mark.parametrize("middle", [0.5, 4.0])
@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_seeds_and_prompts_are_covered(seeds: int, middle: float) -> None:
    """A reply wins with probability σ(middle + effect of its seed + effect of its prompt); the truth by quadrature."""
    spread = math.sqrt(0.4**2 + 1.0**2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    truth = float(weights @ (1 / (1 + np.exp(-(middle + spread * nodes)))) / weights.sum())

    def rate(random: Random) -> Estimate:
        logit = middle + random.normal(0, 0.4, (seeds, 1)) + random.normal(0, 1.0, 40)
        return two_level((random.random((seeds, 40)) < 1 / (1 + np.exp(-logit))).astype(float), QUICK, rate=True)

    assert covers(rate, truth, runs=200) >= 0.93


def test_length_controlled_rates_are_covered() -> None:
    """Preferences that follow the model: logit P = 2.2 + 0.8 tanh(difference / its deviation); σ(2.2) is 0.90."""

    def rate(random: Random) -> Estimate:
        difference = random.normal(0, 20, (60, 2))
        wins = random.random((60, 2)) < 1 / (1 + np.exp(-(2.2 + 0.8 * np.tanh(difference / difference.std()))))
        return rate_estimate(lc_win_rate(wins.astype(float), difference), QUICK)

    assert covers(rate, 1 / (1 + math.exp(-2.2)), runs=150) >= 0.92


def test_a_policy_that_wins_all_has_a_length_controlled_rate_below_one() -> None:
    difference = np.random.default_rng(0).normal(0, 20, (20, 2))
    for seeds in (1, 2, 4):
        values = np.stack([lc_win_rate(np.ones((20, 2)), difference)] * seeds)
        found = two_level(values, QUICK, rate=True)
        assert 0.8 < found.low < found.mean < found.high <= 1 or seeds == 2 and 0 < found.low < found.high <= 1


def test_agreement_is_no_certainty_and_ties_are() -> None:
    two = rate_estimate(np.ones(2), QUICK)  # a reward model that orders two pairs of two
    assert (two.mean, two.high) == (1.0, 1.0) and two.low < 0.05
    many = rate_estimate(np.zeros(400), QUICK)
    assert (many.low, many.mean) == (0.0, 0.0) and 0 < many.high < 0.02
    tied = rate_estimate(np.full(20, 0.5), QUICK)
    assert (tied.low, tied.mean, tied.high) == (0.5, 0.5, 0.5)


def test_what_is_missing_is_left_out() -> None:
    nan = math.nan
    found = rate_estimate(np.array([1.0, nan, 0.0, 1.0]), QUICK)
    assert (found.mean, found.n) == (2 / 3, 3)
    assert math.isnan(rate_estimate(np.array([nan, 1.0]), QUICK).low) and rate_estimate(np.array([nan]), QUICK).n == 0


def test_rates_are_told_by_their_values() -> None:
    assert is_rate(np.array([0.0, 0.3, 1.0, math.nan]))
    assert not is_rate(np.array([0.0, 1.2])) and not is_rate(np.array([-0.1, 1.0]))
