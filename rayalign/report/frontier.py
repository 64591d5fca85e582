"""Reward against KL: which points no other point dominates, and what a cell scores at a given KL.

Both are statements about point estimates. With intervals that overlap, membership of the front is not a finding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


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
    return [
        not math.isnan(point.kl + point.score) and not any(_dominates(other, point) for other in points)
        for point in points
    ]


def _dominates(a: FrontierPoint, b: FrontierPoint) -> bool:
    return a.kl <= b.kl and a.score >= b.score and (a.kl < b.kl or a.score > b.score)


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
