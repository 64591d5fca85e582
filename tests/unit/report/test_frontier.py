"""The front and the scores at equal KL, on points small enough to see."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rayalign.report.frontier import (
    Crossing,
    FrontierPoint,
    pareto,
    pareto_frequency,
    score_at_kl,
    seed_crossings,
)


def path(*points: tuple[float, float]) -> list[FrontierPoint]:
    return [FrontierPoint(step=10 * index, kl=kl, score=score) for index, (kl, score) in enumerate(points)]


def test_front_by_hand() -> None:
    points = path((0, 0.5), (1, 0.7), (2, 0.7), (2, 0.8), (3, 0.75), (9, 0.9), (-0.1, 0.4))
    assert pareto(points) == [True, True, False, True, False, True, True]


def test_equal_points_are_both_on_the_front() -> None:
    assert pareto(path((1, 0.7), (1, 0.7), (1, 0.6))) == [True, True, False]


def test_a_missing_value_is_not_on_the_front_and_dominates_nothing() -> None:
    assert pareto(path((math.nan, 0.9), (1, 0.5), (0, math.nan))) == [False, True, False]


def test_how_often_a_point_is_on_the_front_by_hand() -> None:
    """Four resamples of three points. First: 1 dominates 2. Second: all tie, so all are on it. Third: 0 dominates
    both. Fourth: 0 has no KL, and 1 does not reach 2's score at a smaller KL."""
    nan = math.nan
    kl = np.array([[0.0, 1.0, 0.0, nan], [1.0, 1.0, 1.0, 2.0], [2.0, 1.0, 2.0, 3.0]])
    score = np.array([[0.5, 0.5, 0.9, 0.9], [0.7, 0.5, 0.8, 0.6], [0.6, 0.5, 0.7, 0.8]])
    assert pareto_frequency(kl, score) == [0.75, 0.75, 0.5]


def test_the_frequency_of_one_resample_is_membership() -> None:
    points = path((0, 0.5), (1, 0.7), (2, 0.7), (2, 0.8), (3, 0.75), (9, 0.9), (-0.1, 0.4), (math.nan, 1.0))
    kl, score = np.array([[point.kl] for point in points]), np.array([[point.score] for point in points])
    assert pareto_frequency(kl, score) == [float(member) for member in pareto(points)]


def test_seeds_that_do_not_reach_a_level_are_counted_by_hand() -> None:
    """Three seeds at KL 2: one crosses at 0.6, one at 0.8 (its first crossing, not the later), one never."""
    crossings = [
        score_at_kl(path((0, 0.5), (4, 0.7)), 2.0),
        score_at_kl(path((0, 0.6), (3, 0.9), (1, 0.1)), 2.0),
        score_at_kl(path((0, 0.5), (1.9, 0.9)), 2.0),
    ]
    found = seed_crossings(crossings)
    assert (found.reached, found.seeds) == (2, 3)
    assert (found.score, found.low, found.high) == pytest.approx((0.7, 0.6, 0.8))
    none = seed_crossings([None, None])
    assert (none.reached, none.seeds) == (0, 2) and math.isnan(none.score)


def test_interpolation_by_hand() -> None:
    found = score_at_kl(path((0, 0.5), (2, 0.7), (6, 0.8)), 3.0)
    assert found == Crossing(score=pytest.approx(0.725), from_step=10, to_step=20)


def test_a_level_at_a_checkpoint_is_that_checkpoint() -> None:
    found = score_at_kl(path((0, 0.5), (2, 0.7), (6, 0.8)), 2.0)
    assert found is not None and found.score == pytest.approx(0.7)


def test_nothing_is_extrapolated() -> None:
    assert score_at_kl(path((0, 0.5), (2, 0.7)), 2.1) is None
    assert score_at_kl(path((0.3, 0.5), (2, 0.7)), 0.1) is None
    assert score_at_kl(path((math.nan, 0.5), (2, 0.7)), 1.0) is None


def test_a_path_that_turns_back_counts_at_its_first_crossing() -> None:
    found = score_at_kl(path((0, 0.5), (4, 0.9), (1, 0.2)), 2.0)
    assert found == Crossing(score=pytest.approx(0.7), from_step=0, to_step=10)


def test_two_checkpoints_at_the_level_give_the_earlier() -> None:
    found = score_at_kl(path((1, 0.5), (1, 0.9)), 1.0)
    assert found is not None and found.score == 0.5
