"""Estimators of KL(π‖π_ref), per token, in nats.

Each is unbiased or nearly so as a *number* under tokens drawn from π. As a *loss* they differ: the expected gradient
of k1 is zero, that of k2 is ∇KL(π‖π_ref), that of k3 is ∇KL(π_ref‖π). Hence k1 belongs in a reward and k2 or k3 in a
loss. Nothing is clamped. Source: Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rayalign.functional.logprobs import at_least_float32


def k1(logp: Float[Tensor, "*shape"], ref_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """u = log π − log π_ref: unbiased, high variance, of either sign."""
    return logp - ref_logp


def k2(logp: Float[Tensor, "*shape"], ref_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """u² / 2: biased, low variance, never negative."""
    return (logp - ref_logp).square() / 2


def k3(logp: Float[Tensor, "*shape"], ref_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp(−u) − 1 + u: unbiased, low variance, never negative."""
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio) - log_ratio


def exact_kl(logits: Float[Tensor, "N V"], ref_logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Σ_v π(v) (log π(v) − log π_ref(v)) at each token, summed over the whole vocabulary."""
    logp = torch.log_softmax(at_least_float32(logits), dim=-1)
    ref_logp = torch.log_softmax(at_least_float32(ref_logits), dim=-1)
    return (logp.exp() * (logp - ref_logp)).sum(dim=-1)
