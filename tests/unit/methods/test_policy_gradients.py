"""RLOO, REINFORCE++ and GRPO through their records: numbers by hand, and the vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from token_groups import Groups, double
from torch import Tensor

from rayalign.functional.advantages import whiten

VECTORS = {
    vector["id"]: vector
    for vector in json.loads((Path(__file__).parents[2] / "fixtures" / "vectors.json").read_text())["vectors"]
}


# By hand: one prompt, a completion of three tokens and one of two.

U = double([0.1, -0.2, 0.3, 0.4, -0.1])
"""log μ − log π_ref of every token; 0.2 for the first completion and 0.3 for the second."""


def hand_made() -> Groups:
    logp = double([-1.0, -0.5, -2.0, -0.7, -1.2]).requires_grad_()
    behavior_logp = logp.detach().clone()
    return Groups(
        [[3, 2]],
        logp,
        reward=double([[1.0, 0.0]]),
        behavior_token_logp=behavior_logp,
        ref_token_logp=behavior_logp - U,
    )


def near(values: Tensor, expected: Sequence[float]) -> None:
    assert values.tolist() == pytest.approx(list(expected), abs=1e-9)


def test_rloo_takes_the_kl_of_the_sequence_off_before_the_baseline() -> None:
    """Rewards 1 − 0.5 · 0.2 = 0.9 and 0 − 0.5 · 0.3 = −0.15; each minus the other: ±1.05, on every token."""
    groups = hand_made()
    near(groups.prepare("rloo", kl_coef=0.5), [1.05, 1.05, 1.05, -1.05, -1.05])
    loss = groups.loss("rloo", kl_coef=0.5)
    # At π = μ every ratio is 1: −(1.05 − 1.05)/2, and each token has the slope −A/2 of its sequence.
    assert loss.item() == pytest.approx(0, abs=1e-12)
    near(torch.autograd.grad(loss, groups.token_logp)[0], [-0.525, -0.525, -0.525, 0.525, 0.525])


def test_rloo_with_token_ratios_has_the_same_slope_where_nothing_has_moved() -> None:
    groups = hand_made()
    groups.prepare("rloo", kl_coef=0.5)
    loss = groups.loss("rloo", kl_coef=0.5, ratio="token")
    near(torch.autograd.grad(loss, groups.token_logp)[0], [-0.525, -0.525, -0.525, 0.525, 0.525])


def test_reinforce_pp_pays_for_the_kl_that_follows_and_whitens_over_all_tokens() -> None:
    """Token rewards −0.05, 0.10, 1 − 0.15 and −0.20, 0.05 (the score on the last token of the short row too).

    To go: 0.90, 0.95, 0.85, −0.15, 0.05; their mean is 0.52, their squared deviations 1.108, over 4 degrees 0.277.
    """
    groups = hand_made()
    scale = math.sqrt(0.277 + 1e-8)
    expected = [0.38 / scale, 0.43 / scale, 0.33 / scale, -0.67 / scale, -0.47 / scale]
    near(groups.prepare("reinforce_pp", kl_coef=0.5), expected)
    loss = groups.loss("reinforce_pp", kl_coef=0.5)
    near(torch.autograd.grad(loss, groups.token_logp)[0], [-advantage / 5 for advantage in expected])


def test_reinforce_pp_discounts_what_is_far() -> None:
    """γ = ½ and no KL: 0.25, 0.5, 1 before the score of the first completion, nothing before that of the second."""
    groups = hand_made()
    found = groups.prepare("reinforce_pp", kl_coef=0, gamma=0.5)
    to_go = double([0.25, 0.5, 1.0, 0.0, 0.0])
    near(found, ((to_go - 0.35) / torch.sqrt(((to_go - 0.35) ** 2).sum() / 4 + 1e-8)).tolist())


def test_grpo_standardises_and_puts_the_kl_into_the_loss() -> None:
    """Mean 0.5, unbiased deviation √½: A = ±0.5/√½. k3's slope is 1 − exp(−u), whatever the advantage."""
    groups = hand_made()
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    near(groups.prepare("grpo"), [a, a, a, -a, -a])
    slopes = [0.04 * (1 - math.exp(-u)) for u in U.tolist()]
    lengths = {"grpo": [3, 3, 3, 2, 2], "dapo": [2.5] * 5}  # · 2 sequences: 1/(2 · length), or 1/5 for every token
    for normalize, per in lengths.items():
        loss = groups.loss("grpo", normalize=normalize)
        expected = [
            (sign * a + slope) / (2 * n) for sign, slope, n in zip([-1] * 3 + [1] * 2, slopes, per, strict=True)
        ]
        near(torch.autograd.grad(loss, groups.token_logp)[0], expected)


def test_dr_grpo_divides_by_neither_deviation_nor_length() -> None:
    groups = hand_made()
    near(groups.prepare("grpo", normalize="dr_grpo"), [0.5, 0.5, 0.5, -0.5, -0.5])
    loss = groups.loss("grpo", normalize="dr_grpo", constant_tokens=4, kl_coef=0)
    near(torch.autograd.grad(loss, groups.token_logp)[0], [-0.0625] * 3 + [0.0625] * 2)  # ∓0.5 / (2 · 4)


def test_a_capped_ratio_weighs_by_the_cap_and_keeps_its_gradient() -> None:
    """ρ = 4, ½ and 1 under a cap of 2: weights 2, ½, 1 of −A ∇ log π; clipping would have dropped the first."""
    moved = double([math.log(4), math.log(0.5), 0.0])
    behavior_logp = double([-3.0, -2.0, -2.0])
    advantage = double([1.0, 1.0, -1.0])
    for parameters, expected in (
        ({"clip": None, "importance_cap": 2.0}, [-2 / 3, -0.5 / 3, 1 / 3]),
        ({"clip": None}, [-4 / 3, -0.5 / 3, 1 / 3]),
        ({}, [0.0, -0.5 / 3, 1 / 3]),
    ):
        logp = (behavior_logp + moved).requires_grad_()
        groups = Groups([[2, 1]], logp, behavior_token_logp=behavior_logp, advantage=advantage)
        loss = groups.loss("reinforce_pp", kl_coef=0, **parameters)
        near(torch.autograd.grad(loss, logp)[0], expected)


def test_metrics_are_reduced_as_they_say() -> None:
    """Two groups of two: ratios 2, 1, 1, 1 | ½, 1, 1 of tokens; the second group's rewards are equal."""
    moved = double([math.log(2), 0, 0, 0, math.log(0.5), 0, 0])
    behavior_logp = double([-1.5] * 7)
    groups = Groups(
        [[2, 2], [1, 2]],
        behavior_logp + moved,
        behavior_token_logp=behavior_logp,
        ref_token_logp=behavior_logp - 0.25,
        reward=double([[1.0, 0.0], [3.0, 3.0]]),
        advantage=double([1, 1, -1, -1, -2, 0, 0]),
    )
    found = groups.metrics("grpo")
    log2 = math.log(2)
    expected = {
        "ratio/mean": 7.5 / 7,
        "ratio/max": (2 + 1) / 2,
        "clip_ratio": 2 / 7,  # above with a gain, below with a loss
        "kl/behavior_k1": 0.0,
        "kl/behavior_k3": ((2 - 1 - log2) + (0.5 - 1 + log2)) / 7,
        "kl/ref_k1": 0.25,
        "advantage_std": (1 + math.sqrt(8 / 9)) / 2,
        "reward": 7 / 4,
        "reward_std": math.sqrt(0.5) / 2,
        "frac_reward_zero_std": 0.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    # Of sequences: their ratios are 2, 1 | ½, 1, and their advantages 1, −1 | −2, 0.
    sequences = groups.metrics("rloo")
    assert sequences["ratio/mean"] == pytest.approx(4.5 / 4) and sequences["clip_ratio"] == 0.5
    assert "kl/ref_k1" not in groups.metrics("grpo", kl_coef=0)


# The vectors, through the records.


def test_v29_advantages() -> None:
    vector = VECTORS["V29"]
    groups = Groups([[1] * 4] * 2, torch.zeros(8), reward=double(vector["inputs"]["rewards"]))
    groups.per_token["behavior_token_logp"] = torch.zeros(8, dtype=torch.float64)
    for key, name, parameters in (
        ("rloo", "rloo", {"kl_coef": 0}),
        ("grpo_std_eps_1e6", "grpo", {}),
        ("dr_grpo", "grpo", {"normalize": "dr_grpo"}),
    ):
        found = groups.prepare(name, **parameters).view(2, 4)
        torch.testing.assert_close(found, double(vector["expected"][key]), rtol=1e-9, atol=1e-12)


def test_v30_rloo() -> None:
    inputs, params, expected = (VECTORS["V30"][key] for key in ("inputs", "params", "expected"))
    logp = double(inputs["lp"]).requires_grad_()
    groups = Groups(
        [[1] * 4],
        logp,
        reward=double([inputs["reward"]]),
        behavior_token_logp=double(inputs["lp_old"]),
        ref_token_logp=double(inputs["lp_ref"]),
    )
    parameters = {"kl_coef": params["beta_kl"], "clip": params["eps"]}
    near(groups.prepare("rloo", **parameters), expected["advantages"])
    loss = groups.loss("rloo", **parameters)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    near(torch.autograd.grad(loss, logp)[0], expected["grad_lp"])


def ragged(vector: Mapping[str, Any], *names: str) -> tuple[Tensor, list[int], list[Tensor]]:
    mask = double(vector["inputs"]["mask"]).bool()
    return mask, mask.sum(dim=1).tolist(), [double(vector["inputs"][name])[mask] for name in names]


def test_v27_reinforce_pp_is_the_clipped_loss_over_tokens() -> None:
    vector = VECTORS["V27"]
    _, lengths, (new, old, advantage) = ragged(vector, "new_logp", "old_logp", "advantages")
    groups = Groups([lengths], new.requires_grad_(), behavior_token_logp=old, advantage=advantage)
    for suffix, parameters in (("", {}), ("_dual_clip_3", {"dual_clip": 3.0})):
        loss = groups.loss("reinforce_pp", kl_coef=0, **parameters)
        assert loss.item() == pytest.approx(vector["expected"][f"loss_token_mean{suffix}"], rel=1e-9)


def test_v27_rloo_of_tokens_and_grpo_differ_in_what_they_average() -> None:
    vector = VECTORS["V27"]
    _, lengths, (new, old, advantage) = ragged(vector, "new_logp", "old_logp", "advantages")
    groups = Groups([lengths], new, behavior_token_logp=old, advantage=advantage)
    found = {
        "seq_mean_token_sum": groups.loss("rloo", kl_coef=0, ratio="token"),
        "seq_mean_token_mean": groups.loss("grpo", kl_coef=0),
        "token_mean": groups.loss("grpo", kl_coef=0, normalize="dapo"),
        "dr_grpo": groups.loss("grpo", kl_coef=0, normalize="dr_grpo", constant_tokens=4),
    }
    for name, loss in found.items():
        assert loss.item() == pytest.approx(vector["expected"][f"loss_{name}"], rel=1e-9)


def test_v26_reinforce_pp_sums_the_same_token_rewards_as_ppo() -> None:
    """The vector's rewards of every token, summed to the end of each row; the second row is a token shorter."""
    vector = VECTORS["V26"]
    mask, lengths, (logp, ref) = ragged(vector, "logp", "ref_logp")
    reward = double([vector["inputs"]["score"]])
    groups = Groups([lengths], logp, behavior_token_logp=logp, ref_token_logp=ref, reward=reward)
    to_go = double(vector["expected"]["rewards"]).flip(1).cumsum(1).flip(1)[mask]
    near(groups.prepare("reinforce_pp", kl_coef=vector["params"]["kl_coef"]), whiten(to_go).tolist())


def test_v33_sft() -> None:
    rows = [double(values) for values in VECTORS["V33"]["inputs"]["token_logps"]]
    groups = Groups([[len(row)] for row in rows], torch.cat(rows))
    expected = VECTORS["V33"]["expected"]
    assert groups.loss("sft").item() == pytest.approx(expected["loss_token_mean"], rel=1e-9)
    assert groups.loss("sft", reduction="sequence").item() == pytest.approx(expected["loss_seq_sum"], rel=1e-9)


def test_v31_grpo() -> None:
    vector = VECTORS["V31"]
    mask, lengths, (new, old, ref) = ragged(vector, "new_logp", "old_logp", "ref_logp")
    advantage = double(vector["inputs"]["advantages"])[mask.nonzero()[:, 0]]
    groups = Groups([lengths], new.requires_grad_(), behavior_token_logp=old, ref_token_logp=ref, advantage=advantage)
    for name, parameters in (
        ("seq_mean_token_mean", {}),
        ("token_mean", {"normalize": "dapo"}),
        ("dr_grpo", {"normalize": "dr_grpo", "constant_tokens": 4}),
    ):
        loss = groups.loss("grpo", **parameters)
        assert loss.item() == pytest.approx(vector["expected"][f"loss_{name}"], rel=1e-9)
    slope = torch.autograd.grad(groups.loss("grpo"), new)[0]
    near(slope, double(vector["expected"]["grad_logp_seq_mean_token_mean"])[mask].tolist())


def test_v25_kl_metrics() -> None:
    vector = VECTORS["V25"]
    logp, ref = double(vector["inputs"]["logp"]), double(vector["inputs"]["ref_logp"])
    groups = Groups(
        [[len(logp)]],
        logp,
        behavior_token_logp=logp,
        ref_token_logp=ref,
        reward=double([[0.0]]),
        advantage=torch.zeros_like(logp),
    )
    found = groups.metrics("reinforce_pp")
    for name in ("k1", "k3"):
        assert found[f"kl/ref_{name}"] == pytest.approx(float(double(vector["expected"][name]).mean()), rel=1e-9)


def test_a_round_of_equal_rewards_teaches_nothing_exactly() -> None:
    groups = hand_made()
    groups.per_candidate["reward"] = double([[7.77, 7.77]])
    for name in ("rloo", "reinforce_pp", "grpo"):
        assert groups.prepare(name, kl_coef=0).eq(0).all()


def test_whitening_equal_numbers_divides_by_no_rounding_error() -> None:
    assert whiten(torch.full((7,), 7.77)).eq(0).all()
    assert whiten(torch.tensor([7.77, torch.nan, 1.0]), mask=torch.tensor([True, True, True])).isnan().any()
    assert whiten(torch.tensor([1.0, torch.nan]), mask=torch.tensor([False, False])).eq(0).all()
