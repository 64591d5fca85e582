"""The clipped ratio of PPO, per item, which every policy gradient here bounds its steps with.

Schulman et al. 2017, arXiv:1707.06347, Eq. 7. Advantages and the behavior policy's log-probabilities are constants:
detach them, or take them from stored columns.
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
    clip: float | None = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    importance_cap: float | None = None,
) -> Float[Tensor, " N"]:
    """max(−A ρ, −A clip(ρ, 1−clip, 1+clip_high)) with ρ = π/μ; where A < 0, at most −A · ``dual_clip`` if given.

    ``clip_high`` is ``clip`` unless given (DAPO, Yu et al. 2025, arXiv:2503.14476); ``clip=None`` is −A ρ. Dual
    clipping (Ye et al. 2020, arXiv:1912.09729) is off unless asked for. ``importance_cap`` C truncates ρ as a weight:
    value and gradient are those of −A min(ρ, C) with ∇ log π kept, where dual clipping drops it. On one entry per
    sequence, with summed log-probabilities, this is the sequence-level clipped loss of RLOO.
    """
    ratio = importance_ratio(token_logp, behavior_token_logp)
    weighted = ratio if importance_cap is None else ratio * (importance_cap / ratio.detach()).clamp(max=1)
    per_token = -advantage * weighted
    if clip is not None:
        clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
        per_token = torch.maximum(per_token, -advantage * clipped)
    if dual_clip is None:
        return per_token
    return torch.where(advantage < 0, torch.minimum(per_token, -advantage * dual_clip), per_token)


def importance_ratio(logp: Float[Tensor, " items"], behavior_logp: Float[Tensor, " items"]) -> Float[Tensor, " items"]:
    """ρ = π/μ, with |log ρ| bounded by :data:`MAX_LOG_RATIO`."""
    return (logp - behavior_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
