"""Mistakes found in public implementations of these methods, each as a test that this package does not make it.

clamp of WPO's weight dropped                    test_wpo_weight_is_clamped_on_the_product
WPO's statistics in bfloat16                     test_wpo_statistics_of_bfloat16_logits_are_taken_in_float32
WPO's weight without the last token              test_wpo_weight_counts_the_last_token (and vector V21)
weighting + SFT loss crashes                     test_a_loss_without_pairs_is_refused_not_broken
options ignored silently                         test_configs.py::test_no_option_is_ignored
cDPO gone from "sigmoid"                         test_label_smoothing_of_dpo_is_cdpo_and_not_robust_dpo
documented EXO configuration cannot run          test_exo_runs_with_its_defaults_and_keeps_them
IPO of sums and of means under one name          test_ipo_names_its_normalization
SimPO with reference and without margin          test_simpo_has_a_margin_and_no_reference
score one position after the last token          functional/test_advantages.py, vector V26
label-smoothing flag without effect              test_configs.py::test_no_option_is_ignored
log-probabilities summed in float16              functional/test_logprobs.py
batch changed in place, ties to the second       test_tied_rewards_prefer_no_one, test_losses_leave_their_inputs_alone
only one alignment, only one base loss           test_check_method.py::test_every_weighted_method_passes
weight exp(Σ log π) with gradient                test_wpo_weight_of_a_long_response_is_not_zero
EXO symmetric in chosen and rejected             test_exo_pulls_towards_chosen_from_either_side
k1 as a loss, clamped estimators                 functional/test_kl.py
dual clipping always on, epsilon in means        test_dual_clipping_is_off_unless_asked_for, functional/test_masked.py
constant rewards divided by rounding errors      functional/test_advantages.py
"""

from __future__ import annotations

import math

import pytest
import torch

from rayalign.errors import UserError
from rayalign.functional.logprobs import log_max_p, log_sum_p2, token_logp
from rayalign.methods import (
    WPOWeighting,
    compose,
    dpo_loss,
    dpo_rw_loss,
    exo_loss,
    exo_pref_targets,
    exo_reward_targets,
    ipo_loss,
    ppo_policy_loss,
    resolve,
    robust_dpo_loss,
    simpo_loss,
    wpo_pair_weight,
    wpo_weight,
)

ONE_CANDIDATE = torch.zeros(3, dtype=torch.long)


def test_wpo_weight_is_clamped_on_the_product() -> None:
    assert WPOWeighting().clamp == "product"
    assert wpo_pair_weight(torch.tensor([[1.7, 1.3]]), clamp=WPOWeighting().clamp).tolist() == [1.0]
    assert wpo_pair_weight(torch.tensor([[1.7, 0.5]]), clamp="product").item() == pytest.approx(0.85)


def test_wpo_statistics_of_bfloat16_logits_are_taken_in_float32() -> None:
    logits = 4 * torch.randn(64, 2000, generator=torch.Generator().manual_seed(0))
    rounded = logits.to(torch.bfloat16)
    exact = rounded.double()
    for statistic in (log_sum_p2, log_max_p):
        assert statistic(rounded).dtype == torch.float32
        assert (statistic(rounded) - statistic(exact)).abs().max() < 1e-4
    naive = torch.logsumexp(2 * rounded, -1) - 2 * torch.logsumexp(rounded, -1)
    assert (naive - log_sum_p2(exact)).abs().max() > 0.02


def test_wpo_weight_counts_the_last_token() -> None:
    logp = torch.tensor([-0.1, -0.2, -3.0], dtype=torch.float64)
    weight = wpo_weight(logp, ONE_CANDIDATE, num_candidates=1, alignment="none")
    assert weight.item() == pytest.approx(math.exp(-1.1))


def test_wpo_weight_of_a_long_response_is_not_zero() -> None:
    """The mean over tokens, detached: 200 tokens at −1.5 nats weigh e^−1.5, not e^−300."""
    logp = torch.full((200,), -1.5, requires_grad=True)
    weight = wpo_weight(logp, torch.zeros(200, dtype=torch.long), num_candidates=1, alignment="none")
    assert weight.item() == pytest.approx(math.exp(-1.5), rel=1e-5)
    assert not weight.requires_grad


def test_wpo_asks_for_the_statistic_that_its_alignment_needs() -> None:
    with pytest.raises(TypeError, match="alignment 'sampled' needs log_sum_p2"):
        wpo_weight(torch.zeros(3), ONE_CANDIDATE, num_candidates=1, alignment="sampled")


def test_a_peaked_policy_can_weigh_more_than_one_only_under_sampled_alignment() -> None:
    """A likely token over a flat tail: p / Σp² is near √V / 2 at most; p / max p never exceeds 1."""
    vocabulary = 10_000
    logits = torch.zeros(1, vocabulary, dtype=torch.float64)
    logits[0, 0] = math.log(math.sqrt(vocabulary))
    logp = token_logp(logits, torch.tensor([0]))
    arguments = {"num_candidates": 1, "log_sum_p2": log_sum_p2(logits), "log_max_p": log_max_p(logits)}
    sampled = wpo_weight(logp, torch.zeros(1, dtype=torch.long), alignment="sampled", **arguments)
    greedy = wpo_weight(logp, torch.zeros(1, dtype=torch.long), alignment="greedy", **arguments)
    assert sampled.item() == pytest.approx(math.sqrt(vocabulary) / 2, rel=0.02)
    assert greedy.item() == 1.0


def test_a_loss_without_pairs_is_refused_not_broken() -> None:
    with pytest.raises(UserError, match="'sft' learns from neither"):
        compose(resolve("sft"), WPOWeighting())


def test_label_smoothing_of_dpo_is_cdpo_and_not_robust_dpo() -> None:
    policy_logp, ref_logp = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -1.0]])
    smoothed = dpo_loss(policy_logp, ref_logp, beta=1.0, label_smoothing=0.1).item()
    z = 3.0
    assert smoothed == pytest.approx(0.9 * math.log1p(math.exp(-z)) + 0.1 * math.log1p(math.exp(z)))
    assert smoothed != pytest.approx(dpo_loss(policy_logp, ref_logp, beta=1.0).item())
    assert smoothed != pytest.approx(robust_dpo_loss(policy_logp, ref_logp, beta=1.0, label_smoothing=0.1).item())


def test_exo_runs_with_its_defaults_and_keeps_them() -> None:
    config = resolve("exo_pref").config()
    assert config.label_smoothing == 1e-3
    assert exo_pref_targets(config.label_smoothing).softmax(0).tolist() == pytest.approx([0.999, 0.001])


def test_ipo_names_its_normalization() -> None:
    policy_logp, ref_logp = torch.tensor([[-10.0, -12.0]]), torch.tensor([[-14.0, -10.0]])
    length = torch.tensor([[4, 2]])
    assert ipo_loss(policy_logp, ref_logp, length, tau=0.1, normalize="sum").item() == 1.0  # (6 − 5)²
    assert ipo_loss(policy_logp, ref_logp, length, tau=0.1, normalize="mean").item() == 9.0  # (1 + 1 − 5)²


def test_simpo_has_a_margin_and_no_reference() -> None:
    simpo = resolve("simpo")
    assert simpo.needs == frozenset()
    assert simpo.config().gamma > 0
    value = simpo_loss(torch.tensor([[-4.0, -9.0]]), torch.tensor([[4, 3]]), beta=2.0, gamma=1.0)
    assert value.item() == pytest.approx(math.log1p(math.exp(-(2 * 2 - 1))))


def test_exo_pulls_towards_chosen_from_either_side() -> None:
    policy_logp = torch.tensor([[-2.0, 0.0], [0.0, 0.0], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    targets = exo_pref_targets(1e-3).expand(3, 2)
    losses = exo_loss(policy_logp, torch.zeros_like(policy_logp), targets, beta_pi=1.0)
    (gradient,) = torch.autograd.grad(losses.sum(), policy_logp)
    assert (gradient[:, 0] < 0).all()
    torch.testing.assert_close(gradient[:, 0], -gradient[:, 1])
    assert losses[0] > losses[2]


def test_tied_rewards_prefer_no_one() -> None:
    reward = torch.tensor([[2.0, 2.0, 2.0]])
    assert exo_reward_targets(reward, 0.5).softmax(1).tolist() == [pytest.approx([1 / 3] * 3)]
    policy_logp = torch.zeros(1, 3, requires_grad=True)
    for losses in (
        exo_loss(policy_logp, torch.zeros(1, 3), exo_reward_targets(reward, 0.5), beta_pi=0.5),
        dpo_rw_loss(policy_logp, torch.zeros(1, 3), reward, beta_pi=0.5, beta_r=0.5),
    ):
        assert torch.autograd.grad(losses.sum(), policy_logp)[0].abs().max() < 1e-7


def test_losses_leave_their_inputs_alone() -> None:
    inputs = list(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)))
    before = [values.clone() for values in inputs]
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    exo_loss(*inputs, beta_pi=0.5, behavior_logp=inputs[1], candidate_mask=mask)
    dpo_rw_loss(*inputs, beta_pi=0.5, beta_r=0.5, candidate_mask=mask)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


def test_dual_clipping_is_off_unless_asked_for() -> None:
    logp, behavior, advantage = torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([-1.0])
    assert ppo_policy_loss(logp, behavior, advantage).item() == pytest.approx(math.exp(2))
    assert ppo_policy_loss(logp, behavior, advantage, dual_clip=3.0).item() == 3.0
