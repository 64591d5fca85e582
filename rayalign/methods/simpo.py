"""SimPO: a length-normalised, reference-free preference loss with a target margin.

Meng et al. 2024, arXiv:2405.14734.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor

from rayalign.methods._fields import LabelSmoothing, NonNegative, Positive
from rayalign.methods._pairs import MetricSums, pair_length, pair_logp, preference_metrics
from rayalign.methods.method import Method, MethodConfig, Statistics, Term, margin
from rayalign.types import Scored


class SimPOConfig(MethodConfig):
    beta: Positive = 2.0
    """Scale of the reward β · log π / length."""
    gamma: NonNegative = 0.5
    """Target margin of the rewards: absolute, not divided by β (the authors' ``gamma_beta_ratio`` is gamma / beta)."""
    label_smoothing: LabelSmoothing = 0.0
    """Assumed share of flipped labels."""


def simpo_loss(
    policy_logp: Float[Tensor, "B 2"],
    length: Real[Tensor, "B 2"],
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """−(1−ε) log σ(z) − ε log σ(−z), where z = β · margin of log π / length − γ."""
    z = beta * margin(policy_logp / length) - gamma
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def loss(scored: Scored, config: SimPOConfig, statistics: Statistics) -> tuple[Term, ...]:
    per_pair = simpo_loss(
        pair_logp(scored),
        pair_length(scored),
        beta=config.beta,
        gamma=config.gamma,
        label_smoothing=config.label_smoothing,
    )
    return (Term(name="simpo", per_item=per_pair, mask=scored.pair_mask, over="pairs"),)


def metrics(scored: Scored, config: SimPOConfig, statistics: Statistics) -> MetricSums:
    return preference_metrics(scored, config.beta * pair_logp(scored) / pair_length(scored))


METHOD = Method(
    name="simpo",
    config=SimPOConfig,
    loss=loss,
    paper="Meng et al. 2024, arXiv:2405.14734",
    metrics=metrics,
)
