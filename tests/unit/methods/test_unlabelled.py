"""Where nothing is labelled no method moves the policy: ties, labels that are missing, rewards that are all equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from rayalign.methods import METHODS, Method, MethodConfig, WPOWeighting, compose, resolve
from rayalign.testing import RandomGroup, random_groups, scored_batch, step_loss, step_statistics, without
from rayalign.testing._batches import prepared_groups

NAN = math.nan


def lone(group: RandomGroup) -> RandomGroup:
    """What a label rule leaves of a prompt without a preference: one candidate, for company."""
    return without(group, range(1, len(group.real)), NAN)


def told(group: RandomGroup, **columns: float) -> RandomGroup:
    """The group with one value for all of its candidates in each of the columns."""
    equal = {name: (value,) * len(group.real) for name, value in columns.items()}
    return replace(group, per_candidate={**group.per_candidate, **equal})


def at_reference(group: RandomGroup) -> RandomGroup:
    """The group when the policy is the reference."""
    ref = group.per_token["ref_token_logp"]
    return replace(group, token_logp=tuple(values.detach().clone().requires_grad_() for values in ref))


def unlabelled(method: Method) -> dict[str, list[RandomGroup]]:
    """By what is missing: groups in which nothing is labelled for ``method``."""
    groups = random_groups(method, num_groups=3)
    if method.candidates == "pair":
        return {"tie": [lone(group) for group in groups]}
    if method.candidates == "ranking":
        return {
            "tie": [lone(group) for group in groups],
            "equal ranks": [told(group, rank=0.0) for group in groups],
            "no ranks": [told(group, rank=NAN) for group in groups],
        }
    if "label" in method.needs:
        return {
            "no label": [told(group, label=NAN) for group in groups],
            "tie": [told(lone(group), label=NAN) for group in groups],
        }
    missing = {"no rewards": [told(group, reward=NAN) for group in groups]}
    if method.round_prepare is None:  # equal rewards ask for the reference's own preference
        return missing | {"equal rewards": [at_reference(told(group, reward=0.7)) for group in groups]}
    if method.critic is not None:  # equal rewards are what its critic learns
        return missing
    return missing | {"equal rewards": [told(group, reward=0.7) for group in groups]}


def slopes(method: Method, config: MethodConfig, groups: Sequence[RandomGroup]) -> list[float]:
    """|gradient| of a step's loss by every token's log-probability, and by every score and value."""
    scored = scored_batch(prepared_groups(method, config, groups), method.needed(config))
    statistics = step_statistics(method, config, [scored], groups_per_step=len(groups))
    leaves = [leaf for group in groups for leaf in (*group.token_logp, *group.score, *group.per_token["value"])]
    loss = step_loss(method, config, [scored], statistics)
    found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else []
    return [float(gradient.abs().max()) for gradient in found if gradient is not None]


CASES = [
    (name, case, weighting)
    for name in sorted(METHODS)
    if name != "sft"
    for case in unlabelled(resolve(name))
    for weighting in ((None, "plain", "permuted") if name in ("ipo", "kto") else (None,))
]
"""sft needs no label: its completion is the label."""


@pytest.mark.parametrize(("name", "case", "weighting"), CASES)
def test_nothing_is_learned_where_nothing_is_labelled(name: str, case: str, weighting: str | None) -> None:
    method = resolve(name)
    config = method.config(**({"kl_coef": 0} if "kl_coef" in method.config.model_fields else {}))
    if weighting is not None:
        method = compose(method, WPOWeighting(permute=weighting == "permuted"))
    assert max(slopes(method, config, unlabelled(resolve(name))[case]), default=0.0) <= 1e-12


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_same_groups_with_their_labels_teach(name: str) -> None:
    method = resolve(name)
    assert max(slopes(method, method.config(), random_groups(method, num_groups=3))) > 1e-3


@pytest.mark.parametrize("name", ["exo_rw", "dpo_rw"])
def test_equal_rewards_lead_back_to_the_reference(name: str) -> None:
    """They are a label: no preference among these, other than the reference's. So the slope is towards it."""
    method = resolve(name)
    config = method.config(**({"behavior_correction": "off"} if name == "exo_rw" else {}))
    group = told(random_groups(method, num_groups=1)[0], reward=0.7)
    scored = scored_batch([group], method.needed(config))
    ratio = scored.scores.logp[0] - scored.candidate("ref_logp")[0]
    loss = step_loss(method, config, [scored], step_statistics(method, config, [scored], groups_per_step=1))
    slope = torch.tensor([gradient[0] for gradient in torch.autograd.grad(loss, group.token_logp)])
    assert slope[ratio.argmax()] > 0 > slope[ratio.argmin()]


@pytest.mark.parametrize("name", ["exo_rw", "dpo_rw"])
def test_a_candidate_without_a_reward_is_as_if_it_were_not_there(name: str) -> None:
    method, config = resolve(name), resolve(name).config()
    first, second = random_groups(method, num_groups=2)
    rewards = (*first.per_candidate["reward"][:-1], NAN)
    unknown = replace(first, per_candidate={**first.per_candidate, "reward": rewards})
    absent = without(first, [len(first.real) - 1], NAN)
    losses = []
    for group in (unknown, absent):
        scored = scored_batch([group, second], method.needed(config))
        statistics = step_statistics(method, config, [scored], groups_per_step=2)
        losses.append(step_loss(method, config, [scored], statistics).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and math.isfinite(losses[0])
