"""Reward model: a scalar head trained so that chosen scores above rejected (Bradley-Terry).

Ouyang et al. 2022, arXiv:2203.02155; the margin as in Touvron et al. 2023, arXiv:2307.09288; centering as in
Eisenstein et al. 2023, arXiv:2312.09244. A candidate's score is the value at its last response token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rayalign.functional.logprobs import last_per_candidate
from rayalign.methods._base import Method, MethodConfig, Statistics, Term
from rayalign.methods._base import margin as chosen_minus_rejected
from rayalign.methods._fields import NonNegative
from rayalign.methods._pairs import MetricSums, reward_metrics
from rayalign.types import Scored


class RewardModelConfig(MethodConfig):
    center: NonNegative = 0.0
    """Coefficient of (r_chosen + r_rejected)², which keeps scores near zero."""


def reward_model_loss(
    reward: Float[Tensor, "B 2"], *, margin: Float[Tensor, " B"] | float = 0.0, center: float = 0.0
) -> Float[Tensor, " B"]:
    """−log σ(r_chosen − r_rejected − margin) + center · (r_chosen + r_rejected)²."""
    return -F.logsigmoid(chosen_minus_rejected(reward) - margin) + center * reward.sum(dim=1).square()


def pair_score(scored: Scored) -> Float[Tensor, "B 2"]:
    """Scores of chosen and rejected, with gradient; 0 where the pair is not real."""
    groups, candidates = scored.batch.candidate_mask.shape
    value, candidate_of = scored.token("value"), scored.batch.candidate_of
    score = last_per_candidate(value, candidate_of, num_groups=groups, num_candidates=candidates)
    return torch.where(scored.pair_mask[:, None], score[:, :2], 0)


def loss(scored: Scored, config: RewardModelConfig, statistics: Statistics) -> tuple[Term, ...]:
    margin = scored.candidate("margin")[:, 0].nan_to_num(nan=0.0)
    per_pair = reward_model_loss(pair_score(scored), margin=margin, center=config.center)
    return (Term(name="reward_model", per_item=per_pair, mask=scored.pair_mask, over="pairs"),)


def metrics(scored: Scored, config: RewardModelConfig, statistics: Statistics) -> MetricSums:
    return reward_metrics(pair_score(scored), scored.pair_mask)


METHOD = Method(
    name="reward_model",
    config=RewardModelConfig,
    loss=loss,
    needs=frozenset({"value", "margin"}),
    data_policies=frozenset({"off_policy"}),
    paper="Ouyang et al. 2022, arXiv:2203.02155",
    metrics=metrics,
)
