"""On a grid, the reward is the log of an optimum with two bumps over the reference. The policy is one Gaussian, which
has no two bumps. EXO on rewards and DPO on rewards learn it from groups of K samples of the reference. In a restricted
family the reverse KL to the optimum is smallest at one bump (*mode-seeking*), the forward KL at a wide Gaussian over
both. A seed changes the samples alone. Reverse KL is KL(π‖π\\*), forward KL is KL(π\\*‖π); E[r] − KL(π‖π_ref) is minus
the reverse KL.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rayalign.methods import dpo_rw_loss, exo_loss, exo_reward_targets

from .enumeration import kl
from .figures import band, color, finish
from .record import Claim, Experiment, Measured, Point, ahead
from .training import descend, generator

GRID = torch.linspace(-4, 4, 81, dtype=torch.float64)
SIZES = (2, 4, 8, 16)
STEPS, PROMPTS = 1500, 32
EXO, DPO = "exo_rw", "dpo_rw"


def gaussian(mean: Tensor, log_deviation: Tensor) -> Tensor:
    """log-probabilities of a Gaussian restricted to the grid."""
    return torch.log_softmax(-(((GRID - mean) / log_deviation.exp()) ** 2) / 2, dim=0)


def fixed(mean: float, deviation: float) -> Tensor:
    return gaussian(torch.tensor(mean), torch.tensor(math.log(deviation), dtype=torch.float64))


REFERENCE = fixed(0.0, 2.0)
OPTIMUM = torch.logaddexp(fixed(-1.0, 0.6) + math.log(0.8), fixed(2.0, 0.6) + math.log(0.2))
REWARD = OPTIMUM - REFERENCE


def loss(method: str, logp: Tensor, ref_logp: Tensor, reward: Tensor) -> Tensor:
    if method == EXO:
        return exo_loss(logp, ref_logp, exo_reward_targets(reward, 1.0), beta_pi=1.0).mean()
    return dpo_rw_loss(logp, ref_logp, reward, beta_pi=1.0, beta_r=1.0).mean()


def fit(seed: int, cells: Sequence[tuple[str, int]], steps: int = STEPS) -> list[Tensor]:
    """log π of each trained (method, K). Cells of one K see the same samples; Adam keeps all parameters apart."""
    random = generator(seed)
    means = torch.zeros(len(cells), dtype=torch.float64, requires_grad=True)
    log_deviations = torch.full((len(cells),), math.log(2.0), dtype=torch.float64, requires_grad=True)

    def policies() -> list[Tensor]:
        return [gaussian(*one) for one in zip(means, log_deviations, strict=True)]

    def step_loss(step: int) -> Tensor:
        drawn = {
            size: torch.multinomial(REFERENCE.exp(), PROMPTS * size, replacement=True, generator=random).view(-1, size)
            for size in SIZES
        }
        losses = [
            loss(method, logp[drawn[size]], REFERENCE[drawn[size]], REWARD[drawn[size]])
            for (method, size), logp in zip(cells, policies(), strict=True)
        ]
        return torch.stack(losses).sum()

    for _ in descend([means, log_deviations], step_loss, lr=1e-2, at=(steps,), cosine=True):
        pass
    return [policy.detach() for policy in policies()]


def quantities(policy: Tensor) -> dict[str, float]:
    mean = float(policy.exp() @ GRID)
    return {
        "reverse KL": kl(policy[None], OPTIMUM[None]),
        "forward KL": kl(OPTIMUM[None], policy[None]),
        "mean": mean,
        "deviation": math.sqrt(float(policy.exp() @ (GRID - mean) ** 2)),
    }


def measure(seed: int) -> tuple[Point, ...]:
    cells = list(itertools.product((EXO, DPO), SIZES))
    found = zip(cells, fit(seed, cells), strict=True)
    return tuple(Point(cell=method, at=size, values=quantities(policy)) for (method, size), policy in found)


def claims() -> tuple[Claim, ...]:
    found = [
        Claim(text=f"K = {size}: reverse KL, dpo_rw − exo_rw", value=ahead(DPO, EXO, "reverse KL", size))
        for size in SIZES
    ]
    for size in (8, 16):
        found += [
            Claim(text=f"K = {size}: forward KL, exo_rw − dpo_rw", value=ahead(EXO, DPO, "forward KL", size)),
            Claim(
                text=f"K = {size}: −deviation of exo_rw: on one bump",
                value=lambda seed, size=size: -seed.value(EXO, "deviation", size),
                above=-0.8,
            ),
            Claim(
                text=f"K = {size}: deviation of dpo_rw: over both",
                value=lambda seed, size=size: seed.value(DPO, "deviation", size),
                above=0.8,
            ),
        ]
    return tuple(found)


def draw(figure: Figure, seeds: Sequence[Measured]) -> None:
    left, right = figure.subplots(1, 2)
    for number, method in enumerate((EXO, DPO)):
        band(left, method, [[(p.at, p.values["reverse KL"]) for p in seed.path(method)] for seed in seeds], number)
        policy = fixed(seeds[0].value(method, "mean", 16), seeds[0].value(method, "deviation", 16))
        right.plot(GRID, policy.exp(), color=color(number))
    left.set_xscale("log", base=2)
    left.set_xticks(SIZES, [str(size) for size in SIZES])
    right.plot(GRID, OPTIMUM.exp(), color="black", linewidth=0.9, linestyle=":", label="optimum")
    right.plot(GRID, REFERENCE.exp(), color="grey", linewidth=0.9, linestyle="--", label="reference")
    finish(left, "candidates K", "reverse KL to the optimum")
    finish(right, "completion", "probability (K = 16)")


READING = (
    "EXO takes the larger bump from K = 8 on and is nearer to the optimum, in reverse KL, from K = 4 on. DPO on "
    "rewards stays wide, which is the better forward KL. With pairs, K = 2, the order is the other way round: "
    "what EXO on rewards promises needs groups."
)
EXPERIMENT = Experiment(
    name="e1",
    title="EXO seeks a mode, DPO on rewards covers",
    about=__doc__ or "",
    reading=READING,
    at="K",
    measure=measure,
    claims=claims(),
    draw=draw,
    caption="Left: reverse KL to the optimum by K. Right: the optimum, the reference and Gaussians with the mean and "
    "deviation that one seed found.",
)
