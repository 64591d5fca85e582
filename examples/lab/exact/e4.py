"""All 216 sequences of three tokens out of six, for six prompts; the policy is a tanh network over prompt and prefix.
Stored pairs were drawn from another random network, far from the reference, and are labelled by the reward. *once*
draws as many pairs from the reference before training. *hybrid* takes half of every batch from the store and half from
the policy. *online* draws every batch from the policy. WPO's weights are those of the product: detached, cut at 1 as a
product, not normalised. A seed changes networks, reward and data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from .enumeration import Sequences, expected, kl
from .figures import band, finish
from .preferences import CELLS, KL, REWARD, Pairs, Task, labelled, train
from .record import Claim, Experiment, Measured, Point, ahead
from .training import forward, generator, network, normal

PROMPTS, PAIRS, HIDDEN, GAIN = 6, 24, 32, 3.0
SEQUENCES = Sequences(6, 3)
AT = (30, 100, 300, 1000)
REFERENCE, WRITER = "reference", "writer of the stored pairs"
SHOWN = tuple(name for name in CELLS if name != "wpo permuted")


def inputs() -> Tensor:
    """[X, P, F]: prompt and the tokens before, one-hot."""
    prefix = F.one_hot(SEQUENCES.prefix_tokens() + 1, SEQUENCES.vocabulary + 1).flatten(1).double()
    prompt = torch.eye(PROMPTS, dtype=torch.float64)
    rows = SEQUENCES.num_prefixes
    return torch.cat([prompt[:, None].expand(-1, rows, -1), prefix.expand(PROMPTS, -1, -1)], dim=-1)


def draw_pairs(logp: Tensor, reward: Tensor, random: torch.Generator) -> Pairs:
    """Two independent samples each."""
    prompt = torch.arange(PROMPTS).repeat_interleave(PAIRS)
    drawn = torch.multinomial(logp.detach().exp(), 2 * PAIRS, replacement=True, generator=random)
    return labelled(prompt, drawn.view(-1, 2), reward)


def task(seed: int) -> tuple[Task, Tensor]:
    """And log-probabilities of the writer of the stored pairs."""
    random, features = generator(seed), inputs()
    sizes = (features.shape[-1], HIDDEN, HIDDEN, SEQUENCES.vocabulary)
    start, other = network(random, sizes, gain=GAIN), network(random, sizes, gain=GAIN)
    reward = normal(random, PROMPTS, len(SEQUENCES))
    writer = SEQUENCES.logp(forward(other, features))
    found = Task(
        sequences=SEQUENCES,
        reward=reward,
        start=start,
        logits=lambda parameters: forward(parameters, features),
        draw=lambda logp, stream: draw_pairs(logp, reward, stream),
        stored=draw_pairs(writer, reward, random),
    )
    return found, writer


def measure(seed: int) -> tuple[Point, ...]:
    of, writer = task(seed)
    ref_logp = SEQUENCES.logp(of.logits(of.start))
    points = [
        Point(cell=name, at=0, values={REWARD: expected(logp, of.reward), KL: kl(logp, ref_logp)})
        for name, logp in ((REFERENCE, ref_logp), (WRITER, writer))
    ]
    for name in SHOWN:
        points += [Point(cell=name, at=at, values=v) for at, v in train(of, CELLS[name], seed, lr=1e-3, at=AT)]
    return tuple(points)


def claims() -> tuple[Claim, ...]:
    orders = (
        ("dpo online", "dpo once"),
        ("dpo online", "dpo hybrid"),
        ("dpo online", "dpo"),
        ("dpo once", "dpo"),
        ("dpo hybrid", "dpo"),
        ("wpo sampled", "dpo"),
        ("wpo sampled", "wpo none"),
        ("wpo rejected only", "wpo sampled"),
        ("wpo sampled", "wpo chosen only"),
    )
    return tuple(
        Claim(text=f"E[r] at {at}: {one} − {other}", value=ahead(one, other, REWARD, at))
        for one, other in orders
        for at in (300, 1000)
    )


def draw(figure: Figure, seeds: Sequence[Measured]) -> None:
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(SHOWN):
        for axes, quantity in ((left, REWARD), (right, KL)):
            band(axes, name, [[(p.at, p.values[quantity]) for p in seed.path(name)] for seed in seeds], number)
    for axes, label in ((left, "E[r]"), (right, "KL to the reference (nats)")):
        axes.set_xscale("log")
        axes.set_xticks(AT, [str(at) for at in AT])
        axes.minorticks_off()
        finish(axes, "step", label)


READING = (
    "Pairs drawn from the policy at every step beat all else here, and half of them beats none. Pairs drawn once "
    "from the reference are not shown to be better than the other writer's. WPO's weight is not shown to help "
    "where no part of the data misleads. Without its alignment, or with the weight on one side alone, these seeds "
    "show no difference."
)
EXPERIMENT = Experiment(
    name="e4",
    title="Far stored pairs, and the order of data policies",
    about=__doc__ or "",
    reading=READING,
    at="step",
    measure=measure,
    claims=claims(),
    draw=draw,
    caption="Exact expected reward (left) and KL to the reference (right) by step.",
)
