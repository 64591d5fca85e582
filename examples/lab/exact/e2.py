"""A linear-softmax policy over 32 outcomes, with a random reward, reference and point in its six parameters for every
seed. Compared are gradients: of the expected loss over groups of K samples, with those of KL(π‖π\\*) and KL(π\\*‖π), by
cosine. KL(π‖π\\*) is minus the objective of RLHF up to a constant, so the first is agreement with the RL gradient. For
K = 2 and 4 every group is enumerated; from 8 on the expectation is over four hundred thousand samples. *own* draws
candidates from the policy: with EXO's behavior correction, and as if the reference had drawn them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rayalign.functional.advantages import rloo_advantage
from rayalign.functional.kl import exact_kl
from rayalign.methods import dpo_rw_loss, exo_loss, exo_reward_targets, reinforce_loss

from .enumeration import optimum
from .figures import band, finish
from .record import Claim, Experiment, Measured, Point, ahead
from .training import generator, normal

OUTCOMES, PARAMETERS = 32, 6
SIZES = (2, 4, 8, 16, 64)
ENUMERATED, DRAWS = 4, 400_000
EXO, DPO, CORRECTED, UNCORRECTED = "exo_rw", "dpo_rw", "exo_rw, own, corrected", "exo_rw, own, uncorrected"
REVERSE, FORWARD = "cosine with ∇ KL(π‖π*)", "cosine with ∇ KL(π*‖π)"
RLOO = "distance from RLOO's gradient"


@dataclass(frozen=True, slots=True)
class World:
    features: Tensor
    theta: Tensor
    ref_logp: Tensor
    reward: Tensor

    @property
    def logp(self) -> Tensor:
        return torch.log_softmax(self.features @ self.theta, dim=0)


def world(seed: int) -> World:
    random = generator(seed)
    features, theta = normal(random, OUTCOMES, PARAMETERS), 0.3 * normal(random, PARAMETERS)
    ref_logp = torch.log_softmax(0.5 * normal(random, OUTCOMES), dim=0)
    return World(features, theta.requires_grad_(), ref_logp, normal(random, OUTCOMES))


def groups(logp: Tensor, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Groups [G, K] and the share of each, [G]: every multiset with its probability, or samples in equal shares."""
    logp = logp.detach()
    if size > ENUMERATED:
        drawn = torch.multinomial(logp.exp(), DRAWS, replacement=True, generator=random).view(-1, size)
        return drawn, torch.full((len(drawn),), 1 / len(drawn), dtype=torch.float64)
    every = torch.combinations(torch.arange(len(logp)), r=size, with_replacement=True)
    return every, (logp[every].sum(dim=1) + log_orders(every)).exp()


def log_orders(multisets: Tensor) -> Tensor:
    """log of the number of orders of each row, whose entries ascend: K! / Π (repetitions)!."""
    size = multisets.shape[1]
    run = torch.ones(len(multisets), dtype=torch.float64)
    repeated = torch.zeros(len(multisets), dtype=torch.float64)
    for k in range(1, size):
        run = torch.where(multisets[:, k] == multisets[:, k - 1], run + 1, 1.0)
        repeated += run.log()
    return torch.lgamma(torch.tensor(size + 1.0, dtype=torch.float64)) - repeated


def gradient(of: World, method: str, size: int, random: torch.Generator) -> Tensor:
    """∇ of the expected loss."""
    logp, own = of.logp, method in (CORRECTED, UNCORRECTED)
    drawn, share = groups(logp if own else of.ref_logp, size, random)
    group = logp[drawn], of.ref_logp[drawn]
    if method == DPO:
        losses = dpo_rw_loss(*group, of.reward[drawn], beta_pi=1.0, beta_r=1.0)
    else:
        behavior = group[0].detach() if method == CORRECTED else None
        targets = exo_reward_targets(of.reward[drawn], 1.0)
        losses = exo_loss(*group, targets, beta_pi=1.0, behavior_logp=behavior)
    return torch.autograd.grad((losses * share).sum(), of.theta)[0]


def rloo_gradient(of: World, size: int, random: torch.Generator) -> Tensor:
    """(K − 1)/K times that of RLOO with the KL in its reward, on the groups that ``CORRECTED`` has."""
    logp = of.logp
    drawn, share = groups(logp, size, random)
    earned = of.reward[drawn] - (logp.detach() - of.ref_logp)[drawn]
    losses = reinforce_loss(logp[drawn].flatten(), rloo_advantage(earned).flatten()).view_as(earned).mean(dim=1)
    return (size - 1) / size * torch.autograd.grad((losses * share).sum(), of.theta)[0]


def measure(seed: int) -> tuple[Point, ...]:
    of = world(seed)
    best = optimum(of.ref_logp, of.reward, 1.0)
    reverse = torch.autograd.grad(exact_kl(of.logp[None], best[None]).sum(), of.theta)[0]
    forward = torch.autograd.grad(exact_kl(best[None], of.logp[None]).sum(), of.theta)[0]
    points = []
    for number, method in enumerate((EXO, DPO, CORRECTED, UNCORRECTED)):
        for size in SIZES:
            found = gradient(of, method, size, generator(seed, number, size))
            values = {
                REVERSE: torch.cosine_similarity(found, reverse, dim=0).item(),
                FORWARD: torch.cosine_similarity(found, forward, dim=0).item(),
            }
            if method == CORRECTED:
                rloo = rloo_gradient(of, size, generator(seed, number, size))
                values[RLOO] = float((found - rloo).norm() / rloo.norm())
            points.append(Point(cell=method, at=size, values=values))
    return tuple(points)


def rise(cell: str, quantity: str, sign: float = 1.0) -> Callable[[Measured], float]:
    """The smallest step from one K to the next, up where ``sign`` is 1."""

    def value(seed: Measured) -> float:
        found = [seed.value(cell, quantity, size) for size in SIZES]
        return min(sign * (after - before) for before, after in pairwise(found))

    return value


def claims() -> tuple[Claim, ...]:
    def cosine(cell: str, quantity: str, size: int) -> Callable[[Measured], float]:
        return lambda seed: seed.value(cell, quantity, size)

    return (
        Claim(text="exo_rw, reverse KL: smallest rise from one K to the next", value=rise(EXO, REVERSE)),
        Claim(text="K = 16: exo_rw, reverse KL", value=cosine(EXO, REVERSE, 16), above=0.99),
        Claim(text="K = 64: exo_rw, reverse KL", value=cosine(EXO, REVERSE, 64), above=0.999),
        Claim(text="K = 2: reverse KL, exo_rw − dpo_rw", value=ahead(EXO, DPO, REVERSE, 2)),
        Claim(text="K = 4: reverse KL, exo_rw − dpo_rw", value=ahead(EXO, DPO, REVERSE, 4)),
        Claim(text="K = 64: reverse KL, exo_rw − dpo_rw", value=ahead(EXO, DPO, REVERSE, 64)),
        Claim(
            text="dpo_rw, reverse KL: K = 4 − K = 64",
            value=lambda seed: seed.value(DPO, REVERSE, 4) - seed.value(DPO, REVERSE, 64),
        ),
        Claim(text="K = 64: dpo_rw, forward KL", value=cosine(DPO, FORWARD, 64), above=0.99),
        *(
            Claim(
                text=f"K = {size}: own samples, corrected: −distance from (K − 1)/K of RLOO's gradient",
                value=lambda seed, size=size: -seed.value(CORRECTED, RLOO, size),
                above=-1e-9,
            )
            for size in (2, 64)
        ),
        Claim(text="K = 2: own samples, corrected, reverse KL", value=cosine(CORRECTED, REVERSE, 2), above=0.999),
        Claim(text="K = 64: own samples, corrected, reverse KL", value=cosine(CORRECTED, REVERSE, 64), above=0.999),
        Claim(
            text="K = 64: own samples, reverse KL, corrected − uncorrected",
            value=ahead(CORRECTED, UNCORRECTED, REVERSE, 64),
        ),
        Claim(
            text="own samples, uncorrected: smallest fall from one K to the next",
            value=rise(UNCORRECTED, REVERSE, -1.0),
        ),
    )


def draw(figure: Figure, seeds: Sequence[Measured]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, quantity in ((left, REVERSE), (right, FORWARD)):
        for number, cell in enumerate((EXO, DPO, CORRECTED, UNCORRECTED)):
            band(axes, cell, [[(p.at, p.values[quantity]) for p in seed.path(cell)] for seed in seeds], number)
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        finish(axes, "candidates K", quantity)


READING = (
    "EXO's gradient turns towards that of the RL objective as K grows. At K = 64 it is nearer to it than that of "
    "DPO on rewards, on every seed. How many candidates that takes depends on the world: on some seeds sixteen "
    "are not enough for a cosine of 0.99. With pairs DPO's gradient is the nearer one. On the policy's own "
    "samples, corrected by their behavior log-probs, EXO is RLOO times (K − 1)/K, at any K and to rounding."
)
EXPERIMENT = Experiment(
    name="e2",
    title="EXO follows the RL gradient as K grows",
    about=__doc__ or "",
    reading=READING,
    at="K",
    measure=measure,
    claims=claims(),
    draw=draw,
    caption="Cosine of each expected gradient with that of the reverse KL (left) and of the forward KL (right), by K.",
    digits=4,
)
