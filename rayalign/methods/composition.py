"""WPO's weight on top of another method: a method in, a method out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rayalign.errors import UserError
from rayalign.functional.masked import masked_sum
from rayalign.methods._pairs import MetricSums, mean_over
from rayalign.methods.kto import example_mask, is_desirable
from rayalign.methods.method import Method, MethodConfig, Statistics, Term
from rayalign.methods.weighting import WPOWeighting
from rayalign.methods.wpo import METHOD as WPO
from rayalign.methods.wpo import candidate_weight, pair_weight, weight_metrics, weight_needs, wpo_unpaired_weight
from rayalign.types import Scored


def compose(method: Method, weighting: WPOWeighting) -> Method:
    """``method`` with every pair's loss (every example's, for KTO) multiplied by its WPO weight.

    Pairs are averaged as before. Unpaired weights sum to 1 in each class of the step, so there the sum is the loss.

    Raises:
        UserError: the method is weighted already, or has no pairs or labelled examples to weigh.
    """
    if method.name == WPO.name or "plain_token_logp" in method.needs:
        raise UserError(f"method {method.name!r} is weighted by WPO already: remove `weighting`, or choose method dpo")
    if _is_unpaired(method):
        return _compose_unpaired(method, weighting)
    if method.candidates != "pair" or method.trains != "policy":
        raise UserError(
            f"WPO weighs preference pairs or KTO's examples, and method {method.name!r} learns from neither"
        )
    return replace(
        method,
        name=f"{method.name}+wpo",
        loss=partial(_pair_loss, method, weighting),
        needs=method.needs | weight_needs(weighting),
        step_prepare=partial(_pair_prepare, method, weighting) if weighting.permute else method.step_prepare,
        metrics=partial(_pair_metrics, method, weighting),
    )


def _compose_unpaired(method: Method, weighting: WPOWeighting) -> Method:
    if weighting.which != "both":
        raise UserError(f"weighting.which: {weighting.which} chooses a side of a pair; {method.name!r} has no pairs")
    return replace(
        method,
        name=f"{method.name}+wpo",
        loss=partial(_unpaired_loss, method, weighting),
        needs=method.needs | weight_needs(weighting),
        step_prepare=partial(_unpaired_prepare, method, weighting),
        metrics=partial(_unpaired_metrics, method, weighting),
    )


def _is_unpaired(method: Method) -> bool:
    return method.candidates == "one" and "label" in method.needs


def _prepared(method: Method, scored: Scored, config: MethodConfig, statistics: Statistics) -> dict[str, Tensor]:
    return method.step_prepare(scored, config, statistics) if method.step_prepare else {}


def _base_metrics(method: Method, scored: Scored, config: MethodConfig, statistics: Statistics) -> MetricSums:
    return method.metrics(scored, config, statistics) if method.metrics else {}


# Pairs.


def _pair_prepare(
    method: Method, weighting: WPOWeighting, scored: Scored, config: MethodConfig, statistics: Statistics
) -> dict[str, Tensor]:
    dealt = _to_deal(pair_weight(scored, weighting), scored.pair_mask, scored, statistics)
    return {**_prepared(method, scored, config, statistics), **dealt}


def _pair_loss(
    method: Method, weighting: WPOWeighting, scored: Scored, config: MethodConfig, statistics: Statistics
) -> tuple[Term, ...]:
    weight = pair_weight(scored, weighting)
    if weighting.permute:
        weight = _shuffled(statistics)[_slots(scored, statistics)].to(weight)
    terms = method.loss(scored, config, statistics)
    _refuse_other_terms(method, terms, over="pairs")
    return tuple(replace(term, per_item=term.per_item * weight) for term in terms)


def _pair_metrics(
    method: Method, weighting: WPOWeighting, scored: Scored, config: MethodConfig, statistics: Statistics
) -> MetricSums:
    return {**_base_metrics(method, scored, config, statistics), **weight_metrics(scored, weighting)}


# Unpaired examples.


def _example_weight(scored: Scored, weighting: WPOWeighting) -> Float[Tensor, " B"]:
    weight = candidate_weight(scored, weighting)[:, 0]
    return weight.clamp(max=1) if weighting.clamp == "each" else weight


def _unpaired_prepare(
    method: Method, weighting: WPOWeighting, scored: Scored, config: MethodConfig, statistics: Statistics
) -> dict[str, Tensor]:
    weight, desirable, mask = _example_weight(scored, weighting), is_desirable(scored), example_mask(scored)
    prepared = _prepared(method, scored, config, statistics)
    if weighting.permute:
        prepared |= _to_deal(weight, mask, scored, statistics)
        prepared["wpo/desirable"] = _by_slot(weight.new_ones(weight.shape), desirable, scored, statistics)
    else:
        prepared["wpo/desirable_sum"] = masked_sum(weight, desirable)
        prepared["wpo/undesirable_sum"] = masked_sum(weight, mask & ~desirable)
    return prepared


def _unpaired_loss(
    method: Method, weighting: WPOWeighting, scored: Scored, config: MethodConfig, statistics: Statistics
) -> tuple[Term, ...]:
    weight, sums = _example_weight(scored, weighting), statistics.sums
    if weighting.permute:
        shuffled = _shuffled(statistics)
        weight = shuffled[_slots(scored, statistics)].to(weight)
        desirable_sum = (shuffled * sums["wpo/desirable"]).sum()
        undesirable_sum = shuffled.sum() - desirable_sum
    else:
        desirable_sum, undesirable_sum = sums["wpo/desirable_sum"], sums["wpo/undesirable_sum"]
    share = wpo_unpaired_weight(
        weight,
        is_desirable(scored),
        desirable_sum=desirable_sum.to(weight),
        undesirable_sum=undesirable_sum.to(weight),
    )
    terms = method.loss(scored, config, statistics)
    _refuse_other_terms(method, terms, over="groups")
    return tuple(
        replace(term, per_item=term.per_item * torch.where(term.mask, share, 0), over="constant", count=None)
        for term in terms
    )


def _unpaired_metrics(
    method: Method, weighting: WPOWeighting, scored: Scored, config: MethodConfig, statistics: Statistics
) -> MetricSums:
    weight, mask, desirable = _example_weight(scored, weighting), example_mask(scored), is_desirable(scored)
    return {
        **_base_metrics(method, scored, config, statistics),
        "wpo/weight": mean_over(weight, mask),
        "wpo/weight_squared": mean_over(weight.square(), mask),
        "wpo/weight_chosen": mean_over(weight, desirable),
        "wpo/weight_rejected": mean_over(weight, mask & ~desirable),
    }


def _refuse_other_terms(method: Method, terms: tuple[Term, ...], *, over: str) -> None:
    for term in terms:
        if term.over != over:
            raise UserError(
                f"WPO weighs terms over {over}, and term {term.name!r} of method {method.name!r} is over {term.over}"
            )


# The step's batch as a vector: one slot per group, wherever and in whichever micro-batch it is.


def _slots(scored: Scored, statistics: Statistics) -> Int[Tensor, " B"]:
    return scored.batch.group_index % statistics.groups_per_step


def _by_slot(
    values: Float[Tensor, " B"], mask: Bool[Tensor, " B"], scored: Scored, statistics: Statistics
) -> Float[Tensor, " G"]:
    empty = values.new_zeros(statistics.groups_per_step)
    return empty.index_add(0, _slots(scored, statistics), torch.where(mask, values, 0))


def _to_deal(
    weight: Float[Tensor, " B"], mask: Bool[Tensor, " B"], scored: Scored, statistics: Statistics
) -> dict[str, Tensor]:
    """The weights by slot, and which slots have one."""
    has_one = _by_slot(torch.ones_like(weight), mask, scored, statistics)
    return {"wpo/weights": _by_slot(weight, mask, scored, statistics), "wpo/weighed": has_one}


def _shuffled(statistics: Statistics) -> Float[Tensor, " G"]:
    """The step's weights, dealt again among the slots that have one; 0 in the others."""
    weights = statistics.sums["wpo/weights"]
    weighed = torch.nonzero(statistics.sums["wpo/weighed"]).flatten()
    generator = torch.Generator().manual_seed((statistics.seed * 1_000_003 + statistics.step) % 2**63)
    order = torch.randperm(len(weighed), generator=generator).to(weights.device)
    return torch.zeros_like(weights).index_copy(0, weighed, weights[weighed[order]])
