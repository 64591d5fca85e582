"""MPO, *Maximum* Preference Optimization: raise the probability that the preferred response wins, off policy.

Jiang et al. 2023, arXiv:2312.16430 (not *Mixed* Preference Optimization). The preference term needs no reference; all
protection from drift comes from auxiliary data: log-likelihood of samples of the reference, and of pre-training text.
No public implementation by the authors exists. The form below follows the published abstract and its derivation: the
preference is a reward in {0, 1}, importance-sampled from the labelled choice.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor

from rayalign.methods._fields import LabelSmoothing, Positive
from rayalign.methods._pairs import MetricSums, mean_over, pair_length, pair_logp, pair_ref_logp, preference_metrics
from rayalign.methods.method import Method, MethodConfig, Need, Statistics, Term, margin
from rayalign.types import Scored

SATURATED = 1e-3
"""A pair with σ(h) σ(−h) below this has practically no gradient under the ``prob`` objective."""


class MPOConfig(MethodConfig):
    tau: Positive = 1.0
    """Scale of the margin h; with ``normalize: sum`` use about 0.1, since sums of long responses saturate."""
    objective: Literal["prob", "logprob"] = "prob"
    """``prob``: −σ(h), the expected preference reward. ``logprob``: −log σ(h)."""
    normalize: Literal["sum", "mean"] = "mean"
    """Log-probabilities summed over the response's tokens, or averaged."""
    use_reference: bool = False
    """h from log(π/π_ref) instead of log π: the ablation."""
    label_smoothing: LabelSmoothing = 0.0
    """Share of flipped labels; under ``prob`` it only rescales the gradient by 1 − 2ε."""


def mpo_margin(
    policy_logp: Float[Tensor, "B 2"],
    *,
    tau: float,
    length: Real[Tensor, "B 2"] | None = None,
    ref_logp: Float[Tensor, "B 2"] | None = None,
) -> Float[Tensor, " B"]:
    """h = τ · margin of log π, minus log π_ref if given, divided by length if given."""
    score = policy_logp if ref_logp is None else policy_logp - ref_logp
    return tau * margin(score if length is None else score / length)


def mpo_loss(
    policy_logp: Float[Tensor, "B 2"],
    *,
    tau: float,
    objective: Literal["prob", "logprob"],
    length: Real[Tensor, "B 2"] | None = None,
    ref_logp: Float[Tensor, "B 2"] | None = None,
    label_smoothing: float = 0.0,
    soft_label: Float[Tensor, " B"] | float = 1.0,
) -> Float[Tensor, " B"]:
    """−[P f(h) + (1−P) f(−h)], where f = σ for ``prob`` and log σ for ``logprob``; h as in :func:`mpo_margin`.

    P is ``soft_label`` = P(chosen is preferred), flipped with probability ``label_smoothing``. −σ(h) has the same
    gradient as the importance-weighted surrogate −sg[σ(h)] log σ(h).
    """
    h = mpo_margin(policy_logp, tau=tau, length=length, ref_logp=ref_logp)
    preferred = (1 - label_smoothing) * soft_label + label_smoothing * (1 - soft_label)
    reached = torch.sigmoid if objective == "prob" else F.logsigmoid
    return -preferred * reached(h) - (1 - preferred) * reached(-h)


def loss(scored: Scored, config: MPOConfig, statistics: Statistics) -> tuple[Term, ...]:
    per_pair = mpo_loss(
        pair_logp(scored),
        tau=config.tau,
        objective=config.objective,
        length=pair_length(scored) if config.normalize == "mean" else None,
        ref_logp=pair_ref_logp(scored) if config.use_reference else None,
        label_smoothing=config.label_smoothing,
        soft_label=scored.candidate("soft_label")[:, 0].nan_to_num(nan=1.0),
    )
    return (Term(name="mpo", per_item=per_pair, mask=scored.pair_mask, over="pairs"),)


def metrics(scored: Scored, config: MPOConfig, statistics: Statistics) -> MetricSums:
    reward = pair_logp(scored) - pair_ref_logp(scored) if config.use_reference else pair_logp(scored)
    if config.normalize == "mean":
        reward = reward / pair_length(scored)
    h = config.tau * margin(reward)
    saturated = (torch.sigmoid(h) * torch.sigmoid(-h) < SATURATED).to(h)
    return {
        **preference_metrics(scored, config.tau * reward),
        "mpo/saturated": mean_over(saturated, scored.pair_mask),
    }


def _reference_need(config: MPOConfig) -> frozenset[Need]:
    return frozenset({"ref_logp"}) if config.use_reference else frozenset()


METHOD = Method(
    name="mpo",
    config=MPOConfig,
    loss=loss,
    needs=frozenset({"soft_label"}),
    paper="Jiang et al. 2023, arXiv:2312.16430",
    requires_auxiliary=True,
    extra_needs=_reference_need,
    metrics=metrics,
)
