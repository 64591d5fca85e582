"""GRPO's token loss: PPO's clipped ratio plus the k3 estimate of the KL as a loss.

Shao et al. 2024, arXiv:2402.03300. How tokens are averaged is the caller's choice and makes different methods: the mean
over sequences of token means is GRPO, the mean over tokens is DAPO, a constant length is Dr. GRPO.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rayalign.functional.kl import k3
from rayalign.methods.ppo import ppo_policy_loss


def grpo_loss(
    token_logp: Float[Tensor, " N"],
    behavior_token_logp: Float[Tensor, " N"],
    ref_token_logp: Float[Tensor, " N"],
    advantage: Float[Tensor, " N"],
    *,
    clip: float = 0.2,
    kl_coef: float = 0.04,
    dual_clip: float | None = None,
) -> Float[Tensor, " N"]:
    """max(−A ρ, −A clip(ρ, 1−clip, 1+clip)) + kl_coef · k3, with ρ = π/μ; each token has its candidate's advantage."""
    policy = ppo_policy_loss(token_logp, behavior_token_logp, advantage, clip=clip, dual_clip=dual_clip)
    return policy + kl_coef * k3(token_logp, ref_token_logp)
