"""What pairwise methods see of a batch, and the metrics that all of them log."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rayalign.types import Scored

MetricSums = dict[str, tuple[Tensor, Tensor]]
"""Name → (sum, count)."""


def pair_logp(scored: Scored) -> Float[Tensor, "B 2"]:
    """Log-probabilities of chosen and rejected under the policy, with gradient; harmless where the pair is not real."""
    return _real(scored.scores.logp, scored.pair_mask)


def pair_ref_logp(scored: Scored) -> Float[Tensor, "B 2"]:
    """The same under the reference."""
    return _real(scored.candidate("ref_logp"), scored.pair_mask)


def pair_length(scored: Scored) -> Int[Tensor, "B 2"]:
    """Response tokens of chosen and rejected; 1 where the pair is not real."""
    return torch.where(scored.pair_mask[:, None], scored.scores.length[:, :2], 1)


def trl_reward_metrics(reward: Float[Tensor, "B 2"], mask: Bool[Tensor, " B"]) -> MetricSums:
    """TRL's ``rewards/*`` keys. A tie counts as half an accurate pair: at policy = reference accuracy is 0.5, not 0."""
    margin = reward[:, 0] - reward[:, 1]
    accurate = (margin > 0).to(reward) + (margin == 0).to(reward) / 2
    columns = {"chosen": reward[:, 0], "rejected": reward[:, 1], "accuracies": accurate, "margins": margin}
    return {f"rewards/{name}": mean_over(column, mask) for name, column in columns.items()}


def preference_metrics(scored: Scored, reward: Float[Tensor, "B 2"]) -> MetricSums:
    """:func:`trl_reward_metrics` of the method's implicit reward, and TRL's ``logps/*`` keys."""
    logp = pair_logp(scored)
    return {
        **trl_reward_metrics(reward, scored.pair_mask),
        "logps/chosen": mean_over(logp[:, 0], scored.pair_mask),
        "logps/rejected": mean_over(logp[:, 1], scored.pair_mask),
    }


def mean_over(column: Float[Tensor, " items"], mask: Bool[Tensor, " items"]) -> tuple[Tensor, Tensor]:
    """(sum, count) of a metric over the items whose mask is True."""
    return torch.where(mask, column.detach(), 0).sum(), mask.sum()


def _real(values: Float[Tensor, "B K"], pair_mask: Bool[Tensor, " B"]) -> Float[Tensor, "B 2"]:
    # -1 rather than 0: a probability below 1 has finite log-odds, so no objective divides by zero there.
    return torch.where(pair_mask[:, None], values[:, :2], -1.0)
