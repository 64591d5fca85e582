"""One policy's point as numbers per prompt: what every mean and interval of the report is over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rayalign.report.length_control import lc_win_rate, pairings
from rayalign.report.points import EvaluationPoint, as_array
from rayalign.report.statistics import Matrix, Vector, prompt_means, win_shares

KINDS = (
    *("scores", "changes", "win_rates", "lc_win_rates", "judged", "lc_judged"),
    *("kl", "kl_per_token", "diagnostics", "length", "cut"),
)
"""Fields of a :class:`~rayalign.report.summary.PointSummary` that are estimates."""
RATES = frozenset({"win_rates", "lc_win_rates", "judged", "lc_judged", "cut"})
"""Kinds whose mean is a rate in [0, 1]; of the length-controlled ones the values are pseudo-values, and need not be."""
Key = tuple[str, str]
"""(one of :data:`KINDS`, the measure's name or '')."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """One run at one step on one prompt set."""

    cell: str
    step: int
    num_samples: int
    values: dict[Key, Vector]
    """[P] each; NaN is missing."""


def columns(cell: str, point: EvaluationPoint, *, reference: EvaluationPoint, baseline: EvaluationPoint) -> Columns:
    """Changes are against ``reference``, wins against ``baseline``."""
    return Columns(
        cell=cell,
        step=point.step,
        num_samples=len(point.length[0]),
        values=dict(_values(point, reference, baseline)),
    )


def _values(
    point: EvaluationPoint, reference: EvaluationPoint, baseline: EvaluationPoint
) -> Iterator[tuple[Key, Vector]]:
    length, opponent_length = as_array(point.length), as_array(baseline.length)
    for name, samples in point.scores.items():
        scores, theirs = as_array(samples), as_array(baseline.scores[name])
        yield ("scores", name), prompt_means(scores)
        yield ("changes", name), prompt_means(scores) - prompt_means(as_array(reference.scores[name]))
        yield ("win_rates", name), win_shares(scores, theirs)
        yield ("lc_win_rates", name), lc_win_rate(*pairings(scores, theirs, length, opponent_length))
    if point.verdicts is not None:
        verdicts = as_array(point.verdicts)
        yield ("judged", ""), prompt_means(verdicts)
        yield ("lc_judged", ""), lc_win_rate(verdicts, length - opponent_length)
    for name, samples in point.kl.items():
        kl = as_array(samples)
        yield ("kl", name), prompt_means(kl)
        yield ("kl_per_token", name), per_token(kl, length)
    for name, samples in point.diagnostics.items():
        yield ("diagnostics", name), prompt_means(as_array(samples))
    yield ("length", ""), prompt_means(length)
    yield ("cut", ""), 1 - prompt_means(as_array(point.finished))


def per_token(sums: Matrix, length: Matrix) -> Vector:
    """[P, S] sums over replies → [P] pseudo-values of Σ sums / Σ tokens: their mean is the ratio.

    Resampling them is, to first order, resampling the prompts and dividing again.
    """
    total, tokens = prompt_means(sums), prompt_means(np.where(np.isnan(sums), np.nan, length))
    present = ~np.isnan(total) & (tokens > 0)
    if not present.any():
        return np.full(len(total), np.nan)
    mean_tokens = tokens[present].mean()
    ratio = total[present].mean() / mean_tokens
    found: Vector = ratio + (total - ratio * tokens) / mean_tokens
    return np.where(present, found, np.nan)
