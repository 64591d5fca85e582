"""EXO against DPO-rw where everything can be enumerated: which Kullback-Leibler divergence each one follows.

EXO-rw follows the reverse KL to the optimum of RLHF's objective, DPO-rw the forward KL. The difference shows in a
policy family that cannot represent the optimum, and from K = 4 candidates on; at K = 2 it is absent or reversed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rayalign.functional.kl import exact_kl
from rayalign.methods import dpo_rw_loss, exo_loss, exo_reward_targets

GRID = torch.linspace(-4, 4, 81, dtype=torch.float64)
STEPS = 1500


def log_gaussian(mean: Tensor, log_deviation: Tensor) -> Tensor:
    """A Gaussian restricted to the grid."""
    return torch.log_softmax(-(((GRID - mean) / log_deviation.exp()) ** 2) / 2, dim=0)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


REFERENCE = log_gaussian(scalar(0.0), scalar(math.log(2.0)))
# Two bumps, which no single Gaussian is.
OPTIMUM = torch.logaddexp(
    log_gaussian(scalar(-1.0), scalar(math.log(0.6))) + math.log(0.8),
    log_gaussian(scalar(2.0), scalar(math.log(0.6))) + math.log(0.2),
)
REWARD = OPTIMUM - REFERENCE


@dataclass(frozen=True, slots=True)
class Fit:
    reverse_kl: float
    forward_kl: float
    deviation: float


def fit(method: str, num_candidates: int, seed: int = 0) -> Fit:
    """Train a Gaussian on groups of K samples of the reference, scored by log(optimum / reference)."""
    generator = torch.Generator().manual_seed(seed)
    mean, log_deviation = scalar(0.0).requires_grad_(), scalar(math.log(2.0)).requires_grad_()
    optimizer = torch.optim.Adam([mean, log_deviation], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        drawn = torch.multinomial(REFERENCE.exp(), 32 * num_candidates, replacement=True, generator=generator)
        drawn = drawn.view(32, num_candidates)
        logp, ref_logp, reward = log_gaussian(mean, log_deviation)[drawn], REFERENCE[drawn], REWARD[drawn]
        if method == "exo_rw":
            loss = exo_loss(logp, ref_logp, exo_reward_targets(reward, 1.0), beta_pi=1.0).mean()
        else:
            loss = dpo_rw_loss(logp, ref_logp, reward, beta_pi=1.0, beta_r=1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    policy = log_gaussian(mean, log_deviation).detach()
    spread = math.sqrt(float(policy.exp() @ GRID**2 - (policy.exp() @ GRID) ** 2))
    return Fit(
        reverse_kl=exact_kl(policy[None], OPTIMUM[None]).item(),
        forward_kl=exact_kl(OPTIMUM[None], policy[None]).item(),
        deviation=spread,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "num_candidates", "expected"),
    [
        ("exo_rw", 4, Fit(0.466, 0.337, 1.19)),
        ("exo_rw", 8, Fit(0.215, 1.620, 0.65)),
        ("exo_rw", 16, Fit(0.214, 1.732, 0.63)),
        ("dpo_rw", 4, Fit(0.507, 0.325, 1.43)),
        ("dpo_rw", 8, Fit(0.501, 0.316, 1.40)),
        ("dpo_rw", 16, Fit(0.499, 0.314, 1.39)),
    ],
)
def test_a_restricted_policy_seeks_the_mode_under_exo_and_covers_under_dpo_rw(
    method: str, num_candidates: int, expected: Fit
) -> None:
    found = fit(method, num_candidates)
    assert found.reverse_kl == pytest.approx(expected.reverse_kl, abs=0.02)
    assert found.forward_kl == pytest.approx(expected.forward_kl, abs=0.05)
    assert found.deviation == pytest.approx(expected.deviation, abs=0.05)


def cosines(num_candidates: int) -> tuple[float, float, float]:
    """Cosines of the expected gradients: EXO to reverse KL, DPO-rw to forward KL, DPO-rw to reverse KL."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    parameters = 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)
    parameters.requires_grad_()
    log_ref = torch.log_softmax(0.5 * torch.randn(32, generator=generator, dtype=torch.float64), 0)
    reward = torch.randn(32, generator=generator, dtype=torch.float64)
    logp, optimum = torch.log_softmax(features @ parameters, 0), torch.log_softmax(log_ref + reward, 0)
    drawn = torch.multinomial(log_ref.exp(), 400_000, replacement=True, generator=generator).view(-1, num_candidates)
    group = logp[drawn], log_ref[drawn]
    losses = {
        "exo": exo_loss(*group, exo_reward_targets(reward[drawn], 1.0), beta_pi=1.0).mean(),
        "dpo_rw": dpo_rw_loss(*group, reward[drawn], beta_pi=1.0, beta_r=1.0).mean(),
        "reverse": exact_kl(logp[None], optimum[None]).sum(),
        "forward": exact_kl(optimum[None], logp[None]).sum(),
    }
    slopes = {name: torch.autograd.grad(loss, parameters, retain_graph=True)[0] for name, loss in losses.items()}

    def cosine(a: str, b: str) -> float:
        return torch.cosine_similarity(slopes[a], slopes[b], dim=0).item()

    return cosine("exo", "reverse"), cosine("dpo_rw", "forward"), cosine("dpo_rw", "reverse")


@pytest.mark.slow
def test_the_gradient_of_exo_tends_to_that_of_the_reverse_kl() -> None:
    exo, forward, crossed = zip(*(cosines(size) for size in (2, 4, 8, 16, 64)), strict=True)
    assert list(exo) == sorted(exo)
    assert exo[3] > 0.99
    assert exo[4] > 0.999
    assert list(forward) == sorted(forward)
    assert forward[4] > 0.999
    assert crossed[4] < crossed[1] < 0.98  # DPO-rw moves away from the reverse KL as K grows
