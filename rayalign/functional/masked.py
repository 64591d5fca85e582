"""Reductions in which a masked value may be anything, NaN included: it reaches neither the result nor a gradient.

Multiplying by a mask does not do that (NaN · 0 is NaN), so every function selects before it computes.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_sum(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, dim: int | None = None
) -> Float[Tensor, ...]:
    """Sum of the values whose mask is True; 0 where there is none."""
    return torch.where(mask, values, 0).sum(dim=dim)


def masked_mean(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, dim: int | None = None
) -> Float[Tensor, ...]:
    """Mean of the values whose mask is True, without an epsilon in the denominator; 0 where there is none."""
    return masked_sum(values, mask, dim=dim) / mask.sum(dim=dim).clamp(min=1)


def masked_log_softmax(logits: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"] | None) -> Float[Tensor, "B K"]:
    """Log-softmax over the candidates whose mask is True.

    A masked candidate has probability exactly 0 and a log-probability that is large and negative but finite, so that
    0 · log 0 is 0. A group without any candidate comes out uniform.
    """
    if mask is not None:
        logits = torch.where(mask, logits, torch.finfo(logits.dtype).min)
    return torch.log_softmax(logits, dim=1)
