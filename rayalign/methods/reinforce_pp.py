"""REINFORCE++: token rewards with the KL inside, summed to the end, whitened over the whole round; no critic, any K.

Hu 2025, arXiv:2501.03262. With r_t = 1[t = last] R − kl_coef · (log μ_t − log π_ref,t)

    A_t = Σ_{i≥t} γ^{i−t} r_i, shifted and scaled to mean 0 and variance 1 over all response tokens of the round
    L = mean over tokens of max(−A_t ρ_t, −A_t clip(ρ_t)),     ρ_t = π/μ

A token pays for the KL that follows it, not for what came before. The baseline is the round's mean, so one sample per
prompt is enough; the clip is PPO's, the KL coefficient OpenRLHF's.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rayalign.functional.advantages import gae, whiten
from rayalign.methods._fields import NonNegative
from rayalign.methods._pairs import MetricSums
from rayalign.methods._ratio import (
    RatioConfig,
    policy_metrics,
    policy_tokens,
    ratio_loss,
    real_tokens,
    reference_needs,
    scored_candidates,
    shaped_reward,
)
from rayalign.methods.method import Method, Statistics, Term
from rayalign.types import Round, Scored


class ReinforcePPConfig(RatioConfig):
    kl_coef: NonNegative = 0.01
    """Times the k1 estimate of each token's KL to the reference, taken off its reward; 0 needs no reference."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""


def advantages(prepared: Round, config: ReinforcePPConfig) -> dict[str, Tensor]:
    """A_t; 0 on candidates without a reward, which count in no mean."""
    known = scored_candidates(prepared)
    reward = shaped_reward(prepared, config.kl_coef)
    # Without values and with λ = 1, GAE is the discounted sum of what follows.
    to_go = gae(reward, torch.zeros_like(reward), prepared.candidate_of, gamma=config.gamma, gae_lambda=1.0)
    return {"advantage": whiten(to_go, mask=known.flatten()[prepared.candidate_of])}


def loss(scored: Scored, config: ReinforcePPConfig, statistics: Statistics) -> tuple[Term, ...]:
    per_token = ratio_loss(*policy_tokens(scored), config)
    return (Term(name="reinforce_pp", per_item=per_token, mask=real_tokens(scored), over="tokens"),)


def metrics(scored: Scored, config: ReinforcePPConfig, statistics: Statistics) -> MetricSums:
    return policy_metrics(scored, config)


METHOD = Method(
    name="reinforce_pp",
    config=ReinforcePPConfig,
    loss=loss,
    needs=frozenset({"reward", "behavior_token_logp", "advantage"}),
    candidates="group",
    data_policies=frozenset({"on_policy"}),
    paper="Hu 2025, arXiv:2501.03262",
    refuses_truncated_sampling=True,
    smallest_group=1,
    extra_needs=reference_needs,
    round_prepare=advantages,
    metrics=metrics,
)
