"""Means with intervals. The unit is the prompt: samples are averaged inside a prompt, then prompts are resampled.

An interval from here answers "what if other prompts of the same kind had been asked?" It says nothing about another
training seed: a cell is one run, and runs vary more than prompts do. Several seeds: :mod:`rayalign.report.replication`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

INTERVAL_HEAD = "interval over prompts, one training run"
SEEDS_HEAD = "interval over training seeds and prompts"

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """How intervals are drawn: percentiles of the mean over prompts resampled with replacement."""

    level: float = 0.95
    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over ``n`` prompts and its interval; NaN where there is none (n = 0; for the interval also n = 1)."""

    mean: float
    low: float
    high: float
    n: int


def prompt_means(samples: Matrix) -> Vector:
    """[P, S] to [P]: the mean over the samples a prompt has; NaN where it has none."""
    present = ~np.isnan(samples)
    counts = present.sum(axis=1)
    sums = np.where(present, samples, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def estimate(per_prompt: Vector, bootstrap: Bootstrap) -> Estimate:
    """Mean over the prompts that have a value, with a percentile bootstrap interval.

    Equal ``n`` gives equal resamples.
    """
    values = per_prompt[~np.isnan(per_prompt)]
    n = len(values)
    if n == 0:
        return Estimate(mean=np.nan, low=np.nan, high=np.nan, n=0)
    if n == 1:
        return Estimate(mean=float(values[0]), low=np.nan, high=np.nan, n=1)
    tail = (1 - bootstrap.level) / 2
    low, high = np.quantile(prompt_draws(n, bootstrap) @ values / n, [tail, 1 - tail])
    return Estimate(mean=float(values.mean()), low=float(low), high=float(high), n=n)


@lru_cache(maxsize=4)
def prompt_draws(n: int, bootstrap: Bootstrap) -> Matrix:
    """[resamples, n]: how often each of n prompts is drawn in each resample."""
    random = np.random.default_rng(bootstrap.seed)
    return random.multinomial(n, np.full(n, 1 / n), size=bootstrap.resamples).astype(np.float64)


def ratio_estimate(sums: Vector, counts: Vector, bootstrap: Bootstrap) -> Estimate:
    """Σ sums / Σ counts over n rows that each have a sum and a count, with an interval from resampling the rows.

    How often each distinct (sum, count) is drawn is all that a resample needs, so that n may be large.
    """
    n = len(sums)
    mean = float(sums.sum() / counts.sum())
    if n == 1:
        return Estimate(mean=mean, low=np.nan, high=np.nan, n=1)
    kinds, occurrences = np.unique(np.stack([sums, counts]), axis=1, return_counts=True)
    drawn = np.random.default_rng(bootstrap.seed).multinomial(n, occurrences / n, size=bootstrap.resamples)
    tail = (1 - bootstrap.level) / 2
    low, high = np.quantile((drawn @ kinds[0]) / (drawn @ kinds[1]), [tail, 1 - tail])
    return Estimate(mean=mean, low=float(low), high=float(high), n=n)


def paired_change(per_prompt: Vector, baseline: Vector, bootstrap: Bootstrap) -> Estimate:
    """Mean of ``per_prompt - baseline`` over the prompts that have both; the pairs are resampled whole."""
    return estimate(per_prompt - baseline, bootstrap)
