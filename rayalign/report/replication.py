"""Intervals over training seeds and prompts, and differences between what was trained with several seeds.

The unit of replication is the training seed. Every seed of every entry answers the same prompts, so the two factors
cross. One resample draws S − 1 of the S seeds with replacement (Rao and Wu 1988: one fewer makes the variance
unbiased). It draws one set of prompts that all seeds share, for all that is compared. Prompts drawn again for each seed
would take S seeds for S times as many prompts.

Resampling both factors counts three times what is neither seed nor prompt, above all the chance in a reply. Two of the
three are taken off again (Owen 2007, *The pigeonhole bootstrap*). Percentiles of so few seeds cover far too little. So
an interval is mean ± t · standard error, with S − 1 degrees of freedom. A rate's is made of the same numbers and ends
in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayalign.report.statistics import (
    Bootstrap,
    Estimate,
    Matrix,
    Vector,
    estimate_mean,
    prompt_draws,
    quantile,
    rate_estimate,
    rate_interval,
    two_sided_p,
)

POWER = 0.8
ALPHA = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicated:
    """A mean over S ≥ 1 seeds and P prompts, ready to be compared."""

    values: Matrix
    """[S, P]; NaN is missing."""
    mean: float
    replicates: Vector
    """The mean in every resample."""
    noise: float
    """The variance that the chance within a seed and prompt gives the mean."""
    seeds: float
    """The variance that the choice of seeds gives the mean: between seeds / S. NaN with one seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Mean of one entry − mean of another, both trained with several seeds."""

    mean: float
    low: float
    high: float
    """Interval of this difference alone."""
    standard_error: float
    degrees_of_freedom: float
    """Welch and Satterthwaite's, of the two variances between seeds."""
    p: float
    """Two-sided, of this difference alone."""


def seed_draws(seeds: int, bootstrap: Bootstrap, stream: int) -> Matrix:
    """[resamples, seeds]: how often each seed is drawn; entries differ in ``stream``, their seeds being unrelated."""
    if seeds == 1:
        return np.ones((bootstrap.resamples, 1))
    random = np.random.default_rng([bootstrap.seed, 1, stream])
    return random.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=bootstrap.resamples).astype(np.float64)


def resampled_means(values: Matrix, seeds: Matrix, prompts: Matrix) -> Vector:
    """The mean of [S, P] ``values`` under every row of the two draws; NaN where nothing present was drawn."""
    present = ~np.isnan(values)
    sums = ((seeds @ np.where(present, values, 0.0)) * prompts).sum(axis=1)
    counts = ((seeds @ present.astype(np.float64)) * prompts).sum(axis=1)
    found: Vector = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return found


def replicated(values: Matrix, bootstrap: Bootstrap, *, stream: int = 0) -> Replicated:
    """[S, P] per-prompt values → the mean and what is needed for its interval. ``stream`` is the entry's place."""
    present = ~np.isnan(values)
    S, P = values.shape
    mean = float(np.mean(values[present])) if present.any() else math.nan
    noise, between = 0.0, math.nan
    if S > 1 and present.any():
        row, column = _means(values, axis=1), _means(values, axis=0)
        residual = (values - row[:, None] - column[None] + mean)[present]
        noise = float(np.square(residual).sum()) / max(1, (S - 1) * (P - 1)) / len(residual) if P > 1 else 0.0
        between = float(np.nanvar(row, ddof=1)) / S if np.isfinite(row).sum() > 1 else math.nan
    draws = resampled_means(values, seed_draws(S, bootstrap, stream), prompt_draws(P, bootstrap))
    return Replicated(values=values, mean=mean, replicates=draws, noise=noise, seeds=between)


def _means(values: Matrix, *, axis: int) -> Vector:
    present = ~np.isnan(values)
    counts = present.sum(axis=axis)
    sums = np.where(present, values, 0.0).sum(axis=axis)
    found: Vector = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return found


def two_level(values: Matrix, bootstrap: Bootstrap, *, stream: int = 0, rate: bool = False) -> Estimate:
    """[S, P] → mean and interval: over seeds and prompts, or over prompts only where there is one seed.

    The interval of a ``rate`` lies in [0, 1] (:func:`rayalign.report.statistics.rate_interval`).
    """
    if len(values) == 1:
        return (rate_estimate if rate else estimate_mean)(values[0], bootstrap)
    found = replicated(values, bootstrap, stream=stream)
    n = int((~np.isnan(values)).any(axis=0).sum())
    if math.isnan(found.seeds):
        return Estimate(mean=found.mean, low=math.nan, high=math.nan, n=n)
    error, df = _standard_error(found.replicates, [found]), len(values) - 1
    if rate:
        cells = values[~np.isnan(values)]
        variance = max(
            error**2, float(cells.var()) / len(cells)
        )  # seeds that fail alike are not one: never below chance
        low, high = rate_interval(found.mean, variance, n=n, df=df, level=bootstrap.level)
        return Estimate(mean=found.mean, low=low, high=high, n=n)
    half = quantile((1 + bootstrap.level) / 2, df) * error
    return Estimate(mean=found.mean, low=found.mean - half, high=found.mean + half, n=n)


def _standard_error(replicates: Vector, parts: Sequence[Replicated]) -> float:
    """√(variance of the resamples − twice the noise), and never less than the seeds alone give."""
    variance = float(np.nanvar(replicates)) - 2 * sum(part.noise for part in parts)
    return math.sqrt(max(variance, sum(part.seeds for part in parts)))


def difference(a: Replicated, b: Replicated, bootstrap: Bootstrap) -> Difference:
    """a − b, paired by prompt. Both need two seeds at least.

    Seeds are not paired: those of two configurations have a number in common and little else. What they do share, such
    as an order of the data, makes the interval wider than it need be.
    """
    parts = (a, b)
    error = _standard_error(a.replicates - b.replicates, parts)
    mean = a.mean - b.mean
    spread = sum(part.seeds**2 / (len(part.values) - 1) for part in parts)
    total = sum(part.seeds for part in parts)
    least = min(len(part.values) for part in parts) - 1
    df = max(float(least), total**2 / spread) if spread > 0 else float(least)
    p = two_sided_p(mean / error, df) if error > 0 else 1.0  # nothing varies, so nothing says how much it could
    half = quantile((1 + bootstrap.level) / 2, df) * error
    return Difference(mean=mean, low=mean - half, high=mean + half, standard_error=error, degrees_of_freedom=df, p=p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjustment of a family: p_(i) times what is left, never falling, at most 1."""
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def detectable(found: Difference, family: int) -> float:
    """The smallest true difference that this design would have called a difference with probability 0.8.

    (t_{1 − α/2m} + t_{0.8}) · standard error, with the difference's own degrees of freedom, α = 0.05 and m = ``family``
    comparisons: the first, strictest step of Holm's procedure. NaN where nothing varies.
    """
    if found.standard_error == 0:
        return math.nan
    df = found.degrees_of_freedom
    return (quantile(1 - ALPHA / (2 * family), df) + quantile(POWER, df)) * found.standard_error
