"""Where objectives coincide, and what they are at the start of training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayalign.functional.advantages import rloo_advantage
from rayalign.methods import (
    dpo_loss,
    dpo_rw_loss,
    exo_loss,
    exo_pref_targets,
    exo_reward_targets,
    hinge_loss,
    ipo_loss,
    kto_loss,
    mpo_loss,
    ppo_policy_loss,
    reinforce_loss,
    robust_dpo_loss,
    simpo_loss,
    wpo_pair_weight,
    wpo_weight,
)

ZERO = torch.zeros(3, 2, dtype=torch.float64)
numbers = st.floats(-30, 0)
pairs = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4)
betas = st.floats(0.01, 2)


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_losses_at_policy_equal_to_reference() -> None:
    logp = double([[-3.0, -5.0], [-1.0, -0.5], [-20.0, -7.0]])
    ln2 = torch.full((3,), math.log(2), dtype=torch.float64)
    close(dpo_loss(logp, logp, beta=0.1), ln2)
    close(dpo_loss(logp, logp, beta=3.0, label_smoothing=0.3), ln2)
    close(robust_dpo_loss(logp, logp, beta=0.1, label_smoothing=0.2), ln2)
    close(hinge_loss(logp, logp, beta=0.1), torch.ones_like(ln2))
    close(ipo_loss(logp, logp, logp, tau=0.1, normalize="sum"), torch.full_like(ln2, 25.0))
    close(mpo_loss(logp, tau=1.0, objective="prob", ref_logp=logp), torch.full_like(ln2, -0.5))
    close(mpo_loss(logp, tau=1.0, objective="logprob", ref_logp=logp), ln2)
    # KL((½, ½) ‖ (1−ε, ε)) = −log 2 − ½ log ε(1−ε)
    eps = 1e-3
    kl = torch.full_like(ln2, -math.log(2) - 0.5 * math.log(eps * (1 - eps)))
    close(exo_loss(logp, logp, exo_pref_targets(eps).expand(3, 2), beta_pi=0.1), kl)
    close(
        kto_loss(
            logp[:, 0],
            logp[:, 0],
            torch.tensor([True, False, True]),
            double(0.0),
            beta=0.1,
            desirable_weight=1.0,
            undesirable_weight=4 / 3,
        ),
        double([0.5, 2 / 3, 0.5]),
    )


@pytest.mark.parametrize(("eps", "slope"), [(1e-3, -1.7267), (4.5397868702434395e-05, -2.5)])
def test_first_steps_of_exo_are_larger_than_those_of_dpo(eps: float, slope: float) -> None:
    """At h = 0 the gradient is −logit(1−ε)/4, where DPO's is −1/2."""
    policy_logp = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    exo = exo_loss(policy_logp, ZERO[:1], exo_pref_targets(eps)[None], beta_pi=1.0).sum()
    dpo = dpo_loss(policy_logp, ZERO[:1], beta=1.0).sum()
    assert torch.autograd.grad(exo, policy_logp)[0][0, 0].item() == pytest.approx(slope, abs=1e-4)
    assert torch.autograd.grad(dpo, policy_logp)[0][0, 0].item() == -0.5


@settings(max_examples=40, deadline=None)
@given(policy=pairs, beta=betas, eps=st.floats(1e-4, 0.49))
def test_pairwise_family(policy: list[tuple[float, float]], beta: float, eps: float) -> None:
    logp = double(policy)
    ref = torch.full_like(logp, -2.0)
    plain = dpo_loss(logp, ref, beta=beta)
    flipped = dpo_loss(logp.flip(1), ref, beta=beta)
    close(robust_dpo_loss(logp, ref, beta=beta, label_smoothing=0.0), plain)
    close(dpo_loss(logp, ref, beta=beta, label_smoothing=eps), (1 - eps) * plain + eps * flipped)
    # Robust DPO is the estimate whose mean over flips is the loss on clean labels.
    robust, turned = (robust_dpo_loss(values, ref, beta=beta, label_smoothing=eps) for values in (logp, logp.flip(1)))
    close((1 - eps) * robust + eps * turned, plain)
    # MPO's logprob objective is DPO, with or without reference; a smoothed label only rescales the prob objective.
    close(mpo_loss(logp, tau=beta, objective="logprob", ref_logp=ref), plain)
    prob = mpo_loss(logp, tau=beta, objective="prob")
    close(mpo_loss(logp, tau=beta, objective="prob", label_smoothing=eps), (1 - 2 * eps) * prob - eps)
    # SimPO without target margin, on one-token responses, is reference-free DPO.
    ones = torch.ones_like(logp)
    close(simpo_loss(logp, ones, beta=beta, gamma=0.0), dpo_loss(logp, torch.zeros_like(logp), beta=beta))


@settings(max_examples=40, deadline=None)
@given(policy=pairs, beta=betas, eps=st.floats(1e-4, 0.49), beta_r=st.floats(0.05, 2))
def test_group_objectives_at_two_candidates(
    policy: list[tuple[float, float]], beta: float, eps: float, beta_r: float
) -> None:
    logp = double(policy)
    ref = torch.full_like(logp, -2.0)
    reward = double([beta_r * math.log((1 - eps) / eps), 0.0]).expand_as(logp)
    from_pair = exo_loss(logp, ref, exo_pref_targets(eps).expand_as(logp), beta_pi=beta)
    close(exo_loss(logp, ref, exo_reward_targets(reward, beta_r), beta_pi=beta), from_pair)
    close(
        dpo_rw_loss(logp, ref, reward, beta_pi=beta, beta_r=beta_r),
        dpo_loss(logp, ref, beta=beta, label_smoothing=eps),
    )
    certain = double([1e4, 0.0]).expand_as(logp)
    close(dpo_rw_loss(logp, ref, certain, beta_pi=beta, beta_r=1.0), dpo_loss(logp, ref, beta=beta))


@settings(max_examples=40, deadline=None)
@given(
    real=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), seed=st.integers(0, 2**20)
)
def test_ragged_groups_equal_each_group_alone(real: list[list[bool]], seed: int) -> None:
    """Masked candidates hold NaN; a group of K real candidates is the same as a batch of it alone."""
    mask = torch.tensor(real)
    generator = torch.Generator().manual_seed(seed)
    policy, ref, behavior, reward = torch.randn(4, *mask.shape, generator=generator, dtype=torch.float64)
    for values in (policy, ref, behavior, reward):
        values[~mask] = math.nan
    policy.requires_grad_()
    exo = exo_loss(
        policy, ref, exo_reward_targets(reward, 0.3), beta_pi=0.7, behavior_logp=behavior, candidate_mask=mask
    )
    dpo_rw = dpo_rw_loss(policy, ref, reward, beta_pi=0.7, beta_r=0.3, candidate_mask=mask)
    (gradient,) = torch.autograd.grad((exo + dpo_rw)[mask.any(dim=1)].sum(), policy)
    assert gradient[~mask].eq(0).all()
    for b, keep in enumerate(mask):
        if not keep.any():
            continue
        alone = [values[b, keep][None].detach() for values in (policy, ref, behavior, reward)]
        leaf = alone[0].requires_grad_()
        exo_alone = exo_loss(leaf, alone[1], exo_reward_targets(alone[3], 0.3), beta_pi=0.7, behavior_logp=alone[2])
        dpo_rw_alone = dpo_rw_loss(leaf, alone[1], alone[3], beta_pi=0.7, beta_r=0.3)
        close(exo[b], exo_alone[0])
        close(dpo_rw[b], dpo_rw_alone[0])
        close(gradient[b, keep], torch.autograd.grad((exo_alone + dpo_rw_alone).sum(), leaf)[0][0])


def test_exo_on_the_policy_s_own_candidates_is_reinforce() -> None:
    """(K−1)/K times RLOO with the KL in the reward, per candidate of the group."""
    generator = torch.Generator().manual_seed(3)
    policy, ref, reward = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    policy.requires_grad_()
    loss = exo_loss(policy, ref, reward / 0.5, beta_pi=1.0, behavior_logp=policy.detach()).sum()
    shaped = reward / 0.5 - (policy - ref).detach()
    rloo = reinforce_loss(policy.flatten(), rloo_advantage(shaped).flatten()).sum() / 5
    expected = 4 / 5 * torch.autograd.grad(rloo, policy)[0]
    close(torch.autograd.grad(loss, policy)[0], expected)


def test_clipped_ratio_at_the_behavior_policy_has_the_gradient_of_reinforce() -> None:
    logp = double([-1.0, -2.0, -0.5]).requires_grad_()
    advantage = double([0.7, -1.3, 0.0])
    clipped = ppo_policy_loss(logp, logp.detach(), advantage, clip=0.2).sum()
    plain = reinforce_loss(logp, advantage).sum()
    close(torch.autograd.grad(clipped, logp)[0], torch.autograd.grad(plain, logp)[0])


def test_weights_of_certain_tokens_are_one_under_every_alignment() -> None:
    zero, candidate_of = torch.zeros(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    for alignment in ("none", "greedy", "sampled"):
        weight = wpo_weight(zero, candidate_of, num_candidates=2, alignment=alignment, log_sum_p2=zero, log_max_p=zero)
        assert weight.tolist() == [1, 1]
        assert wpo_pair_weight(weight[None], clamp="product").tolist() == [1]
