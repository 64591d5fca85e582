"""Advantages of group and actor-critic policy gradients. Nothing here carries a gradient.

Group functions compare the K candidates of one prompt. A group whose rewards are all equal says nothing, so its
advantages are exactly 0. In float32 a constant reward of 7.77 has a "standard deviation" of rounding errors, and a
division by it would give advantages near 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rayalign.functional.logprobs import last_token
from rayalign.functional.masked import masked_mean, masked_sum


def rloo_advantage(
    reward: Float[Tensor, "B K"], *, candidate_mask: Bool[Tensor, "B K"] | None = None
) -> Float[Tensor, "B K"]:
    """R_k − mean of the other candidates' rewards (leave-one-out); 0 for a lone candidate.

    Source: Ahmadian et al. 2024, arXiv:2402.14740. Equal to K/(K−1) · (R_k − mean R).
    """
    mask = _or_all(candidate_mask, reward)
    count = mask.sum(dim=1, keepdim=True)
    return _centered(reward, mask) * count / (count - 1).clamp(min=1)


def grpo_advantage(
    reward: Float[Tensor, "B K"],
    *,
    divide_by_std: bool = True,
    epsilon: float = 1e-6,
    candidate_mask: Bool[Tensor, "B K"] | None = None,
) -> Float[Tensor, "B K"]:
    """(R_k − mean R) / (std R + epsilon) with the unbiased standard deviation of the group.

    ``divide_by_std=False`` is Dr. GRPO. Sources: Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025, arXiv:2503.20783.
    """
    mask = _or_all(candidate_mask, reward)
    centered = _centered(reward, mask)
    if not divide_by_std:
        return centered
    degrees = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return centered / ((centered.square().sum(dim=1, keepdim=True) / degrees).sqrt() + epsilon)


def kl_shaped_reward(
    score: Float[Tensor, " C"],
    behavior_token_logp: Float[Tensor, " N"],
    ref_token_logp: Float[Tensor, " N"],
    candidate_of: Int[Tensor, " N"],
    *,
    kl_coef: float,
) -> Float[Tensor, " N"]:
    """−kl_coef · (log μ − log π_ref) at every token, plus the candidate's score at its last token.

    ``candidate_of`` ascends through 0 … C−1; the last token is the end token where there is one.
    """
    shaped = -kl_coef * (behavior_token_logp - ref_token_logp)
    last = last_token(candidate_of)
    return shaped.index_add(0, last, score[candidate_of[last]])


def gae(
    reward: Float[Tensor, " N"],
    value: Float[Tensor, " N"],
    candidate_of: Int[Tensor, " N"],
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> Float[Tensor, " N"]:
    """A_t = δ_t + γ λ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t, inside each candidate; V after the last token is 0.

    ``candidate_of`` ascends. The returns are ``gae(...) + value``. Source: Schulman et al. 2016, arXiv:1506.02438.
    """
    if len(reward) == 0:
        return reward
    _, row, length = torch.unique_consecutive(candidate_of, return_inverse=True, return_counts=True)
    position = torch.arange(len(row), device=row.device) - (length.cumsum(0) - length)[row]
    shape = (len(length), int(length.max()) + 1)  # one column more: the zero after the last token
    rewards = reward.new_zeros(shape).index_put((row, position), reward)
    values = reward.new_zeros(shape).index_put((row, position), value)
    advantage = torch.zeros_like(rewards)
    for t in reversed(range(shape[1] - 1)):
        delta = rewards[:, t] + gamma * values[:, t + 1] - values[:, t]
        advantage[:, t] = delta + gamma * gae_lambda * advantage[:, t + 1]
    return advantage[row, position]


def whiten(
    values: Float[Tensor, " N"],
    *,
    variance: Literal["unbiased", "population"] = "unbiased",
    mask: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """Shift and scale to mean 0 and variance 1 over all tokens of the round; 0 where masked, or where all are equal.

    ``unbiased`` divides by sqrt(s²_{n−1} + 1e-8), ``population`` by sqrt(max(s²_n, 1e-8)): the two forms in use.
    """
    mask = _or_all(mask, values)
    if not mask.any() or values[mask].min() == values[mask].max():
        return torch.zeros_like(values)
    centered = torch.where(mask, values - masked_mean(values, mask), 0)
    squares, count = masked_sum(centered.square(), mask), mask.sum()
    if variance == "unbiased":
        return centered / (squares / (count - 1).clamp(min=1) + 1e-8).sqrt()
    return centered / (squares / count.clamp(min=1)).clamp(min=1e-8).sqrt()


def _or_all(mask: Tensor | None, values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool) if mask is None else mask


def _centered(reward: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """R − mean R; exactly 0 where masked and in groups without spread."""
    highest = torch.where(mask, reward, -torch.inf).amax(dim=1, keepdim=True)
    lowest = torch.where(mask, reward, torch.inf).amin(dim=1, keepdim=True)
    mean = masked_mean(reward, mask, dim=1)[:, None]
    # "not equal" rather than "greater": a reward that is missing (NaN) must show, not turn into 0.
    return torch.where(mask & (highest != lowest), reward - mean, 0)
