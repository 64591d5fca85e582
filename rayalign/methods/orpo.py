"""ORPO: likelihood of the chosen response plus a penalty on the odds ratio, in one stage and without reference.

Hong et al. 2024, arXiv:2403.07691. The likelihood is that of the response only, averaged over its tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor

from rayalign.methods._fields import NonNegative
from rayalign.methods._pairs import MetricSums, pair_length, pair_logp, preference_metrics
from rayalign.methods.method import Method, MethodConfig, Statistics, Term, margin
from rayalign.types import Scored


class ORPOConfig(MethodConfig):
    weight: NonNegative = 0.1
    """λ, the weight of the odds-ratio term (TRL calls it ``beta``)."""


def orpo_loss(policy_logp: Float[Tensor, "B 2"], length: Real[Tensor, "B 2"], *, weight: float) -> Float[Tensor, " B"]:
    """−a_chosen − λ log σ(log odds_chosen − log odds_rejected), where a = log π / length and odds = eᵃ / (1 − eᵃ)."""
    mean_logp = policy_logp / length
    return -mean_logp[:, 0] - weight * F.logsigmoid(margin(_log_odds(mean_logp)))


def _log_odds(mean_logp: Float[Tensor, "B 2"]) -> Float[Tensor, "B 2"]:
    # A probability that rounds to 1 would have infinite odds.
    below_one = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    return below_one - torch.log(-torch.expm1(below_one))


def loss(scored: Scored, config: ORPOConfig, statistics: Statistics) -> tuple[Term, ...]:
    per_pair = orpo_loss(pair_logp(scored), pair_length(scored), weight=config.weight)
    return (Term(name="orpo", per_item=per_pair, mask=scored.pair_mask, over="pairs"),)


def metrics(scored: Scored, config: ORPOConfig, statistics: Statistics) -> MetricSums:
    return preference_metrics(scored, config.weight * pair_logp(scored) / pair_length(scored))


METHOD = Method(
    name="orpo",
    config=ORPOConfig,
    loss=loss,
    paper="Hong et al. 2024, arXiv:2403.07691",
    metrics=metrics,
)
