"""DPO and cDPO: the logistic loss on the margin of implicit rewards.

Rafailov et al. 2023, arXiv:2305.18290; label smoothing ("conservative DPO") as in the authors' repository.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rayalign.methods._fields import LabelSmoothing, Positive
from rayalign.methods._pairs import MetricSums, pair_logp, pair_ref_logp, preference_metrics
from rayalign.methods.method import Method, MethodConfig, Statistics, Term, margin
from rayalign.types import Scored


class DPOConfig(MethodConfig):
    beta: Positive = 0.1
    """Scale of the implicit reward β · log(π/π_ref)."""
    label_smoothing: LabelSmoothing = 0.0
    """Assumed share of flipped labels; above 0 this is cDPO, whose margin has the finite optimum logit(1 − ε) / β."""


def dpo_loss(
    policy_logp: Float[Tensor, "B 2"], ref_logp: Float[Tensor, "B 2"], *, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " B"]:
    """−(1−ε) log σ(z) − ε log σ(−z), where z = β · margin of log(π/π_ref) and ε = ``label_smoothing``."""
    z = beta * margin(policy_logp - ref_logp)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def loss(scored: Scored, config: DPOConfig, statistics: Statistics) -> tuple[Term, ...]:
    per_pair = dpo_loss(
        pair_logp(scored), pair_ref_logp(scored), beta=config.beta, label_smoothing=config.label_smoothing
    )
    return (Term(name="dpo", per_item=per_pair, mask=scored.pair_mask, over="pairs"),)


def metrics(scored: Scored, config: DPOConfig, statistics: Statistics) -> MetricSums:
    return preference_metrics(scored, config.beta * (pair_logp(scored) - pair_ref_logp(scored)))


METHOD = Method(
    name="dpo",
    config=DPOConfig,
    loss=loss,
    needs=frozenset({"ref_logp"}),
    paper="Rafailov et al. 2023, arXiv:2305.18290, eq. 7",
    metrics=metrics,
)
