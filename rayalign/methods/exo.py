"""EXO: the reverse KL from the policy's preferences over candidates to the labels', as RLHF's objective has it.

Ji et al. 2024, arXiv:2402.00856. ``exo_pref`` learns from pairs, ``exo_rw`` from scored groups of any size. Nothing is
detached: the policy's own probabilities weigh the candidates and carry gradient. In ``exo_rw`` the effective
temperature is the product β_r · β_π. Equal rewards are a label: the target is the reference's own preference. The
gradient is then zero at the reference and leads back to it elsewhere.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import AfterValidator, model_validator
from torch import Tensor

from rayalign.functional.masked import masked_log_softmax
from rayalign.methods._fields import LabelSmoothing, Positive
from rayalign.methods._groups import group_metrics, rewarded
from rayalign.methods._pairs import MetricSums, pair_logp, pair_ref_logp, preference_metrics
from rayalign.methods.method import Method, MethodConfig, Need, Statistics, Term
from rayalign.types import Scored


def exo_loss(
    policy_logp: Float[Tensor, "B K"],
    ref_logp: Float[Tensor, "B K"],
    target_logits: Float[Tensor, "B K"],
    *,
    beta_pi: float,
    behavior_logp: Float[Tensor, "B K"] | None = None,
    candidate_mask: Bool[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    """KL(p‖q) = Σ_k p_k (log p_k − log q_k), where p = softmax(β_π log(π/π_ref) + c), q = softmax(target_logits + c).

    c = log(π_ref/μ), a constant, corrects for candidates drawn from μ (``behavior_logp`` = log μ) instead of the
    reference; without it c = 0. With μ = π and β_π = 1 the gradient is that of REINFORCE with a group-mean baseline.
    The correction is not in the paper.
    """
    correction = torch.zeros_like(ref_logp) if behavior_logp is None else (ref_logp - behavior_logp).detach()
    log_p = masked_log_softmax(beta_pi * (policy_logp - ref_logp) + correction, candidate_mask)
    log_q = masked_log_softmax(target_logits + correction, candidate_mask)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def exo_pref_targets(label_smoothing: float) -> Float[Tensor, " 2"]:
    """Logits (log(1−ε), log ε) of a pair's label, in float64; ε must be positive: ε = 0 is infinitely far."""
    return torch.tensor([math.log1p(-label_smoothing), math.log(label_smoothing)], dtype=torch.float64)


def exo_reward_targets(reward: Float[Tensor, "B K"], beta_r: float) -> Float[Tensor, "B K"]:
    """Logits r / β_r of a scored group's label."""
    return reward / beta_r


def _positive(label_smoothing: float) -> float:
    if label_smoothing == 0:
        raise ValueError(
            "EXO's reverse KL to a label of certainty is infinite: label_smoothing must be positive, such as 0.001 "
            "for clean labels or the share of flipped labels for noisy ones"
        )
    return label_smoothing


class EXOPrefConfig(MethodConfig):
    beta_pi: Positive = 0.1
    """Scale of log(π/π_ref)."""
    label_smoothing: Annotated[LabelSmoothing, AfterValidator(_positive)] = 1e-3
    """Probability that a label is flipped; the margin's optimum is logit(1 − ε) / β_π nats."""


def pref_loss(scored: Scored, config: EXOPrefConfig, statistics: Statistics) -> tuple[Term, ...]:
    policy_logp = pair_logp(scored)
    targets = exo_pref_targets(config.label_smoothing).to(policy_logp).expand_as(policy_logp)
    per_pair = exo_loss(policy_logp, pair_ref_logp(scored), targets, beta_pi=config.beta_pi)
    return (Term(name="exo_pref", per_item=per_pair, mask=scored.pair_mask, over="pairs"),)


def pref_metrics(scored: Scored, config: EXOPrefConfig, statistics: Statistics) -> MetricSums:
    return preference_metrics(scored, config.beta_pi * (pair_logp(scored) - pair_ref_logp(scored)))


EXO_PREF = Method(
    name="exo_pref",
    config=EXOPrefConfig,
    loss=pref_loss,
    needs=frozenset({"ref_logp"}),
    paper="Ji et al. 2024, arXiv:2402.00856, eq. 16",
    metrics=pref_metrics,
)


class EXORewardConfig(MethodConfig):
    beta_pi: Positive = 0.5
    """Scale of log(π/π_ref)."""
    beta_r: Positive = 0.5
    """Divides the rewards."""
    behavior_correction: Literal["auto", "on", "off"] = "auto"
    """``auto`` and ``on`` correct by behavior log-probabilities; ``off`` takes every candidate as the reference's."""
    behavior: Literal["recorded", "assume_reference"] = "recorded"
    """``assume_reference``: a candidate without behavior log-probabilities counts as drawn from the reference."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> EXORewardConfig:
        if self.behavior == "assume_reference" and self.behavior_correction == "on":
            raise ValueError(
                "behavior_correction: on needs behavior log-probabilities for every candidate, which behavior: "
                "assume_reference does not read; use behavior_correction: auto"
            )
        return self


def behavior_logp(scored: Scored, config: EXORewardConfig) -> Float[Tensor, "B K"] | None:
    """log μ of every candidate, or None where nothing is corrected."""
    if config.behavior_correction == "off":
        return None
    recorded = scored.candidate("behavior_logp")
    if config.behavior == "recorded":
        return recorded
    return torch.where(recorded.isnan(), scored.candidate("ref_logp"), recorded)


def _behavior_needs(config: EXORewardConfig) -> frozenset[Need]:
    return frozenset() if config.behavior_correction == "off" else frozenset({"behavior_logp"})


def reward_loss(scored: Scored, config: EXORewardConfig, statistics: Statistics) -> tuple[Term, ...]:
    known = rewarded(scored)
    per_group = exo_loss(
        scored.scores.logp,
        scored.candidate("ref_logp"),
        exo_reward_targets(scored.candidate("reward"), config.beta_r),
        beta_pi=config.beta_pi,
        behavior_logp=behavior_logp(scored, config),
        candidate_mask=known,
    )
    return (Term(name="exo_rw", per_item=per_group, mask=known.any(dim=1), over="groups"),)


def reward_metrics(scored: Scored, config: EXORewardConfig, statistics: Statistics) -> MetricSums:
    return group_metrics(scored)


EXO_RW = Method(
    name="exo_rw",
    config=EXORewardConfig,
    loss=reward_loss,
    needs=frozenset({"ref_logp", "reward"}),
    candidates="group",
    paper="Ji et al. 2024, arXiv:2402.00856",
    refuses_truncated_sampling=True,
    extra_needs=_behavior_needs,
    metrics=reward_metrics,
)
