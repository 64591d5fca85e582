"""Win rates by hand, ties as halves."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayalign.report.statistics import win_shares


def test_by_hand() -> None:
    policy = np.array([[1.0, 2.0], [0.0, math.nan], [0.0, 1.0], [math.nan, math.nan]])
    reference = np.array([[1.0, 0.0], [0.0, 0.0], [2.0, 3.0], [1.0, 1.0]])
    # prompt 0: 1=1 (½), 1>0, 2>1, 2>0 -> 3.5 of 4; prompt 1: two ties of two pairings; prompt 2: none of four
    np.testing.assert_array_equal(win_shares(policy, reference), [0.875, 0.5, 0.0, math.nan])


def test_numbers_of_samples_may_differ() -> None:
    np.testing.assert_allclose(win_shares(np.array([[2.0]]), np.array([[1.0, 2.0, 3.0]])), [1.5 / 3])


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=5), st.integers(0, 100))
def test_both_sides_share_one(rows: list[list[int]], seed: int) -> None:
    policy = np.array(rows, dtype=float)
    reference = np.random.default_rng(seed).integers(0, 4, policy.shape).astype(float)
    np.testing.assert_allclose(win_shares(policy, reference) + win_shares(reference, policy), 1.0)
    np.testing.assert_array_equal(win_shares(policy, policy), 0.5)
