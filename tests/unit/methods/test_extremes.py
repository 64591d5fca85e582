"""Losses and gradients stay finite in float32 however far policy and reference are apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rayalign.methods import (
    dpo_loss,
    dpo_rw_loss,
    exo_loss,
    exo_pref_targets,
    grpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    mpo_loss,
    orpo_loss,
    ppo_policy_loss,
    reward_model_loss,
    robust_dpo_loss,
    simpo_loss,
    slic_loss,
)

MARGINS = [-800.0, -90.0, -1.0, 0.0, 1.0, 90.0, 800.0]
ZERO, ONES = torch.zeros(len(MARGINS), 2), torch.ones(len(MARGINS), 2)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "dpo": lambda logp: dpo_loss(logp, ZERO, beta=1.0),
    "cdpo": lambda logp: dpo_loss(logp, ZERO, beta=1.0, label_smoothing=0.1),
    "robust_dpo": lambda logp: robust_dpo_loss(logp, ZERO, beta=1.0, label_smoothing=0.1),
    "ipo": lambda logp: ipo_loss(logp, ZERO, ONES, tau=0.1, normalize="sum"),
    "hinge": lambda logp: hinge_loss(logp, ZERO, beta=1.0),
    "slic": lambda logp: slic_loss(logp, logp[:, 0], delta=1.0, reg_weight=0.5),
    "simpo": lambda logp: simpo_loss(logp, ONES, beta=1.0, gamma=0.5),
    "orpo": lambda logp: orpo_loss(-logp.abs() - 1e-30, ONES, weight=0.1),
    "exo_pref": lambda logp: exo_loss(logp, ZERO, exo_pref_targets(1e-3).to(logp).expand_as(logp), beta_pi=1.0),
    "exo_rw": lambda logp: exo_loss(logp, ZERO, logp.detach().flip(1), beta_pi=1.0, behavior_logp=ZERO),
    "dpo_rw": lambda logp: dpo_rw_loss(logp, ZERO, logp.detach().flip(1), beta_pi=1.0, beta_r=1.0),
    "mpo": lambda logp: mpo_loss(logp, tau=1.0, objective="prob"),
    "mpo-logprob": lambda logp: mpo_loss(logp, tau=1.0, objective="logprob"),
    "reward_model": lambda logp: reward_model_loss(logp, center=0.01),
    "kto": lambda logp: kto_loss(
        logp.flatten(),
        ZERO.flatten(),
        torch.arange(logp.numel()) % 2 == 0,
        torch.tensor(3.0),
        beta=1.0,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    ),
    "ppo": lambda logp: ppo_policy_loss(logp[:, 0], ZERO[:, 0], torch.arange(-3.0, 4.0)),
    "grpo-dual-clip": lambda logp: grpo_loss(
        logp[:, 0], ZERO[:, 0], logp[:, 0].detach(), torch.arange(-3.0, 4.0), dual_clip=3.0
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_finite(name: str) -> None:
    logp = torch.stack([torch.tensor(MARGINS), torch.zeros(len(MARGINS))], dim=1).requires_grad_()
    losses = LOSSES[name](logp)
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
    (gradient,) = torch.autograd.grad(losses.sum(), logp)
    assert torch.isfinite(gradient).all()


def test_dpo_saturates_at_the_right_values() -> None:
    logp = torch.tensor([[-800.0, 0.0], [800.0, 0.0]], requires_grad=True)
    losses = dpo_loss(logp, torch.zeros(2, 2), beta=1.0)
    assert losses.tolist() == [800.0, 0.0]
    assert torch.autograd.grad(losses.sum(), logp)[0][:, 0].tolist() == [-1.0, 0.0]


def test_odds_of_a_certain_response_are_finite() -> None:
    logp = torch.zeros(1, 2, requires_grad=True)
    loss = orpo_loss(logp, torch.ones(1, 2), weight=0.1)
    assert loss.item() == pytest.approx(0.1 * math.log(2))
    assert torch.isfinite(torch.autograd.grad(loss.sum(), logp)[0]).all()
