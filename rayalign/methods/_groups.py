"""Metrics of methods that learn from scored groups of any size."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from rayalign.methods._pairs import MetricSums, mean_over
from rayalign.types import Scored


def rewarded(scored: Scored) -> Bool[Tensor, "B K"]:
    """True on candidates that have a reward."""
    return scored.batch.candidate_mask & ~scored.candidate("reward").isnan()


def group_metrics(scored: Scored) -> MetricSums:
    """Mean reward of the candidates, and how often the one with the highest log(π/π_ref) has the highest reward."""
    mask, reward = rewarded(scored), scored.candidate("reward")
    log_ratio = scored.scores.logp.detach() - scored.candidate("ref_logp")
    favourite = torch.where(mask, log_ratio, -torch.inf).argmax(dim=1, keepdim=True)
    best = torch.where(mask, reward, -torch.inf).amax(dim=1)
    agrees = (reward.gather(1, favourite).squeeze(1) == best).to(reward)
    return {
        "reward": mean_over(reward.flatten(), mask.flatten()),
        "rewards/accuracies": mean_over(agrees, mask.any(dim=1)),
    }
