"""Reward against KL: which points no other point dominates, and what a cell scores at a given KL.

Both are statements about point estimates; how often a point is on the front when seeds and prompts are resampled says
what membership is worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np

from rayalign.report.statistics import Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """A policy at one step: mean KL to the reference (nats per reply) and mean score."""

    step: int
    kl: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """Where a path of checkpoints crosses a KL level: ``score`` lies on the line between two of its steps."""

    score: float
    from_step: int
    to_step: int


def pareto(points: Sequence[FrontierPoint]) -> list[bool]:
    """For every point, whether no other has at most its KL and at least its score, and differs in one of the two.

    A point with a missing value is not on the front and dominates nothing.
    """
    return [_is_on_front(point, points) for point in points]


def _is_on_front(point: FrontierPoint, points: Sequence[FrontierPoint]) -> bool:
    return not math.isnan(point.kl + point.score) and not any(_dominates(other, point) for other in points)


def _dominates(a: FrontierPoint, b: FrontierPoint) -> bool:
    return a.kl <= b.kl and a.score >= b.score and (a.kl < b.kl or a.score > b.score)


def pareto_frequency(kl: Matrix, score: Matrix) -> list[float]:
    """[points, resamples] each → for every point, the share of the resamples in which :func:`pareto` has it."""
    present = ~np.isnan(kl + score)
    shares = []
    for own_kl, own_score, there in zip(kl, score, present, strict=True):
        no_worse = present & (kl <= own_kl) & (score >= own_score)
        dominated = (no_worse & ((kl < own_kl) | (score > own_score))).any(axis=0)
        shares.append(float((there & ~dominated).mean()))
    return shares


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedCrossings:
    """What the seeds of one entry score at a KL level; seeds that do not reach it are counted, not dropped."""

    reached: int
    seeds: int
    score: float
    """Mean over the seeds that reach the level; NaN where none does."""
    low: float
    high: float
    """The lowest and the highest of them: a range, no interval."""


def seed_crossings(crossings: Sequence[Crossing | None]) -> SeedCrossings:
    """``crossings``: one per seed, ``None`` for a seed that does not reach the level or was not measured."""
    scores = [crossing.score for crossing in crossings if crossing is not None]
    return SeedCrossings(
        reached=len(scores),
        seeds=len(crossings),
        score=fmean(scores) if scores else math.nan,
        low=min(scores, default=math.nan),
        high=max(scores, default=math.nan),
    )


def score_at_kl(path: Sequence[FrontierPoint], level: float) -> Crossing | None:
    """Linear interpolation along the path, in the order of training, at its first crossing of ``level``.

    ``None`` where no two consecutive points bracket the level: the path does not reach it, and nothing is extrapolated.
    """
    for before, after in pairwise(path):
        if min(before.kl, after.kl) <= level <= max(before.kl, after.kl):
            span = after.kl - before.kl
            weight = (level - before.kl) / span if span else 0.0
            score = before.score + weight * (after.score - before.score)
            return Crossing(score=score, from_step=before.step, to_step=after.step)
    return None
