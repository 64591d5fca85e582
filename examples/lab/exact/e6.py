"""One deterministic pair among eight replies, a tabular policy that begins at the reference, Adam on the whole batch.
The margin is how far log π(chosen) − log π(rejected) has moved. Where a finite optimum exists it is known: logit(1 −
ε)/β for cDPO and EXO on pairs, 1/(2τ) for IPO, 1/β for hinge. MPO with the reference's likelihood as regulariser, of
weight λ, has the fixed point π(y) = π_ref(y) ± (τ/λ) s(h) s(−h). A seed changes the reference and the pair. In a
tabular policy the margins of methods with a reference do not depend on these: their seeds agree to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rayalign.methods import (
    dpo_loss,
    exo_loss,
    exo_pref_targets,
    hinge_loss,
    ipo_loss,
    margin,
    mpo_loss,
    robust_dpo_loss,
    sft_loss,
)

from .enumeration import kl
from .figures import band, finish
from .record import Claim, Experiment, Measured, Point
from .training import descend, generator, normal, trainable

REPLIES, BETA, TAU, SMOOTHING, IPO_TAU, WEIGHT = 8, 0.5, 0.5, 0.1, 0.1, 1.0
AT = (50, 100, 200, 400, 800, 1600)
REGULARISED = "mpo + reference term"
Loss = Callable[[Tensor, Tensor], Tensor]
LOGIT = math.log((1 - SMOOTHING) / SMOOTHING) / BETA
OPTIMA: Mapping[str, float] = {"cdpo": LOGIT, "exo_pref": LOGIT, "ipo": 1 / (2 * IPO_TAU), "hinge": 1 / BETA}
CELLS: Mapping[str, Loss] = {
    "dpo": lambda p, r: dpo_loss(p, r, beta=BETA),
    "dpo, β 1/5": lambda p, r: dpo_loss(p, r, beta=BETA / 5),
    "robust_dpo": lambda p, r: robust_dpo_loss(p, r, beta=BETA, label_smoothing=SMOOTHING),
    "mpo alone": lambda p, r: mpo_loss(p, tau=TAU, objective="prob"),
    "cdpo": lambda p, r: dpo_loss(p, r, beta=BETA, label_smoothing=SMOOTHING),
    "exo_pref": lambda p, r: exo_loss(p, r, exo_pref_targets(SMOOTHING).expand_as(p), beta_pi=BETA),
    "ipo": lambda p, r: ipo_loss(p, r, torch.ones_like(p), tau=IPO_TAU, normalize="sum"),
    "hinge": lambda p, r: hinge_loss(p, r, beta=BETA),
    REGULARISED: lambda p, r: mpo_loss(p, tau=TAU, objective="prob"),
}
UNBOUNDED = ("dpo", "dpo, β 1/5", "robust_dpo", "mpo alone")


def train(name: str, seed: int, at: Sequence[int] = AT) -> list[Point]:
    random = generator(seed)
    ref_logp = torch.log_softmax(normal(random, REPLIES), dim=0)
    pair = torch.randperm(REPLIES, generator=random)[:2]
    (logits,) = trainable([ref_logp])

    def step_loss(step: int) -> Tensor:
        logp = torch.log_softmax(logits, dim=0)
        found = CELLS[name](logp[None, pair], ref_logp[None, pair]).sum()
        if name == REGULARISED:
            found = found + WEIGHT * (ref_logp.exp() * sft_loss(logp)).sum()
        return found

    points = []
    for step in descend([logits], step_loss, lr=0.02, at=at):
        logp = torch.log_softmax(logits.detach(), dim=0)
        values = {"margin": float(margin((logp - ref_logp)[None, pair])), "KL": kl(logp[None], ref_logp[None])}
        if name == REGULARISED:
            values["residual"] = residual(logp, ref_logp, pair)
        points.append(Point(cell=name, at=step, values=values))
    return points


def residual(logp: Tensor, ref_logp: Tensor, pair: Tensor) -> float:
    """Largest violation, in probability, of π = π_ref + (τ/λ) s(h) s(−h) (1[chosen] − 1[rejected])."""
    h = TAU * margin(logp[None, pair])
    moved = TAU / WEIGHT * torch.sigmoid(h) * torch.sigmoid(-h)
    wanted = ref_logp.exp().index_add(0, pair, torch.cat([moved, -moved]))
    return float((logp.exp() - wanted).abs().max())


def measure(seed: int) -> tuple[Point, ...]:
    return tuple(point for name in CELLS for point in train(name, seed))


def claims() -> tuple[Claim, ...]:
    def at_end(name: str) -> Callable[[Measured], float]:
        return lambda seed: seed.value(name, "margin", AT[-1])

    def growth(name: str) -> Callable[[Measured], float]:
        return lambda seed: seed.value(name, "margin", AT[-1]) - seed.value(name, "margin", AT[-2])

    return (
        *(
            Claim(text=f"{name} still grows from step {AT[-2]} to {AT[-1]}", value=growth(name), above=0.5)
            for name in UNBOUNDED
        ),
        *(
            Claim(
                text=f"{name} stops: −|margin − {limit:.3f}|",
                value=lambda seed, name=name, limit=limit: -abs(seed.value(name, "margin", AT[-1]) - limit),
                above=-0.05,
            )
            for name, limit in OPTIMA.items()
        ),
        Claim(
            text=f"hinge rests: −growth from step {AT[-2]} to {AT[-1]}",
            value=lambda s: -growth("hinge")(s),
            above=-1e-6,
        ),
        *(
            Claim(
                text=f"margin at {AT[-1]}: {name} − the largest finite optimum",
                value=lambda seed, name=name: at_end(name)(seed) - max(OPTIMA.values()),
            )
            for name in UNBOUNDED
        ),
        Claim(
            text=f"{REGULARISED}: −largest distance from its fixed point, in probability",
            value=lambda seed: -seed.value(REGULARISED, "residual", AT[-1]),
            above=-1e-3,
        ),
        Claim(
            text=f"KL at {AT[-1]}: −({REGULARISED})",
            value=lambda seed: -seed.value(REGULARISED, "KL", AT[-1]),
            above=-0.5,
        ),
    )


def draw(figure: Figure, seeds: Sequence[Measured]) -> None:
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(CELLS):
        for axes, quantity in ((left, "margin"), (right, "KL")):
            band(axes, name, [[(p.at, p.values[quantity]) for p in seed.path(name)] for seed in seeds], number)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(AT, [str(at) for at in AT])
        axes.minorticks_off()
    finish(left, "step", "margin moved (nats)")
    finish(right, "step", "KL to the reference (nats)")


READING = (
    "Each finite optimum is reached but hinge's: Adam's momentum carries its margin past 1/β, where the loss is "
    "zero and nothing calls it back. DPO, at either β, robust DPO and MPO's term alone do not stop; MPO with the "
    "reference's likelihood stops where it should."
)
EXPERIMENT = Experiment(
    name="e6",
    title="A deterministic preference: who stops, and where",
    about=__doc__ or "",
    reading=READING,
    at="step",
    measure=measure,
    claims=claims(),
    draw=draw,
    caption="Left: how far the margin has moved. Right: KL to the reference.",
)
