"""Best-of-n sampling in closed form: the yardstick that needs no training."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def best_of_n_distribution(
    probability: Float[Tensor, " V"], reward: Float[Tensor, " V"], *, n: int
) -> Float[Tensor, " V"]:
    """Distribution of the best of n independent draws, for distinct rewards: F(y)ⁿ − F(y⁻)ⁿ, F the reward's CDF."""
    order = torch.argsort(reward)
    below_or_equal = probability[order].cumsum(0)
    below = below_or_equal - probability[order]
    return torch.empty_like(probability).index_copy(0, order, below_or_equal**n - below**n)
