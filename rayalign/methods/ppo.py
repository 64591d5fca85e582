"""PPO's clipped policy loss and value loss, per token.

Schulman et al. 2017, arXiv:1707.06347. Advantages, returns, and the behavior policy's log-probabilities and values are
constants: detach them, or take them from stored columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound on |log(π/μ)| before exponentiation; without it one badly matched token overflows and 0 · ∞ is NaN."""


def ppo_policy_loss(
    token_logp: Float[Tensor, " N"],
    behavior_token_logp: Float[Tensor, " N"],
    advantage: Float[Tensor, " N"],
    *,
    clip: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Tensor, " N"]:
    """max(−A ρ, −A clip(ρ, 1−clip, 1+clip)) with ρ = π/μ; where A < 0, at most −A · ``dual_clip`` if that is given.

    Dual clipping (Ye et al. 2020, arXiv:1912.09729) is off unless asked for. On one entry per sequence, with summed
    log-probabilities, this is the sequence-level clipped loss of RLOO.
    """
    ratio = (token_logp - behavior_token_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    per_token = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    if dual_clip is None:
        return per_token
    return torch.where(advantage < 0, torch.minimum(per_token, -advantage * dual_clip), per_token)


def ppo_value_loss(
    value: Float[Tensor, " N"],
    old_value: Float[Tensor, " N"],
    returns: Float[Tensor, " N"],
    *,
    clip: float | None = 0.2,
) -> Float[Tensor, " N"]:
    """½ max((V − R)², (clip(V, V_old ± clip) − R)²); ``clip=None`` is ½ (V − R)²."""
    squared = (value - returns).square()
    if clip is not None:
        near_old = value.clamp(old_value - clip, old_value + clip)
        squared = torch.maximum(squared, (near_old - returns).square())
    return squared / 2
