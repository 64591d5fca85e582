"""Means with intervals. The unit is the prompt: samples are averaged inside a prompt, then prompts are resampled.

A rate, whose values lie in [0, 1], has an interval of its own (:func:`rate_interval`). It lies in [0, 1] too, and has a
width where all prompts agree.

An interval from here answers "what if other prompts of the same kind had been asked?" It says nothing about another
training seed: a cell is one run, and runs vary more than prompts do. Several seeds: :mod:`rayalign.report.replication`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

INTERVAL_HEAD = "interval over prompts, one training run"
SEEDS_HEAD = "interval over training seeds and prompts"

MANY = 1e5
"""Degrees of freedom beyond which Student's t is the normal."""

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


def estimate_mean(per_prompt: Vector, bootstrap: Bootstrap) -> Estimate:
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


def rate_interval(mean: float, variance: float, *, n: float, df: float, level: float) -> tuple[float, float]:
    """Wilson's (1927) score interval of a rate in [0, 1] whose mean has ``variance``, with Student's t for the normal.

    The rate is taken as that of mean · (1 − mean) / variance independent trials, which is their effective number (Dean
    and Pagano 2015); of ``n`` where the mean is 0 or 1, so that every prompt's agreement is no certainty.
    """
    t = quantile((1 + level) / 2, min(df, MANY))
    spread = max(0.0, mean * (1 - mean))
    if spread > 0 and variance <= 0:
        return mean, mean
    trials = spread / variance if spread > 0 else n
    middle = (mean + t**2 / (2 * trials)) / (1 + t**2 / trials)
    half = t / (1 + t**2 / trials) * float(np.sqrt(spread / trials + t**2 / (4 * trials**2)))
    return max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half))  # rounding at the ends


def is_rate(values: Matrix | Vector) -> bool:
    """Whether all values that are not missing lie in [0, 1]."""
    present = values[~np.isnan(values)]
    return bool(((present >= 0) & (present <= 1)).all())


def rate_estimate(per_prompt: Vector, bootstrap: Bootstrap) -> Estimate:
    """Mean over the prompts that have a value, and :func:`rate_interval`, which needs no resampling."""
    values = per_prompt[~np.isnan(per_prompt)]
    return ratio_estimate(values, np.ones(len(values)), bootstrap)


def ratio_estimate(sums: Vector, counts: Vector, bootstrap: Bootstrap) -> Estimate:
    """Σ sums / Σ counts over n rows that each have a count and a sum of rates, with :func:`rate_interval`.

    Rows are what is independent: the pairs of one ranking stand or fall together.
    """
    n = len(sums)
    if n == 0:
        return Estimate(mean=np.nan, low=np.nan, high=np.nan, n=0)
    mean = float(sums.sum() / counts.sum())
    if n == 1:
        return Estimate(mean=mean, low=np.nan, high=np.nan, n=1)
    variance = float(np.square((sums - mean * counts) / counts.mean()).sum()) / (n - 1) / n
    low, high = rate_interval(mean, variance, n=n, df=n - 1, level=bootstrap.level)
    return Estimate(mean=mean, low=low, high=high, n=n)


def win_shares(policy: Matrix, reference: Matrix) -> Vector:
    """Scores [P, S] and [P, S'] of the same prompts to [P]: the share of the S x S' pairings that the policy wins.

    A tie counts one half. A pairing without both scores does not count; a prompt without pairings is NaN.
    """
    difference = policy[:, :, None] - reference[:, None, :]
    pairings = (~np.isnan(difference)).sum(axis=(1, 2))
    wins = (difference > 0).sum(axis=(1, 2)) + 0.5 * (difference == 0).sum(axis=(1, 2))
    return np.where(pairings > 0, wins / np.maximum(pairings, 1), np.nan)


Half = Literal["select", "report"]


def half_of(prompt: str) -> Half:
    """By the prompt's text alone, so that a prompt is in the same half of every file, run and version."""
    return "select" if hashlib.sha256(prompt.encode()).digest()[0] % 2 == 0 else "report"


def in_half(prompts: Sequence[str], half: Half) -> NDArray[np.bool_]:
    """[P] True where the prompt is in ``half``."""
    return np.array([half_of(prompt) == half for prompt in prompts], dtype=np.bool_)


NODES, WEIGHTS = np.polynomial.legendre.leggauss(128)


def two_sided_p(t: float, df: float) -> float:
    """P(|T| ≥ |t|): with T = √df · cot u the density is proportional to sin^{df−1} u, integrated from 0 to acot."""
    end = math.atan2(math.sqrt(df), abs(t))
    integral = end / 2 * float(WEIGHTS @ np.sin(end / 2 * (NODES + 1)) ** (df - 1))
    log_whole = math.log(math.pi) / 2 + math.lgamma(df / 2) - math.lgamma((df + 1) / 2) - math.log(2)
    return min(1.0, integral / math.exp(log_whole))


def quantile(probability: float, df: float) -> float:
    """The t that T is below with ``probability`` in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while two_sided_p(high, df) > 2 * (1 - probability):
        low, high = high, 2 * high
    for _ in range(48):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, df) > 2 * (1 - probability) else (low, middle)
    return high
