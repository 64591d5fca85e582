"""Advantages against definitions written as loops, and at the edges: masks, lone candidates, constant rewards."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.functional.advantages import gae, grpo_advantage, kl_shaped_reward, rloo_advantage, whiten

REWARDS = torch.tensor([[1.0, -0.5, math.nan, 2.0], [0.25, math.nan, math.nan, math.nan]], dtype=torch.float64)
MASK = ~REWARDS.isnan()


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    advantage = rloo_advantage(REWARDS, candidate_mask=MASK)
    expected = [1 - (-0.5 + 2) / 2, -0.5 - (1 + 2) / 2, 0, 2 - (1 - 0.5) / 2]
    torch.testing.assert_close(advantage[0], torch.tensor(expected, dtype=torch.float64))
    assert advantage[1].tolist() == [0, 0, 0, 0]


def test_grpo_divides_by_the_unbiased_standard_deviation_of_the_real_candidates() -> None:
    real = [1.0, -0.5, 2.0]
    mean, deviation = statistics.mean(real), statistics.stdev(real)
    expected = [(value - mean) / (deviation + 1e-4) for value in (1.0, -0.5)]
    advantage = grpo_advantage(REWARDS, epsilon=1e-4, candidate_mask=MASK)
    torch.testing.assert_close(advantage[0, :2], torch.tensor(expected, dtype=torch.float64))
    assert advantage[0, 2] == 0
    assert advantage[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("reward", [7.77, 0.1, -1e4, 3.3333333])
@pytest.mark.parametrize("epsilon", [1e-9, 1e-6, 1e-4])
def test_a_constant_reward_gives_exactly_zero_in_float32(reward: float, epsilon: float) -> None:
    constant = torch.full((1, 7), reward, dtype=torch.float32)
    assert grpo_advantage(constant, epsilon=epsilon).tolist() == [[0] * 7]
    assert grpo_advantage(constant, divide_by_std=False).tolist() == [[0] * 7]
    assert rloo_advantage(constant).tolist() == [[0] * 7]


def test_a_missing_reward_of_a_real_candidate_shows() -> None:
    assert rloo_advantage(torch.tensor([[1.0, math.nan]])).isnan().all()
    assert grpo_advantage(torch.tensor([[1.0, math.nan]])).isnan().all()


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_gae_equals_the_discounted_sum_of_errors(
    lengths: list[int], gamma: float, gae_lambda: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    candidate_of = torch.repeat_interleave(2 * torch.arange(len(lengths)), torch.tensor(lengths))  # gaps are fine
    reward, value = torch.randn(2, len(candidate_of), generator=generator, dtype=torch.float64)
    expected = []
    for r, v in zip(reward.split(lengths), value.split(lengths), strict=True):
        following = [*v[1:].tolist(), 0.0]
        error = [float(r[t]) + gamma * following[t] - float(v[t]) for t in range(len(r))]
        expected += [sum((gamma * gae_lambda) ** (u - t) * error[u] for u in range(t, len(r))) for t in range(len(r))]
    actual = gae(reward, value, candidate_of, gamma=gamma, gae_lambda=gae_lambda)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_gae_with_lambda_one_is_return_minus_value() -> None:
    reward, value = torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.tensor([0.3, 0.1, 0.7, 0.5])
    advantage = gae(reward, value, torch.tensor([0, 0, 0, 1]), gae_lambda=1.0)
    torch.testing.assert_close(advantage + value, torch.tensor([1.0, 1.0, 1.0, 2.0]))


def test_gae_of_nothing_is_nothing() -> None:
    assert gae(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []


def test_score_stands_on_the_last_token_of_every_row_long_or_short() -> None:
    """Not one position after it, which a buffer longer than the row would allow."""
    zero = torch.zeros(5)
    shaped = kl_shaped_reward(torch.tensor([1.0, -0.5]), zero, zero, torch.tensor([0, 0, 0, 1, 1]), kl_coef=0.05)
    assert shaped.tolist() == [0, 0, 1, 0, -0.5]


@pytest.mark.parametrize(("variance", "unbiased"), [("unbiased", 1), ("population", 0)])
def test_whitened_values_have_mean_zero_and_variance_one(variance: str, unbiased: int) -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 5
    mask = torch.arange(50) % 3 > 0
    values[~mask] = math.nan
    white = whiten(values, variance=variance, mask=mask)
    assert white[~mask].eq(0).all()
    assert white[mask].mean().abs() < 1e-12
    assert white[mask].var(correction=unbiased).item() == pytest.approx(1.0, rel=1e-8)
