"""GRPO: the group's standardised rewards as advantages, PPO's clipped ratio, and the k3 estimate of the KL as a loss.

Shao et al. 2024, arXiv:2402.03300. For K candidates of one prompt, A_k = (R_k − mean R) / std R on each of its tokens,

    ℓ_t = max(−A_k ρ_t, −A_k clip(ρ_t)) + kl_coef · k3(log π_t, log π_ref,t),     ρ_t = π/μ

How tokens are averaged makes different methods of it (``normalize``):

    grpo      mean over sequences of the mean over tokens
    dr_grpo   mean over sequences of the sum over tokens / ``constant_tokens``, A_k not divided by std R
              (Liu et al. 2025, arXiv:2503.20783)
    dapo      mean over all tokens (Yu et al. 2025, arXiv:2503.14476, which also has clip_high: 0.28 and kl_coef: 0)

A group whose rewards are all equal has advantage 0. DAPO draws such prompts again; here they count as tokens that teach
nothing (``frac_reward_zero_std`` says how many). The KL term's gradient is that of the forward KL at each token.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from rayalign.functional.advantages import grpo_advantage
from rayalign.functional.kl import k3
from rayalign.functional.logprobs import sum_per_candidate
from rayalign.methods._clipped import ppo_policy_loss
from rayalign.methods._fields import NonNegative, Positive
from rayalign.methods._pairs import MetricSums
from rayalign.methods._ratio import (
    RatioConfig,
    policy_metrics,
    policy_tokens,
    ratio_loss,
    real_tokens,
    reference_needs,
    scored_candidates,
)
from rayalign.methods.method import Method, Statistics, Term
from rayalign.types import Round, Scored

CONSTANT_TOKENS = 256.0


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


class GRPOConfig(RatioConfig):
    kl_coef: NonNegative = 0.04
    """Times the k3 estimate of each token's KL to the reference, a term of the loss; 0 needs no reference."""
    normalize: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """How tokens are averaged, and for dr_grpo that rewards are not divided by their standard deviation."""
    constant_tokens: Positive = CONSTANT_TOKENS
    """What dr_grpo divides each sequence's sum by: rollout.max_new_tokens in the paper."""

    @model_validator(mode="after")
    def _constant_is_read(self) -> GRPOConfig:
        if self.normalize != "dr_grpo" and self.constant_tokens != CONSTANT_TOKENS:
            raise ValueError(f"normalize: {self.normalize} has no constant length; remove constant_tokens")
        return self


def advantages(prepared: Round, config: GRPOConfig) -> dict[str, Tensor]:
    """A_k on every token of candidate k."""
    advantage = grpo_advantage(
        prepared.candidate("reward"),
        divide_by_std=config.normalize != "dr_grpo",
        candidate_mask=scored_candidates(prepared),
    )
    return {"advantage": advantage.flatten()[prepared.candidate_of]}


def loss(scored: Scored, config: GRPOConfig, statistics: Statistics) -> tuple[Term, ...]:
    real, tokens = real_tokens(scored), policy_tokens(scored)
    per_token = ratio_loss(*tokens, config)
    if config.kl_coef > 0:
        ref_logp = torch.where(real, scored.token("ref_token_logp"), 0)
        per_token = per_token + config.kl_coef * k3(tokens[0], ref_logp)
    if config.normalize == "dapo":
        return (Term(name="grpo", per_item=per_token, mask=real, over="tokens"),)
    mask = scored.batch.candidate_mask
    sums = sum_per_candidate(
        per_token, scored.batch.candidate_of, num_groups=mask.shape[0], num_candidates=mask.shape[1]
    )
    constant = config.normalize == "dr_grpo"
    per_sequence = sums / (config.constant_tokens if constant else scored.scores.length.clamp(min=1))
    return (Term(name="grpo", per_item=per_sequence.flatten(), mask=mask.flatten(), over="sequences"),)


def metrics(scored: Scored, config: GRPOConfig, statistics: Statistics) -> MetricSums:
    return policy_metrics(scored, config)


METHOD = Method(
    name="grpo",
    config=GRPOConfig,
    loss=loss,
    needs=frozenset({"reward", "behavior_token_logp", "advantage"}),
    candidates="group",
    data_policies=frozenset({"on_policy"}),
    paper="Shao et al. 2024, arXiv:2402.03300",
    refuses_truncated_sampling=True,
    extra_needs=reference_needs,
    round_prepare=advantages,
    metrics=metrics,
)
