"""What policy gradients on rounds share: parameters of the importance ratio ρ = π/μ, and what they log.

μ is the policy that drew the tokens, as the engine that drew them recorded it (``behavior_token_logp``). The trainer's
own log-probabilities from before the round's first step are not kept. So ρ holds two things: the policy's change
since the round was drawn, and the difference of engine and trainer on the same weights. With ``refresh_every:
1`` and one pass nothing has moved, and ``{clip: null, importance_cap: C}`` is truncated importance sampling exactly
(Yao et al. 2025; the truncation is that of IMPALA, arXiv:1802.01561). In longer rounds the same weight min(ρ, C) bounds
both together, as in CISPO (arXiv:2506.13585).

Metrics and how they are reduced; an item is a token, or a sequence where the ratio is the sequence's:

    ratio/mean            mean of ρ over the step's items
    ratio/max             the largest ρ of each group, mean over groups
    clip_ratio            share of items whose gradient the clip removes
    kl/behavior_k1, _k3   KL(μ‖π) since the round was drawn, nats per token, mean over tokens
    kl/ref_k1, _k3        KL(π‖π_ref), nats per token, mean over tokens; where the method sees the reference
    advantage_std         standard deviation of the advantage over each group's tokens, mean over groups
    reward, reward_std    mean over candidates; standard deviation inside each group, mean over groups
    frac_reward_zero_std  share of groups whose rewards are all equal, which teach nothing; with two samples or more
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from rayalign.functional.advantages import kl_shaped_reward
from rayalign.functional.kl import k1, k3
from rayalign.methods._clipped import importance_ratio, ppo_policy_loss
from rayalign.methods._fields import Positive
from rayalign.methods._pairs import MetricSums, mean_over
from rayalign.methods.method import MethodConfig, Need
from rayalign.types import Round, Scored


class RatioConfig(MethodConfig):
    clip: Annotated[float, Field(gt=0, lt=1)] | None = 0.2
    """Outside [1 − clip, 1 + clip] the ratio to the behavior policy earns nothing more; null: it is not clipped."""
    clip_high: Positive | None = None
    """The upper bound is 1 + clip_high instead (DAPO: 0.28); null: clip on both sides."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Where the advantage is negative, no gradient from ratios above this (Ye et al. 2020: 3); null: off."""
    importance_cap: Annotated[float, Field(ge=1)] | None = None
    """No item weighs more than this, whatever its ratio (2 is usual); its gradient stays. null: no cap."""

    @model_validator(mode="after")
    def _every_bound_acts(self) -> RatioConfig:
        if self.clip is None and self.clip_high is not None:
            raise ValueError("clip: null does not clip, so clip_high is never read; give clip too, or remove clip_high")
        if self.dual_clip is not None and self.importance_cap is not None:
            raise ValueError(
                "dual_clip and importance_cap bound the same ratios, one by dropping their gradient and one by capping "
                "it; give one of them"
            )
        if self.clip is not None and self.importance_cap is not None and self.importance_cap < 1 + upper(self):
            raise ValueError(
                f"importance_cap {self.importance_cap:g} is below the clip's 1 + {upper(self):g}, which would never "
                "act; raise the cap, or write clip: null"
            )
        return self


def upper(config: RatioConfig) -> float:
    """How far above 1 the ratio may rise; infinite without a clip."""
    if config.clip is None:
        return float("inf")
    return config.clip if config.clip_high is None else config.clip_high


def ratio_loss(
    logp: Float[Tensor, " items"],
    behavior_logp: Float[Tensor, " items"],
    advantage: Float[Tensor, " items"],
    config: RatioConfig,
) -> Float[Tensor, " items"]:
    """:func:`rayalign.methods._clipped.ppo_policy_loss` with the bounds of ``config``."""
    return ppo_policy_loss(
        logp,
        behavior_logp,
        advantage,
        clip=config.clip,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        importance_cap=config.importance_cap,
    )


def real_tokens(scored: Scored) -> Bool[Tensor, " N"]:
    """True on the tokens of real candidates."""
    return scored.batch.candidate_mask.flatten()[scored.batch.candidate_of]


def policy_tokens(scored: Scored) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(log π, log μ, advantage) per token; harmless where the candidate is not real."""
    real = real_tokens(scored)
    columns = scored.scores.token_logp, scored.token("behavior_token_logp"), scored.token("advantage")
    logp, behavior_logp, advantage = (torch.where(real, column, 0) for column in columns)
    return logp, behavior_logp, advantage


def scored_candidates(prepared: Round) -> Bool[Tensor, "B K"]:
    """True on candidates that have a reward: all real ones, but those of a prompt that the scorer failed on."""
    return prepared.candidate_mask & ~prepared.candidate("reward").isnan()


def reference_needs(config: Any) -> frozenset[Need]:
    """The reference's log-probabilities, unless ``config.kl_coef`` is 0."""
    return frozenset({"ref_token_logp"}) if config.kl_coef > 0 else frozenset()


def shaped_reward(prepared: Round, kl_coef: float) -> Float[Tensor, " N"]:
    """−kl_coef · (log μ − log π_ref) at every token, plus the reward at the last one; 0 for a missing reward."""
    score = torch.where(scored_candidates(prepared), prepared.candidate("reward"), 0).flatten()
    behavior_logp = prepared.token("behavior_token_logp")
    ref_logp = prepared.token("ref_token_logp") if kl_coef > 0 else behavior_logp
    return kl_shaped_reward(score, behavior_logp, ref_logp, prepared.candidate_of, kl_coef=kl_coef)


def policy_metrics(scored: Scored, config: RatioConfig) -> MetricSums:
    """The module's table, with tokens as items."""
    group = scored.batch.candidate_of // scored.batch.candidate_mask.shape[1]
    found = item_metrics(*policy_tokens(scored), real_tokens(scored), group, scored, config)
    return {**found, **kl_metrics(scored), **reward_spread(scored)}


@torch.no_grad()
def item_metrics(
    logp: Float[Tensor, " items"],
    behavior_logp: Float[Tensor, " items"],
    advantage: Float[Tensor, " items"],
    mask: Bool[Tensor, " items"],
    group: Int[Tensor, " items"],
    scored: Scored,
    config: RatioConfig,
) -> MetricSums:
    """``ratio/*`` and ``clip_ratio`` over items, each of which belongs to a group."""
    ratio = importance_ratio(logp, behavior_logp)
    above = (advantage > 0) & (ratio > 1 + upper(config))
    below = (advantage < 0) & (ratio < (1 - config.clip if config.clip is not None else 0))
    start = ratio.new_zeros(len(scored.group_mask))
    largest = start.scatter_reduce(0, group, torch.where(mask, ratio, 0), reduce="amax")
    return {
        "ratio/mean": mean_over(ratio, mask),
        "ratio/max": mean_over(largest, scored.group_mask),
        "clip_ratio": mean_over((above | below).to(ratio), mask),
    }


@torch.no_grad()
def kl_metrics(scored: Scored) -> MetricSums:
    """``kl/*`` and ``advantage_std``."""
    real = real_tokens(scored)
    logp, behavior_logp, advantage = policy_tokens(scored)
    found = {
        "kl/behavior_k1": mean_over(k1(behavior_logp, logp), real),
        "kl/behavior_k3": mean_over(k3(behavior_logp, logp), real),
    }
    if "ref_token_logp" in scored.needs:
        ref_logp = torch.where(real, scored.token("ref_token_logp"), 0)
        found["kl/ref_k1"] = mean_over(k1(logp, ref_logp), real)
        found["kl/ref_k3"] = mean_over(k3(logp, ref_logp), real)
    group = scored.batch.candidate_of // scored.batch.candidate_mask.shape[1]
    start = advantage.new_zeros(len(scored.group_mask))
    count = start.index_add(0, group, real.to(start)).clamp(min=1)
    mean = start.index_add(0, group, advantage) / count
    deviation = torch.where(real, advantage - mean[group], 0)
    spread = (start.index_add(0, group, deviation.square()) / count).sqrt()
    return {**found, "advantage_std": mean_over(spread, scored.group_mask)}


@torch.no_grad()
def reward_spread(scored: Scored) -> MetricSums:
    """``reward``, ``reward_std`` and ``frac_reward_zero_std``; a candidate without a reward counts in none."""
    reward = scored.candidate("reward")
    known = scored.batch.candidate_mask & ~reward.isnan()
    found = {"reward": mean_over(reward.flatten(), known.flatten())}
    if reward.shape[1] < 2:
        return found
    count, several = known.sum(dim=1), known.sum(dim=1) > 1
    mean = torch.where(known, reward, 0).sum(dim=1) / count.clamp(min=1)
    squares = torch.where(known, reward - mean[:, None], 0).square().sum(dim=1)
    highest = torch.where(known, reward, -torch.inf).amax(dim=1)
    lowest = torch.where(known, reward, torch.inf).amin(dim=1)
    return {
        **found,
        "reward_std": mean_over((squares / (count - 1).clamp(min=1)).sqrt(), several),
        "frac_reward_zero_std": mean_over((highest == lowest).to(reward), several),
    }
