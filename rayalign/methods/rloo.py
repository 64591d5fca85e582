"""RLOO: REINFORCE with the other candidates' mean reward as baseline, and the KL in the reward.

Ahmadian et al. 2024, arXiv:2402.14740. For K candidates y_1 … y_K ~ μ of one prompt

    R'_k = R_k − kl_coef · Σ_t (log μ(y_k,t) − log π_ref(y_k,t)),     A_k = R'_k − mean_{j≠k} R'_j
    L = mean_k max(−A_k ρ_k, −A_k clip(ρ_k)),     ρ_k = π(y_k)/μ(y_k) of the whole sequence

At π = μ the gradient is −mean_k A_k ∇ log π(y_k), the paper's. The ratio makes further steps on a round sound, as in
TRL, whose defaults these are. The KL is constant: it is the behavior policy's, at sampling.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rayalign.functional.advantages import rloo_advantage
from rayalign.functional.kl import k1
from rayalign.functional.logprobs import last_per_candidate, sum_per_candidate
from rayalign.methods._fields import NonNegative
from rayalign.methods._pairs import MetricSums
from rayalign.methods._ratio import (
    RatioConfig,
    item_metrics,
    kl_metrics,
    policy_metrics,
    policy_tokens,
    ratio_loss,
    reference_needs,
    reward_spread,
    scored_candidates,
)
from rayalign.methods.method import Method, Statistics, Term
from rayalign.types import Round, Scored


class RLOOConfig(RatioConfig):
    kl_coef: NonNegative = 0.05
    """Times the k1 estimate of the sequence's KL to the reference, taken off the reward; 0 needs no reference."""
    ratio: Literal["sequence", "token"] = "sequence"
    """Whose ratio is bounded: that of the whole completion, as in the paper's bandit view, or each token's own."""


def advantages(prepared: Round, config: RLOOConfig) -> dict[str, Tensor]:
    """A_k on every token of candidate k."""
    reward = prepared.candidate("reward")
    if config.kl_coef > 0:
        kl = k1(prepared.token("behavior_token_logp"), prepared.token("ref_token_logp"))
        shape = {"num_groups": reward.shape[0], "num_candidates": reward.shape[1]}
        reward = reward - config.kl_coef * sum_per_candidate(kl, prepared.candidate_of, **shape)
    advantage = rloo_advantage(reward, candidate_mask=scored_candidates(prepared))
    return {"advantage": advantage.flatten()[prepared.candidate_of]}


def loss(scored: Scored, config: RLOOConfig, statistics: Statistics) -> tuple[Term, ...]:
    real = scored.batch.candidate_mask.flatten()
    if config.ratio == "sequence":
        per_sequence = ratio_loss(*sequence_terms(scored), config)
    else:
        per_sequence = per_candidate(ratio_loss(*policy_tokens(scored), config), scored).flatten()
    return (Term(name="rloo", per_item=per_sequence, mask=real, over="sequences"),)


def sequence_terms(scored: Scored) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"], Float[Tensor, " C"]]:
    """(log π, log μ, advantage) of every completion."""
    logp, behavior_logp, advantage = policy_tokens(scored)
    num_groups, num_candidates = scored.batch.candidate_mask.shape
    shape = {"num_groups": num_groups, "num_candidates": num_candidates}
    last = last_per_candidate(advantage, scored.batch.candidate_of, **shape)
    return per_candidate(logp, scored).flatten(), per_candidate(behavior_logp, scored).flatten(), last.flatten()


def per_candidate(values: Float[Tensor, " N"], scored: Scored) -> Float[Tensor, "B K"]:
    """Sum over each candidate's tokens."""
    num_groups, num_candidates = scored.batch.candidate_mask.shape
    return sum_per_candidate(values, scored.batch.candidate_of, num_groups=num_groups, num_candidates=num_candidates)


def metrics(scored: Scored, config: RLOOConfig, statistics: Statistics) -> MetricSums:
    if config.ratio == "token":
        return policy_metrics(scored, config)
    mask = scored.batch.candidate_mask
    group = torch.arange(mask.numel(), device=mask.device) // mask.shape[1]
    items = item_metrics(*sequence_terms(scored), mask.flatten(), group, scored, config)
    return {**items, **kl_metrics(scored), **reward_spread(scored)}


METHOD = Method(
    name="rloo",
    config=RLOOConfig,
    loss=loss,
    needs=frozenset({"reward", "behavior_token_logp", "advantage"}),
    candidates="group",
    data_policies=frozenset({"on_policy"}),
    paper="Ahmadian et al. 2024, arXiv:2402.14740",
    refuses_truncated_sampling=True,
    extra_needs=reference_needs,
    round_prepare=advantages,
    metrics=metrics,
)
