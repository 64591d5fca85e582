"""WPO: weigh each pair by how likely the current policy is to write it, so that stored data act like its own samples.

Zhou et al. 2024, arXiv:2406.11827. The weight is a constant to the gradient. It comes from the same forward as the
loss, at temperature 1, and is averaged over a response's tokens. The method ``wpo`` is DPO with that weight, its
parameters and defaults included: the two differ in the weight alone. With any other pairwise method, and with KTO, the
weight composes (:func:`rayalign.methods.compose`). The paper trains with β = 0.01, which its recipes in ``examples/``
set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rayalign.functional.logprobs import count_per_candidate, sum_per_candidate
from rayalign.methods._pairs import MetricSums, mean_over
from rayalign.methods.dpo import METHOD as DPO
from rayalign.methods.dpo import DPOConfig
from rayalign.methods.dpo import metrics as dpo_metrics
from rayalign.methods.method import Need, Statistics, Term
from rayalign.methods.weighting import WPOWeight
from rayalign.types import Scored


class WPOConfig(WPOWeight, DPOConfig):
    """DPO's parameters, and those of the weight."""


def wpo_weight(
    token_logp: Float[Tensor, " N"],
    candidate_of: Int[Tensor, " N"],
    *,
    num_candidates: int,
    alignment: Literal["none", "greedy", "sampled"],
    log_sum_p2: Float[Tensor, " N"] | None = None,
    log_max_p: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " C"]:
    """exp of the mean over a response's tokens of log π(y_t) − log a_t; without gradient, one per candidate.

    a_t is 1 (``none``), max_v π(v) (``greedy``, needs ``log_max_p``) or Σ_v π(v)² (``sampled``, needs ``log_sum_p2``;
    eq. 2 of the paper). Only ``sampled`` can exceed 1. A candidate without tokens gets 1.
    """
    aligned = token_logp.detach()
    if alignment != "none":
        divisor = log_max_p if alignment == "greedy" else log_sum_p2
        if divisor is None:
            raise TypeError(f"alignment {alignment!r} needs {'log_max_p' if alignment == 'greedy' else 'log_sum_p2'}")
        aligned = aligned - divisor.detach()
    total = sum_per_candidate(aligned, candidate_of, num_groups=num_candidates, num_candidates=1)
    length = count_per_candidate(candidate_of, num_groups=num_candidates, num_candidates=1)
    return (total / length.clamp(min=1)).exp().flatten()


def wpo_pair_weight(
    weight: Float[Tensor, "B 2"],
    *,
    clamp: Literal["product", "each", "none"],
    which: Literal["both", "chosen", "rejected"] = "both",
) -> Float[Tensor, " B"]:
    """w_chosen · w_rejected, or one of the two; cut at 1 after (``product``) or before (``each``) multiplying.

    The authors' code cuts the product; the paper's text has no clamp (``none``).
    """
    if clamp == "each":
        weight = weight.clamp(max=1)
    pair = {"both": weight.prod(dim=1), "chosen": weight[:, 0], "rejected": weight[:, 1]}[which]
    return pair.clamp(max=1) if clamp == "product" else pair


def wpo_unpaired_weight(
    weight: Float[Tensor, " M"], desirable: Bool[Tensor, " M"], *, desirable_sum: Tensor, undesirable_sum: Tensor
) -> Float[Tensor, " M"]:
    """Weights over the sum of their class in the whole step: each class's weights sum to 1 (sec. 4.2)."""
    return weight / torch.where(desirable, desirable_sum, undesirable_sum)


def weight_needs(weighting: WPOWeight) -> frozenset[Need]:
    """Token statistics that the weight is made of."""
    if weighting.alignment == "greedy":
        return frozenset({"plain_token_logp", "log_max_p"})
    if weighting.alignment == "sampled":
        return frozenset({"plain_token_logp", "log_sum_p2"})
    return frozenset({"plain_token_logp"})


def candidate_weight(scored: Scored, weighting: WPOWeight) -> Float[Tensor, "B K"]:
    """The weight of every candidate; 1 where there is none."""
    mask = scored.batch.candidate_mask
    weight = wpo_weight(
        scored.token("plain_token_logp"),
        scored.batch.candidate_of,
        num_candidates=mask.numel(),
        alignment=weighting.alignment,
        log_sum_p2=scored.token("log_sum_p2") if weighting.alignment == "sampled" else None,
        log_max_p=scored.token("log_max_p") if weighting.alignment == "greedy" else None,
    )
    return torch.where(mask, weight.view(mask.shape), 1)


def pair_weight(scored: Scored, weighting: WPOWeight) -> Float[Tensor, " B"]:
    """The weight of every pair, before any permutation."""
    return wpo_pair_weight(candidate_weight(scored, weighting)[:, :2], clamp=weighting.clamp, which=weighting.which)


def weight_metrics(scored: Scored, weighting: WPOWeight) -> MetricSums:
    """Mean weight, its mean square, the share that the clamp cuts, and the mean weight of chosen and of rejected.

    mean² / mean square is the effective sample size as a share of the pairs.
    """
    candidates, mask = candidate_weight(scored, weighting)[:, :2], scored.pair_mask
    weight = wpo_pair_weight(candidates, clamp=weighting.clamp, which=weighting.which)
    unclamped = wpo_pair_weight(candidates, clamp="none", which=weighting.which)
    return {
        "wpo/weight": mean_over(weight, mask),
        "wpo/weight_squared": mean_over(weight.square(), mask),
        "wpo/clamped": mean_over((weight < unclamped).to(weight), mask),
        "wpo/weight_chosen": mean_over(candidates[:, 0], mask),
        "wpo/weight_rejected": mean_over(candidates[:, 1], mask),
    }


def loss(scored: Scored, config: WPOConfig, statistics: Statistics) -> tuple[Term, ...]:
    weight = pair_weight(scored, config)
    plain = DPO.loss(scored, config, statistics)
    return tuple(replace(term, name="wpo", per_item=term.per_item * weight) for term in plain)


def metrics(scored: Scored, config: WPOConfig, statistics: Statistics) -> MetricSums:
    return {**dpo_metrics(scored, config, statistics), **weight_metrics(scored, config)}


METHOD = replace(
    DPO,
    name="wpo",
    config=WPOConfig,
    loss=loss,
    paper="Zhou et al. 2024, arXiv:2406.11827, eq. 1 and 2",
    extra_needs=weight_needs,
    metrics=metrics,
)
