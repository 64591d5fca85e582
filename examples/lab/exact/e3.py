"""Twelve prompts, sixteen one-token replies, one tanh network for all prompts. Deterministic preferences (the higher
reward is chosen) exist for six prompts. The other six have none; on them a policy is *held out*. The reference stream
is 64 samples of the reference on every prompt, drawn once, added as likelihood with weight 0.3. It is MPO's only
protection from drift, so the honest control is DPO with the same stream. With β = 0.5 its first gradient is as large
as MPO's. Everything is full batch; a seed changes reference, rewards, pairs and stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rayalign.methods import dpo_loss, exo_loss, exo_pref_targets, ipo_loss, margin, mpo_loss, sft_loss

from .enumeration import expected, kl
from .figures import band, finish
from .record import Claim, Experiment, Measured, Point, ahead
from .training import copies, descend, forward, generator, network, normal, trainable

PROMPTS, PREFERRED, REPLIES, PAIRS, SAMPLES = 12, 6, 16, 30, 64
AT = (100, 300, 1000, 2000)
STREAM = 0.3
KL_TICKS = (0.1, 0.3, 1, 3)
MPO, CONTROL, MATCHED, ALONE = "mpo + stream", "dpo + stream", "dpo, β 0.5, + stream", "mpo alone"
HELD_OUT, FORWARD_KL, GAIN, MARGIN = "held-out KL", "held-out forward KL", "gain in E[r]", "margin"
PairLoss = Callable[[Tensor, Tensor], Tensor]
"""(log π, log π_ref) of chosen and rejected, [N, 2] → [N]"""


def exo(policy: Tensor, reference: Tensor) -> Tensor:
    return exo_loss(policy, reference, exo_pref_targets(0.1).expand_as(policy), beta_pi=0.1)


def mpo(policy: Tensor, reference: Tensor) -> Tensor:
    return mpo_loss(policy, tau=1.0, objective="prob")


def dpo(policy: Tensor, reference: Tensor) -> Tensor:
    return dpo_loss(policy, reference, beta=0.1)


CELLS: Mapping[str, tuple[PairLoss, float]] = {
    "dpo": (dpo, 0.0),
    "cdpo": (lambda p, r: dpo_loss(p, r, beta=0.1, label_smoothing=0.1), 0.0),
    "ipo": (lambda p, r: ipo_loss(p, r, torch.ones_like(p), tau=0.1, normalize="sum"), 0.0),
    "exo_pref": (exo, 0.0),
    ALONE: (mpo, 0.0),
    MPO: (mpo, STREAM),
    CONTROL: (dpo, STREAM),
    MATCHED: (lambda p, r: dpo_loss(p, r, beta=0.5), STREAM),
}
"""Name → loss of pairs, weight of the stream."""
UNPROTECTED = ("dpo", "cdpo", "ipo", "exo_pref", ALONE)


@dataclass(frozen=True, slots=True)
class World:
    prompts: Tensor
    """[X, 8]"""
    start: list[Tensor]
    reward: Tensor
    """[X, Y]"""
    pairs: tuple[Tensor, Tensor]
    """prompt [N] and (chosen, rejected) [N, 2]"""
    stream: Tensor
    """[X, 64] replies of the reference"""

    def logp(self, parameters: Sequence[Tensor]) -> Tensor:
        return torch.log_softmax(forward(parameters, self.prompts), dim=-1)


def world(seed: int) -> World:
    random = generator(seed)
    prompts, start = normal(random, PROMPTS, 8), network(random, (8, 32, 32, REPLIES), gain=2.0)
    reward = normal(random, PROMPTS, REPLIES)
    reference = torch.log_softmax(forward(start, prompts), dim=-1).exp()
    stream = torch.multinomial(reference, SAMPLES, replacement=True, generator=random)
    prompt = torch.arange(PREFERRED).repeat_interleave(PAIRS)
    replies = torch.multinomial(reference[prompt], 2, replacement=False, generator=random)
    order = reward[prompt[:, None], replies].argsort(dim=1, descending=True)
    return World(prompts, start, reward, (prompt, replies.gather(1, order)), stream)


def train(of: World, at: Sequence[int] = AT) -> list[Point]:
    """Every cell, each a network of its own, in one pass."""
    parameters, ref_logp = trainable(copies(of.start, len(CELLS))), of.logp(of.start)
    prompt, replies = of.pairs
    pair = prompt[:, None], replies
    ref_pair = ref_logp[pair]

    def step_loss(step: int) -> Tensor:
        losses = []
        for logp, (pair_loss, weight) in zip(of.logp(parameters), CELLS.values(), strict=True):
            losses.append(pair_loss(logp[pair], ref_pair).mean())
            if weight:
                losses.append(weight * sft_loss(logp.gather(1, of.stream)).mean())
        return torch.stack(losses).sum()

    return [
        Point(cell=name, at=step, values=quantities(of, logp, ref_logp))
        for step in descend(parameters, step_loss, lr=2e-3, at=at)
        for name, logp in zip(CELLS, of.logp(parameters).detach(), strict=True)
    ]


def quantities(of: World, logp: Tensor, ref_logp: Tensor) -> dict[str, float]:
    prompt, replies = of.pairs
    trained, held_out = slice(PREFERRED), slice(PREFERRED, None)
    return {
        HELD_OUT: kl(logp[held_out], ref_logp[held_out]),
        FORWARD_KL: kl(ref_logp[held_out], logp[held_out]),
        "KL": kl(logp[trained], ref_logp[trained]),
        GAIN: expected(logp[trained], of.reward[trained]) - expected(ref_logp[trained], of.reward[trained]),
        MARGIN: float(margin((logp - ref_logp)[prompt[:, None], replies]).mean()),
    }


def measure(seed: int) -> tuple[Point, ...]:
    points = train(world(seed))
    return tuple(sorted(points, key=lambda point: list(CELLS).index(point.cell)))


def ratio(one: str, other: str) -> Callable[[Measured], float]:
    """ln of the held-out KL of one over that of the other, at the end."""
    return lambda seed: math.log(seed.value(one, HELD_OUT, AT[-1]) / seed.value(other, HELD_OUT, AT[-1]))


def claims() -> tuple[Claim, ...]:
    def grows(cell: str) -> Callable[[Measured], float]:
        return lambda seed: seed.value(cell, HELD_OUT, AT[-1]) - seed.value(cell, HELD_OUT, AT[0])

    def gain(cell: str) -> Callable[[Measured], float]:
        return lambda seed: seed.value(cell, GAIN, AT[-1])

    return (
        *(
            Claim(text=f"held-out KL grows from step {AT[0]} to {AT[-1]}: {name}", value=grows(name))
            for name in UNPROTECTED
        ),
        *(
            Claim(
                text=f"held-out KL at {AT[-1]}: ln ({name} / {MPO})",
                value=ratio(name, MPO),
                above=math.log(3),
            )
            for name in UNPROTECTED
        ),
        Claim(
            text=f"ipo rests: −growth of its margin from step {AT[-2]} to {AT[-1]}",
            value=lambda seed: seed.value("ipo", MARGIN, AT[-2]) - seed.value("ipo", MARGIN, AT[-1]),
            above=-0.05,
        ),
        Claim(
            text=f"ipo has drifted all the same: held-out KL at {AT[-1]}",
            value=lambda seed: seed.value("ipo", HELD_OUT, AT[-1]),
            above=1.0,
        ),
        Claim(
            text=f"held-out KL at {AT[-1]}: ln (dpo / {CONTROL}): the control",
            value=ratio("dpo", CONTROL),
            above=math.log(3),
        ),
        Claim(text=f"held-out KL at {AT[-1]}: ln ({MATCHED} / {MPO}): more than the stream", value=ratio(MATCHED, MPO)),
        *(
            Claim(text=f"E[r] at {AT[-1]}, trained prompts: {name} − reference", value=gain(name), above=0.1)
            for name in (MPO, CONTROL, MATCHED)
        ),
        Claim(text=f"E[r] at {AT[-1]}, trained prompts: {MPO} − ({MATCHED})", value=ahead(MPO, MATCHED, GAIN, AT[-1])),
        Claim(text=f"E[r] at {AT[-1]}, trained prompts: dpo − ({MPO})", value=ahead("dpo", MPO, GAIN, AT[-1])),
    )


def draw(figure: Figure, seeds: Sequence[Measured]) -> None:
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(CELLS):
        for axes, quantity in ((left, HELD_OUT), (right, GAIN)):
            band(axes, name, [[(p.at, p.values[quantity]) for p in seed.path(name)] for seed in seeds], number)
    left.set_yscale("log")
    left.set_yticks(KL_TICKS, [f"{tick:g}" for tick in KL_TICKS])
    for axes, label in ((left, "held-out KL (nats)"), (right, "gain in E[r], trained prompts")):
        axes.set_xscale("log")
        axes.set_xticks(AT, [str(at) for at in AT])
        axes.minorticks_off()
        finish(axes, "step", label)


READING = (
    "Whatever has no stream drifts on prompts that its pairs say nothing of; IPO too, though its margin has come "
    "to rest. Whatever has the stream stays. The stream does that, not MPO's term: DPO with the same stream stays "
    "as near. With a first gradient of equal size it is not shown to gain less. The stream costs reward on the "
    "trained prompts."
)
EXPERIMENT = Experiment(
    name="e3",
    title="KL where the preferences say nothing: MPO's protection, and its control",
    about=__doc__ or "",
    reading=READING,
    at="step",
    measure=measure,
    claims=claims(),
    draw=draw,
    caption="Left: KL to the reference on the six prompts without preferences. Right: gain on the six with them.",
)
