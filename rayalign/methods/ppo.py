"""PPO: token advantages from a critic of its own, the clipped ratio, and the KL in the reward.

Schulman et al. 2017, arXiv:1707.06347; on language models Ouyang et al. 2022, arXiv:2203.02155. With V the critic as it
was when the round was opened, the head's value *before* each token,

    r_t = 1[t = last] R − kl_coef · (log μ_t − log π_ref,t)
    δ_t = r_t + γ V_{t+1} − V_t,     A_t = δ_t + γ λ A_{t+1},     returns_t = A_t + V_t
    policy  L = mean over tokens of max(−A_t ρ_t, −A_t clip(ρ_t)),     A whitened over the round, ρ_t = π/μ
    critic  L = mean over tokens of ½ max((V' − returns)², (clip(V', V ± value_clip) − returns)²)

A completion ends with its last token, the end token where it has one: V after it is 0, and the score is given there.
One that ran into the limit ends there too, since what was scored is what there is. Policy and critic are two models
with two optimizers, so there is no coefficient between their losses.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from rayalign.functional.advantages import gae, whiten
from rayalign.methods._fields import NonNegative, Positive
from rayalign.methods._pairs import MetricSums, mean_over
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


class PPOConfig(RatioConfig):
    value_clip: Positive | None = 0.2
    """The critic gains nothing by moving further than this from its values when the round was opened; null: no clip."""
    kl_coef: NonNegative = 0.05
    """Times the k1 estimate of each token's KL to the reference, taken off its reward; 0 needs no reference."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """GAE's λ: 1 is the reward to go minus the value, 0 the critic's word for all that follows."""
    whiten: bool = True
    """Advantages have mean 0 and variance 1 over the tokens of the round; returns are made before."""
    target_kl: Positive | None = None
    """Further passes over a round are skipped once a step's kl/behavior_k3 is above this; null: never."""


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


def advantages(prepared: Round, config: PPOConfig) -> dict[str, Tensor]:
    """A_t and the critic's targets; without a reward a candidate's advantage is 0 and it has no target (NaN)."""
    known = scored_candidates(prepared).flatten()[prepared.candidate_of]
    reward = shaped_reward(prepared, config.kl_coef)
    value = prepared.token("old_value")
    advantage = gae(reward, value, prepared.candidate_of, gamma=config.gamma, gae_lambda=config.lam)
    returns = torch.where(known, advantage + value, torch.nan)
    centered = whiten(advantage, mask=known) if config.whiten else torch.where(known, advantage, 0)
    return {"advantage": centered, "return": returns}


def loss(scored: Scored, config: PPOConfig, statistics: Statistics) -> tuple[Term, ...]:
    per_token = ratio_loss(*policy_tokens(scored), config)
    return (Term(name="ppo", per_item=per_token, mask=real_tokens(scored), over="tokens"),)


def value_loss(scored: Scored, config: PPOConfig, statistics: Statistics) -> tuple[Term, ...]:
    told, *columns = targets(scored)
    per_token = ppo_value_loss(*columns, clip=config.value_clip)
    return (Term(name="value", per_item=per_token, mask=told, over="tokens"),)


def targets(
    scored: Scored,
) -> tuple[Bool[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(which tokens have a target, V', V when the round was opened, returns), [N]; harmless where there is none."""
    returns = scored.token("return")
    told = real_tokens(scored) & ~returns.isnan()
    value, old_value, returns = (
        torch.where(told, column, 0) for column in (scored.token("value"), scored.token("old_value"), returns)
    )
    return told, value, old_value, returns


def metrics(scored: Scored, config: PPOConfig, statistics: Statistics) -> MetricSums:
    return policy_metrics(scored, config)


@torch.no_grad()
def value_metrics(scored: Scored, config: PPOConfig, statistics: Statistics) -> MetricSums:
    """Means over tokens of V', of its target and of their squared difference; share of tokens beyond the clip."""
    told, value, old_value, returns = targets(scored)
    bound = float("inf") if config.value_clip is None else config.value_clip
    return {
        "critic/value": mean_over(value, told),
        "critic/return": mean_over(returns, told),
        "critic/squared_error": mean_over((value - returns).square(), told),
        "critic/clip_ratio": mean_over(((value - old_value).abs() > bound).to(value), told),
    }


def kl_limit(config: PPOConfig) -> tuple[str, float] | None:
    return ("kl/behavior_k3", config.target_kl) if config.target_kl is not None else None


CRITIC = Method(
    name="ppo_critic",
    config=PPOConfig,
    loss=value_loss,
    needs=frozenset({"value", "old_value", "return"}),
    candidates="group",
    trains="scalar",
    data_policies=frozenset({"on_policy"}),
    paper="Schulman et al. 2017, arXiv:1707.06347",
    smallest_group=1,
    metrics=value_metrics,
)

METHOD = Method(
    name="ppo",
    config=PPOConfig,
    loss=loss,
    needs=frozenset({"reward", "behavior_token_logp", "advantage"}),
    candidates="group",
    data_policies=frozenset({"on_policy"}),
    paper="Schulman et al. 2017, arXiv:1707.06347",
    refuses_truncated_sampling=True,
    smallest_group=1,
    extra_needs=reference_needs,
    round_prepare=advantages,
    metrics=metrics,
    critic=CRITIC,
    round_limit=kl_limit,
)
