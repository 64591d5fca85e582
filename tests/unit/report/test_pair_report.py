"""Accuracy, calibration and length buckets of margins, against numbers by hand and a plain bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rayalign.report.pairs import Pairs, reliability_bins, report_pairs, sigmoid
from rayalign.report.statistics import Bootstrap, estimate_mean, ratio_estimate


def pairs(margin: list[float], *, longer: list[float] | None = None, row: list[int] | None = None) -> Pairs:
    count = len(margin)
    return Pairs(
        margin=np.array(margin),
        length_difference=np.array(longer or [0.0] * count),
        row=np.array(row or list(range(count)), dtype=float),
    )


def test_by_hand() -> None:
    ln3 = math.log(3.0)
    found = report_pairs(pairs([ln3, ln3, ln3, -ln3, 0.0, 0.0], longer=[-4, -2, 0, 0, 1, 9]))
    assert (found.pairs, found.rows) == (6, 6)
    assert found.accuracy.mean == pytest.approx((3 + 2 * 0.5) / 6)
    assert found.margin_mean == pytest.approx(2 * ln3 / 6)
    # σ(ln 3) = 3/4: doubts of 1/4 (three times), 3/4, and 1/2 (twice)
    assert found.brier == pytest.approx((3 / 16 + 9 / 16 + 2 / 4) / 6)
    # six bins of one pair: |1 − 3/4| three times, |0 − 3/4| once, |½ − ½| twice
    assert found.calibration_error == pytest.approx((3 * 0.25 + 0.75) / 6)
    assert [(own.confidence, own.accuracy) for own in found.reliability] == [
        (pytest.approx(confidence), correct)
        for confidence, correct in [(0.5, 0.5), (0.5, 0.5), (0.75, 1), (0.75, 1), (0.75, 1), (0.75, 0)]
    ]
    # quartiles of (−4, −2, 0, 0, 1, 9): −1.5, 0, 0.75; the third quarter is empty
    assert [(own.pairs, own.lowest, own.highest) for own in found.by_length] == [(2, -4, -2), (2, 0, 0), (2, 1, 9)]
    assert [own.accuracy.mean for own in found.by_length] == [1.0, 0.5, 0.5]


def test_a_calibrated_model_has_no_calibration_error() -> None:
    """Answers that are preferred with the very probability that the margin says."""
    random = np.random.default_rng(0)
    favoured = random.exponential(1.5, size=200_000)
    margin = np.where(random.random(200_000) < sigmoid(favoured), favoured, -favoured)
    found = report_pairs(pairs(margin.tolist()))
    assert found.calibration_error < 0.005
    assert report_pairs(pairs((3 * margin).tolist())).calibration_error > 0.05
    assert found.brier == pytest.approx(float((sigmoid(favoured) * sigmoid(-favoured)).mean()), abs=2e-3)
    assert {own.pairs for own in found.reliability} == {20_000}


def test_bins_hold_equally_many_pairs_give_or_take_one() -> None:
    assert [own.pairs for own in reliability_bins(np.linspace(-2, 3, 23))] == [3, 3, 3, *[2] * 7]
    edges = [(own.lowest, own.highest) for own in reliability_bins(np.linspace(-2, 3, 23))]
    assert all(low <= high for low, high in edges)
    assert all(before[1] <= after[0] for before, after in zip(edges, edges[1:], strict=False))
    assert [own.pairs for own in reliability_bins(np.array([1.0, 2.0]))] == [1, 1]


def test_pairs_of_one_row_are_resampled_together() -> None:
    """Three pairs of each row that agree are worth one: the interval is that of the rows."""
    random = np.random.default_rng(1)
    margin = random.choice([-1.0, 1.0], size=60, p=[0.3, 0.7])
    alone = report_pairs(pairs(margin.tolist())).accuracy
    rows = np.repeat(np.arange(60), 3).tolist()
    together = report_pairs(pairs(np.repeat(margin, 3).tolist(), row=rows))
    assert together.pairs == 180 and together.rows == 60
    assert (together.accuracy.mean, together.accuracy.low, together.accuracy.high) == pytest.approx(
        (alone.mean, alone.low, alone.high)
    )


def test_the_interval_is_the_plain_bootstraps() -> None:
    random = np.random.default_rng(2)
    values = random.choice([0.0, 0.5, 1.0], size=400)
    bootstrap = Bootstrap(resamples=4000)
    plain, found = estimate_mean(values, bootstrap), ratio_estimate(values, np.ones(400), bootstrap)
    assert (found.mean, found.n) == (pytest.approx(plain.mean), 400)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=4e-3)
    assert np.isnan(ratio_estimate(values[:1], np.ones(1), bootstrap).low)
