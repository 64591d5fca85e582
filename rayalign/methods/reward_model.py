"""Reward model: a scalar head trained so that preferred answers score higher (Bradley-Terry).

Ouyang et al. 2022, arXiv:2203.02155, Eq. 1: all pairs of one prompt's ranked answers, averaged; a stored pair is the
ranking of two. The margin as in Touvron et al. 2023, arXiv:2307.09288; centering as in Eisenstein et al. 2023,
arXiv:2312.09244. An answer's score is the scalar head at its last token, the end token included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rayalign.functional.masked import masked_mean
from rayalign.methods._fields import NonNegative
from rayalign.methods._pairs import MetricSums, mean_over, trl_reward_metrics
from rayalign.methods.method import Method, MethodConfig, Statistics, Term
from rayalign.methods.method import margin as chosen_minus_rejected
from rayalign.types import Scored


class RewardModelConfig(MethodConfig):
    center: NonNegative = 0.0
    """Coefficient of (r_chosen + r_rejected)², which keeps scores near zero."""


def reward_model_loss(
    reward: Float[Tensor, "B 2"], *, margin: Float[Tensor, " B"] | float = 0.0, center: float = 0.0
) -> Float[Tensor, " B"]:
    """−log σ(r_chosen − r_rejected − margin) + center · (r_chosen + r_rejected)²."""
    return -F.logsigmoid(chosen_minus_rejected(reward) - margin) + center * reward.sum(dim=1).square()


def ranking_loss(
    score: Float[Tensor, "B K"],
    rank: Float[Tensor, "B K"],
    *,
    margin: Float[Tensor, " B"] | float = 0.0,
    center: float = 0.0,
    candidate_mask: Bool[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    """Mean of :func:`reward_model_loss` over the pairs of each group whose ranks differ; 0 where there is none.

    ``rank`` 0 is the best; NaN has no place in the order. A group's ``margin`` holds for each of its pairs.
    """
    above = is_above(rank, candidate_mask)
    pairs = compared_scores(score, above)
    margins = torch.as_tensor(margin, dtype=score.dtype, device=score.device).reshape(-1, 1, 1).expand(above.shape)
    losses = reward_model_loss(pairs.flatten(0, 2), margin=margins.flatten(), center=center)
    return masked_mean(losses.view(above.shape).flatten(1), above.flatten(1), dim=1)


def is_above(rank: Float[Tensor, "B K"], candidate_mask: Bool[Tensor, "B K"] | None = None) -> Bool[Tensor, "B K K"]:
    """True at [b, i, j] where answer i of prompt b is preferred to answer j."""
    above = rank[:, :, None] < rank[:, None, :]
    if candidate_mask is not None:
        above = above & candidate_mask[:, :, None] & candidate_mask[:, None, :]
    return above


def compared_scores(score: Float[Tensor, "B K"], above: Bool[Tensor, "B K K"]) -> Float[Tensor, "B K K 2"]:
    """The scores of answers i and j wherever i is above j, else 0."""
    pairs = torch.stack([score[:, :, None].expand_as(above), score[:, None, :].expand_as(above)], dim=-1)
    return torch.where(above[..., None], pairs, 0)


def loss(scored: Scored, config: RewardModelConfig, statistics: Statistics) -> tuple[Term, ...]:
    per_group = ranking_loss(
        scored.candidate("score"),
        scored.candidate("rank"),
        margin=scored.candidate("margin")[:, 0].nan_to_num(nan=0.0),
        center=config.center,
        candidate_mask=scored.batch.candidate_mask,
    )
    return (Term(name="reward_model", per_item=per_group, mask=scored.pair_mask, over="pairs"),)


def metrics(scored: Scored, config: RewardModelConfig, statistics: Statistics) -> MetricSums:
    """TRL's ``rewards/*`` over all compared pairs, and the Brier score of σ(margin): the mean of (1 − σ(margin))²."""
    above = is_above(scored.candidate("rank"), scored.batch.candidate_mask)
    pairs = compared_scores(scored.candidate("score"), above).flatten(0, 2)
    doubt = torch.sigmoid(-chosen_minus_rejected(pairs))
    return {**trl_reward_metrics(pairs, above.flatten()), "rewards/brier": mean_over(doubt.square(), above.flatten())}


METHOD = Method(
    name="reward_model",
    config=RewardModelConfig,
    loss=loss,
    needs=frozenset({"score", "rank", "margin"}),
    candidates="ranking",
    trains="scalar",
    data_policies=frozenset({"off_policy"}),
    paper="Ouyang et al. 2022, arXiv:2203.02155",
    metrics=metrics,
)
