"""IPO: a squared loss that pulls the margin to a finite target, whatever the labels.

Azar et al. 2023, arXiv:2310.12036. Two readings of the log-ratio are in use: the sum over tokens (the DPO authors'
repository, OpenRLHF) and the mean (TRL). The same τ means different things under them, so ``normalize`` says which.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Real
from torch import Tensor

from rayalign.methods._fields import Positive
from rayalign.methods._pairs import MetricSums, pair_length, pair_logp, pair_ref_logp, preference_metrics
from rayalign.methods.method import Method, MethodConfig, Statistics, Term, margin
from rayalign.types import Scored


class IPOConfig(MethodConfig):
    tau: Positive = 0.1
    """Strength of the regularisation: the margin's target is 1 / (2τ) nats (per token when ``normalize`` is mean)."""
    normalize: Literal["sum", "mean"] = "sum"
    """Log-ratios summed over the response's tokens, or averaged."""


def ipo_loss(
    policy_logp: Float[Tensor, "B 2"],
    ref_logp: Float[Tensor, "B 2"],
    length: Real[Tensor, "B 2"],
    *,
    tau: float,
    normalize: Literal["sum", "mean"],
) -> Float[Tensor, " B"]:
    """(d − 1/(2τ))², where d is the margin of log(π/π_ref), or of log(π/π_ref) / length when ``normalize`` is mean."""
    log_ratio = policy_logp - ref_logp
    if normalize == "mean":
        log_ratio = log_ratio / length
    return (margin(log_ratio) - 1 / (2 * tau)).square()


def loss(scored: Scored, config: IPOConfig, statistics: Statistics) -> tuple[Term, ...]:
    per_pair = ipo_loss(
        pair_logp(scored), pair_ref_logp(scored), pair_length(scored), tau=config.tau, normalize=config.normalize
    )
    return (Term(name="ipo", per_item=per_pair, mask=scored.pair_mask, over="pairs"),)


def metrics(scored: Scored, config: IPOConfig, statistics: Statistics) -> MetricSums:
    return preference_metrics(scored, config.tau * (pair_logp(scored) - pair_ref_logp(scored)))


METHOD = Method(
    name="ipo",
    config=IPOConfig,
    loss=loss,
    needs=frozenset({"ref_logp"}),
    paper="Azar et al. 2023, arXiv:2310.12036, eq. 17",
    metrics=metrics,
)
