"""The length-controlled win rate, where the model behind the preferences is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rayalign.report.length_control import lc_win_rate, pairings
from rayalign.report.statistics import win_shares


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def test_the_model_that_made_soft_preferences_is_found_again() -> None:
    """A worse policy (θ = −0.4) that writes longer replies, which the judge likes: it wins most, and should not."""
    random = np.random.default_rng(0)
    difference = random.normal(30, 20, (4000, 2))
    preference = sigmoid(-0.4 + 1.5 * np.tanh(difference / difference.std()))
    assert preference.mean() > 0.6
    assert lc_win_rate(preference, difference).mean() == pytest.approx(1 / (1 + math.exp(0.4)), abs=1e-4)


def test_without_a_difference_in_length_it_is_the_win_rate() -> None:
    random = np.random.default_rng(1)
    policy, opponent = random.integers(0, 4, (200, 2)).astype(float), random.integers(0, 5, (200, 3)).astype(float)
    preference, difference = pairings(policy, opponent, np.full((200, 2), 9.0), np.full((200, 3), 9.0))
    assert preference.shape == (200, 6)
    assert lc_win_rate(preference, difference).mean() == pytest.approx(win_shares(policy, opponent).mean(), abs=1e-4)


def test_every_prompt_has_equal_weight_and_a_missing_pairing_none() -> None:
    nan = math.nan
    preference = np.array([[1.0, nan, nan], [0.0, 0.0, 0.0], [nan, nan, nan], [1.0, 0.0, nan]])
    found = lc_win_rate(preference, np.zeros((4, 3)))
    assert np.isnan(found).tolist() == [False, False, True, False]
    assert np.nanmean(found) == pytest.approx(0.5)
    assert np.isnan(lc_win_rate(np.full((2, 1), nan), np.zeros((2, 1)))).all()


def test_winning_everything_has_a_finite_answer() -> None:
    found = lc_win_rate(np.ones((50, 1)), np.random.default_rng(0).normal(size=(50, 1)))
    assert 0.99 < found.mean() <= 1


def test_the_spread_of_pseudo_values_is_that_of_fitting_again() -> None:
    """The standard error by the infinitesimal jackknife against that of 300 resamples, each fitted anew."""
    random = np.random.default_rng(2)
    difference = random.normal(10, 20, (150, 1))
    wins = (random.random((150, 1)) < sigmoid(0.3 + np.tanh(difference / 20))).astype(float)
    values = lc_win_rate(wins, difference)
    again = []
    for _ in range(300):
        drawn = random.integers(150, size=150)
        again.append(lc_win_rate(wins[drawn], difference[drawn]).mean())
    assert values.std() / math.sqrt(150) == pytest.approx(np.std(again), rel=0.15)
