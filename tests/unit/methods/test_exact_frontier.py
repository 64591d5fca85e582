"""No trained policy lies above the best reward that its KL allows; where everything is enumerated, that is exact.

Among all distributions with KL(π‖π_ref) ≤ κ the largest E[R] is that of π*_β ∝ π_ref exp(R/β), with β such that its KL
is κ. A point above would mean that a reward or a KL is computed wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from policy_world import World
from torch import Tensor

WORLD = World()
REFERENCE = WORLD.logp(WORLD.reference)
STEPS, COMPLETIONS = 60, 256
ON_POLICY = ("rloo", "reinforce_pp", "grpo")
ROUNDING = 1e-9


def optimum(beta: float) -> Tensor:
    """log π*_β of every completion."""
    return torch.log_softmax(REFERENCE + WORLD.reward / beta, dim=0)


def point(logp: Tensor) -> tuple[float, float]:
    """(KL to the reference, expected reward)."""
    return float(logp.exp() @ (logp - REFERENCE)), float(logp.exp() @ WORLD.reward)


def frontier(kl: float) -> float:
    """The largest expected reward within ``kl`` nats of the reference, by bisection of log β."""
    low, high = math.log(1e-3), math.log(1e9)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if point(optimum(math.exp(middle)))[0] < kl else (middle, high)
    return point(optimum(math.exp(high)))[1]


def dual(kl: float) -> float:
    """The same by weak duality: min over β of β log E_ref exp(R/β) + β κ, which no policy exceeds."""
    betas = torch.logspace(-2, 4, 20_001, dtype=torch.float64)[:, None]
    bounds = betas[:, 0] * torch.logsumexp(REFERENCE + WORLD.reward / betas, dim=1) + betas[:, 0] * kl
    return float(bounds.min())


@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0, 3.0])
def test_the_optimum_lies_on_the_frontier(beta: float) -> None:
    kl, reward = point(optimum(beta))
    assert frontier(kl) == pytest.approx(reward, abs=ROUNDING)
    assert dual(kl) == pytest.approx(reward, abs=1e-5)


def test_the_frontier_begins_at_the_reference_and_ends_at_the_best_completion() -> None:
    assert frontier(0.0) == pytest.approx(point(REFERENCE)[1], abs=1e-6)
    best = int(WORLD.reward.argmax())
    assert frontier(float(-REFERENCE[best])) == pytest.approx(float(WORLD.reward[best]), abs=1e-6)


def test_any_other_distribution_lies_below() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        noise = torch.randn(len(REFERENCE), generator=generator, dtype=torch.float64)
        kl, reward = point(torch.log_softmax(optimum(0.5) + 0.3 * noise, dim=0))
        assert reward < frontier(kl) - 1e-6


def trained(name: str, num_candidates: int, **parameters: Any) -> Iterator[tuple[float, float]]:
    """The policy after every step; policy gradients draw from it, the others from the reference."""
    theta = WORLD.reference_theta.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for step in range(STEPS):
        table = WORLD.table(theta)
        behavior = table.detach() if name in ON_POLICY else WORLD.reference
        drawn = WORLD.draw(behavior, COMPLETIONS, seed=step)
        if name == "dpo":  # chosen, rejected
            halves = zip(drawn[::2], drawn[1::2], strict=True)
            drawn = [one for pair in halves for one in sorted(pair, key=lambda n: -float(WORLD.reward[n]))]
        groups = WORLD.groups(drawn, num_candidates, behavior, table)
        if name in ON_POLICY:
            groups.prepare(name, **parameters)
        optimizer.zero_grad()
        groups.loss(name, **parameters).backward()
        optimizer.step()
        with torch.no_grad():
            yield point(WORLD.logp(WORLD.table(theta)))


@pytest.mark.parametrize(
    ("name", "num_candidates", "parameters"),
    [
        ("rloo", 4, {"kl_coef": 0.3}),
        ("rloo", 4, {"kl_coef": 0}),
        ("grpo", 4, {"kl_coef": 0.3}),
        ("grpo", 4, {"kl_coef": 0}),
        ("reinforce_pp", 1, {"kl_coef": 0.3}),
        ("dpo", 2, {"beta": 0.3}),
        ("exo_rw", 8, {"beta_pi": 1.0, "beta_r": 0.3}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_no_trained_policy_lies_above_the_frontier(name: str, num_candidates: int, parameters: dict[str, Any]) -> None:
    path = list(trained(name, num_candidates, **parameters))
    assert [reward - frontier(kl) for kl, reward in path if reward > frontier(kl) + ROUNDING] == []
    assert path[-1][1] > point(REFERENCE)[1] + 0.2 and path[-1][0] > 0.05  # it has learned something
