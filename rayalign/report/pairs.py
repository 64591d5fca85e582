"""How well a reward model orders pairs that it has not seen: accuracy, calibration, and where length decides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayalign.report.statistics import Bootstrap, Estimate, Vector, ratio_estimate

BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """P pairs of answers to the same prompt."""

    margin: Vector
    """[P] score of the preferred answer − score of the other."""
    length_difference: Vector
    """[P] tokens of the preferred answer − tokens of the other, end tokens included."""
    row: Vector
    """[P] which row of the data a pair is of: pairs of one ranking are resampled together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Pairs of about equal confidence: σ(|margin|), the model's probability that the answer it favours is preferred."""

    pairs: int
    lowest: float
    highest: float
    confidence: float
    """Mean over the bin."""
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBucket:
    """A quarter of the pairs, by how much longer the preferred answer is."""

    pairs: int
    lowest: float
    highest: float
    """Tokens."""
    accuracy: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    pairs: int
    rows: int
    accuracy: Estimate
    """Share of pairs in which the preferred answer scores higher; a tie is half a pair."""
    margin_mean: float
    margin_deviation: float
    brier: float
    """Mean of (1 − σ(margin))²: 0 is certain and right, 0.25 is a coin."""
    calibration_error: float
    """Σ over bins of share · |accuracy − mean confidence| (ECE), over equally many pairs a bin."""
    reliability: tuple[Bin, ...]
    by_length: tuple[LengthBucket, ...]


def report_pairs(pairs: Pairs, bootstrap: Bootstrap | None = None) -> PairReport:
    """Everything about one model on P ≥ 1 pairs; intervals over rows of data."""
    bootstrap = bootstrap or Bootstrap()
    reliability = reliability_bins(pairs.margin)
    total = len(pairs.margin)
    return PairReport(
        pairs=total,
        rows=len(np.unique(pairs.row)),
        accuracy=accuracy(pairs, np.ones(total, np.bool_), bootstrap),
        margin_mean=float(pairs.margin.mean()),
        margin_deviation=float(pairs.margin.std()),
        brier=float(np.square(sigmoid(-pairs.margin)).mean()),
        calibration_error=sum(own.pairs / total * abs(own.accuracy - own.confidence) for own in reliability),
        reliability=reliability,
        by_length=by_length(pairs, bootstrap),
    )


def correctness(margin: Vector) -> Vector:
    """1 where the preferred answer scores higher, ½ for a tie, else 0."""
    found: Vector = np.where(margin == 0, 0.5, (margin > 0).astype(np.float64))
    return found


def accuracy(pairs: Pairs, among: np.ndarray[tuple[int], np.dtype[np.bool_]], bootstrap: Bootstrap) -> Estimate:
    _, row = np.unique(pairs.row[among], return_inverse=True)
    correct: Vector = np.bincount(row, correctness(pairs.margin[among])).astype(np.float64)
    return ratio_estimate(correct, np.bincount(row).astype(np.float64), bootstrap)


def reliability_bins(margin: Vector, count: int = BINS) -> tuple[Bin, ...]:
    """``count`` bins of equally many pairs, give or take one, by confidence; fewer where there are fewer pairs."""
    confidence, correct = sigmoid(np.abs(margin)), correctness(margin)
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(count, len(margin)))
    return tuple(
        Bin(
            pairs=len(part),
            lowest=float(confidence[part[0]]),
            highest=float(confidence[part[-1]]),
            confidence=float(confidence[part].mean()),
            accuracy=float(correct[part].mean()),
        )
        for part in parts
    )


def by_length(pairs: Pairs, bootstrap: Bootstrap) -> tuple[LengthBucket, ...]:
    """The quarters between the quartiles of the length difference; equal differences share one, so some may be none."""
    difference = pairs.length_difference
    quarter = np.searchsorted(np.quantile(difference, [0.25, 0.5, 0.75]), difference, side="left")
    found = [quarter == number for number in range(4)]
    return tuple(
        LengthBucket(
            pairs=int(among.sum()),
            lowest=float(difference[among].min()),
            highest=float(difference[among].max()),
            accuracy=accuracy(pairs, among, bootstrap),
        )
        for among in found
        if among.any()
    )


def sigmoid(values: Vector) -> Vector:
    """1 / (1 + e^−x), without overflow for large |x|."""
    found: Vector = 0.5 * (1.0 + np.tanh(0.5 * values))
    return found
