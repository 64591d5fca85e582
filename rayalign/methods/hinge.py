"""Hinge loss on the margin of implicit rewards: SLiC's loss with a reference, as RSO writes it.

Liu et al. 2023, arXiv:2309.06657 ("hinge-norm").
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rayalign.methods._fields import Positive
from rayalign.methods._pairs import MetricSums, pair_logp, pair_ref_logp, preference_metrics
from rayalign.methods.method import Method, MethodConfig, Statistics, Term, margin
from rayalign.types import Scored


class HingeConfig(MethodConfig):
    beta: Positive = 0.1
    """Scale of the implicit reward β · log(π/π_ref). A pair whose margin exceeds 1/β nats has no gradient."""


def hinge_loss(
    policy_logp: Float[Tensor, "B 2"], ref_logp: Float[Tensor, "B 2"], *, beta: float
) -> Float[Tensor, " B"]:
    """max(0, 1 − β · margin of log(π/π_ref))."""
    return (1 - beta * margin(policy_logp - ref_logp)).relu()


def loss(scored: Scored, config: HingeConfig, statistics: Statistics) -> tuple[Term, ...]:
    per_pair = hinge_loss(pair_logp(scored), pair_ref_logp(scored), beta=config.beta)
    return (Term(name="hinge", per_item=per_pair, mask=scored.pair_mask, over="pairs"),)


def metrics(scored: Scored, config: HingeConfig, statistics: Statistics) -> MetricSums:
    return preference_metrics(scored, config.beta * (pair_logp(scored) - pair_ref_logp(scored)))


METHOD = Method(
    name="hinge",
    config=HingeConfig,
    loss=loss,
    needs=frozenset({"ref_logp"}),
    paper="Liu et al. 2023, arXiv:2309.06657",
    metrics=metrics,
)
