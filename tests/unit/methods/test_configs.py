"""Parameters: defaults are the published ones, impossible values are refused with a reason, none is ignored."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from rayalign.methods import METHODS, Method, MethodConfig, WPOWeighting, compose, resolve
from rayalign.testing import RandomGroup, prepared_groups, random_groups, scored_batch, step_loss, step_statistics

OPTIONS = [
    (name, option)
    for name in METHODS
    for option in resolve(name).config.model_fields
    if option not in MethodConfig.model_fields and (name, option) != ("ppo", "target_kl")  # no part of a loss
]
READ_ONLY_WITH = {("grpo", "constant_tokens"): {"normalize": "dr_grpo"}}
"""Options that are refused elsewhere."""


def loss_of(method: Method, config: MethodConfig, groups: list[RandomGroup]) -> float:
    """Of the method, and of its critic where it has one."""
    groups = prepared_groups(method, config, groups)
    parts = [method] if method.critic is None else [method, method.critic]
    return sum(loss_on(part, config, groups) for part in parts)


def loss_on(method: Method, config: MethodConfig, groups: list[RandomGroup]) -> float:
    batch = [scored_batch(groups, method.needed(config))]
    statistics = step_statistics(method, config, batch, groups_per_step=len(groups))
    return step_loss(method, config, batch, statistics).item()


def batches_for(method: Method) -> list[list[RandomGroup]]:
    """A random batch, and the same with behavior log-probabilities missing."""
    groups = random_groups(method, num_groups=4)
    missing = [
        replace(group, per_candidate={**group.per_candidate, "behavior_logp": (math.nan,) * len(group.real)})
        for group in groups
    ]
    return [groups, missing]


def other_values(config: type[MethodConfig], option: str) -> list[object]:
    field = config.model_fields[option]
    if get_origin(field.annotation) is Literal:
        return [value for value in get_args(field.annotation) if value != field.default]
    if field.default is None:
        return [3.0]
    if isinstance(field.default, bool):
        return [not field.default]
    return [field.default * 0.7 + 0.05]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_no_option_is_ignored(name: str, option: str) -> None:
    method = resolve(name)
    changed = []
    context = READ_ONLY_WITH.get((name, option), {})
    before = [loss_of(method, method.config(**context), groups) for groups in batches_for(method)]
    for value in other_values(method.config, option):
        after = [loss_of(method, method.config(**context, **{option: value}), groups) for groups in batches_for(method)]
        changed.append(any(not math.isclose(a, b) for a, b in zip(before, after, strict=True)))
    assert any(changed)


@pytest.mark.parametrize("option", WPOWeighting.model_fields)
def test_no_option_of_the_weighting_is_ignored(option: str) -> None:
    dpo = resolve("dpo")
    groups = random_groups(dpo, num_groups=6)
    before = loss_of(compose(dpo, WPOWeighting()), dpo.config(), groups)
    for value in other_values(WPOWeighting, option):
        assert loss_of(compose(dpo, WPOWeighting(**{option: value})), dpo.config(), groups) != before


RATIO = {"clip": 0.2, "clip_high": None, "dual_clip": None, "importance_cap": None}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo", {"beta": 0.1, "label_smoothing": 0.0}),
        ("exo_pref", {"beta_pi": 0.1, "label_smoothing": 1e-3}),
        ("exo_rw", {"beta_pi": 0.5, "beta_r": 0.5, "behavior_correction": "auto", "behavior": "recorded"}),
        ("wpo", {"beta": 0.1, "label_smoothing": 0.0, "alignment": "sampled", "clamp": "product", "which": "both"}),
        ("kto", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
        ("orpo", {"weight": 0.1}),
        ("ipo", {"tau": 0.1, "normalize": "sum"}),
        ("rloo", {**RATIO, "kl_coef": 0.05, "ratio": "sequence"}),
        ("reinforce_pp", {**RATIO, "kl_coef": 0.01, "gamma": 1.0}),
        (
            "ppo",
            {**RATIO, "value_clip": 0.2, "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "whiten": True, "target_kl": None},
        ),
        ("grpo", {**RATIO, "kl_coef": 0.04, "normalize": "grpo", "constant_tokens": 256.0}),
    ],
)
def test_defaults(name: str, expected: dict[str, object]) -> None:
    assert resolve(name).config().model_dump() == {"logit_temperature": 1.0, **expected}


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("robust_dpo", {"label_smoothing": 0.5}, "at 0.5 the labels say nothing"),
        ("dpo", {"label_smoothing": -0.1}, r"must lie in \[0, 0.5\)"),
        ("simpo", {"label_smoothing": 0.7}, r"must lie in \[0, 0.5\)"),
        ("exo_pref", {"label_smoothing": 0.0}, "reverse KL to a label of certainty is infinite"),
        ("exo_pref", {"label_smoothing": 0.5}, r"must lie in \[0, 0.5\)"),
        ("exo_rw", {"behavior_correction": "on", "behavior": "assume_reference"}, "use behavior_correction: auto"),
        ("exo_rw", {"beta_r": 0.0}, "greater than 0"),
        ("ipo", {"tau": 0.0}, "greater than 0"),
        ("dpo", {"beta": -0.1}, "greater than 0"),
        ("orpo", {"weight": -1.0}, "greater than or equal to 0"),
        ("dpo", {"gamma": 1.0}, "Extra inputs are not permitted"),
        ("wpo", {"clamp": "sum"}, "'product', 'each' or 'none'"),
        ("dpo", {"logit_temperature": 0.0}, "greater than 0"),
        ("rloo", {"kl_coef": -0.1}, "greater than or equal to 0"),
        ("grpo", {"clip": None, "clip_high": 0.3}, "clip_high is never read"),
        ("grpo", {"dual_clip": 3.0, "importance_cap": 2.0}, "give one of them"),
        ("grpo", {"clip_high": 0.28, "importance_cap": 1.2}, r"below the clip's 1 \+ 0.28"),
        ("grpo", {"normalize": "dapo", "constant_tokens": 64}, "dapo has no constant length"),
        ("reinforce_pp", {"gamma": 1.5}, "less than or equal to 1"),
        ("ppo", {"lam": 1.5}, "less than or equal to 1"),
        ("ppo", {"gamma": 0.0}, "greater than 0"),
        ("ppo", {"value_clip": 0.0}, "greater than 0"),
        ("ppo", {"target_kl": 0.0}, "greater than 0"),
        ("ppo", {"vf_coef": 0.1}, "Extra inputs are not permitted"),
        ("grpo", {"importance_cap": 0.5}, "greater than or equal to 1"),
        ("grpo", {"dual_clip": 1.0}, "greater than 1"),
    ],
)
def test_impossible_values_are_refused_with_the_reason(name: str, values: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        resolve(name).config(**values)


def test_configs_do_not_change() -> None:
    for name in METHODS:
        config = resolve(name).config()
        with pytest.raises(ValidationError, match="frozen"):
            config.logit_temperature = 2.0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_parameter_is_finite(value: float) -> None:
    with pytest.raises(ValidationError):
        resolve("dpo").config(beta=value)  # type: ignore[call-arg]
