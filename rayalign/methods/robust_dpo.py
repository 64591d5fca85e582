"""Robust DPO: an estimate of the DPO loss on clean labels that is unbiased when a known share is flipped.

Chowdhury et al. 2024, arXiv:2403.00409. Not cDPO: this loss is unbounded below as the margin grows, so stop early.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rayalign.methods._fields import LabelSmoothing, Positive
from rayalign.methods._pairs import MetricSums, pair_logp, pair_ref_logp, preference_metrics
from rayalign.methods.method import Method, MethodConfig, Statistics, Term, margin
from rayalign.types import Scored


class RobustDPOConfig(MethodConfig):
    beta: Positive = 0.1
    """Scale of the implicit reward β · log(π/π_ref)."""
    label_smoothing: LabelSmoothing = 0.1
    """Probability ε that a label is flipped."""


def robust_dpo_loss(
    policy_logp: Float[Tensor, "B 2"], ref_logp: Float[Tensor, "B 2"], *, beta: float, label_smoothing: float
) -> Float[Tensor, " B"]:
    """[−(1−ε) log σ(z) + ε log σ(−z)] / (1 − 2ε), where z = β · margin of log(π/π_ref); ε < 0.5."""
    z = beta * margin(policy_logp - ref_logp)
    flipped = label_smoothing
    return (-(1 - flipped) * F.logsigmoid(z) + flipped * F.logsigmoid(-z)) / (1 - 2 * flipped)


def loss(scored: Scored, config: RobustDPOConfig, statistics: Statistics) -> tuple[Term, ...]:
    per_pair = robust_dpo_loss(
        pair_logp(scored), pair_ref_logp(scored), beta=config.beta, label_smoothing=config.label_smoothing
    )
    return (Term(name="robust_dpo", per_item=per_pair, mask=scored.pair_mask, over="pairs"),)


def metrics(scored: Scored, config: RobustDPOConfig, statistics: Statistics) -> MetricSums:
    return preference_metrics(scored, config.beta * (pair_logp(scored) - pair_ref_logp(scored)))


METHOD = Method(
    name="robust_dpo",
    config=RobustDPOConfig,
    loss=loss,
    needs=frozenset({"ref_logp"}),
    paper="Chowdhury et al. 2024, arXiv:2403.00409",
    metrics=metrics,
)
