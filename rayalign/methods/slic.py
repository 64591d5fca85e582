"""SLiC-HF: a hinge on the policy's own log-probabilities plus the log-likelihood of a target, without reference.

Zhao et al. 2023, arXiv:2305.10425. In training the target is the chosen candidate.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rayalign.methods._fields import NonNegative
from rayalign.methods._pairs import MetricSums, pair_logp, preference_metrics
from rayalign.methods.method import Method, MethodConfig, Statistics, Term, margin
from rayalign.types import Scored


class SLiCConfig(MethodConfig):
    delta: NonNegative = 1.0
    """Margin, in nats, beyond which a pair is ranked well enough."""
    reg_weight: NonNegative = 0.5
    """λ, the weight of the target's log-likelihood."""


def slic_loss(
    policy_logp: Float[Tensor, "B 2"], target_logp: Float[Tensor, " B"], *, delta: float, reg_weight: float
) -> Float[Tensor, " B"]:
    """max(0, δ − log π(chosen) + log π(rejected)) − λ log π(target)."""
    return (delta - margin(policy_logp)).relu() - reg_weight * target_logp


def loss(scored: Scored, config: SLiCConfig, statistics: Statistics) -> tuple[Term, ...]:
    policy_logp = pair_logp(scored)
    per_pair = slic_loss(policy_logp, policy_logp[:, 0], delta=config.delta, reg_weight=config.reg_weight)
    return (Term(name="slic", per_item=per_pair, mask=scored.pair_mask, over="pairs"),)


def metrics(scored: Scored, config: SLiCConfig, statistics: Statistics) -> MetricSums:
    return preference_metrics(scored, pair_logp(scored))


METHOD = Method(name="slic", config=SLiCConfig, loss=loss, paper="Zhao et al. 2023, arXiv:2305.10425", metrics=metrics)
