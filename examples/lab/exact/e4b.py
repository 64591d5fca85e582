"""The regime that WPO is for. Sequences of four tokens out of six; the first names a region, three tokens each. The
reference writes region A 19 times out of 20, the other writer region B 19 times out of 20. The later tokens have the
same logits in both regions, and what is good in A is as bad in B: the reward changes sign. Both replies of a pair are
of one region. A share f of the stored pairs is the other writer's, the rest the reference's, so the two parts teach
opposite lessons to shared parameters. *permuted* shuffles WPO's weights over the batch, which keeps their size and
loses what they know. Four prompts with parameters of their own; a seed changes logits, reward and data. *cosine*: of
the first gradient with the expected gradient of DPO on the policy's own pairs, by enumeration of all pairs. How that
expectation treats pairs of equal reward was corrected after a first run of the deciding seeds; training, claims and
thresholds were not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rayalign.methods import dpo_loss

from .enumeration import Sequences
from .figures import band, finish
from .preferences import BETA, CELLS, REWARD, Pairs, Task, batch_loss, labelled, train
from .record import Claim, Experiment, Measured, Point, ahead
from .training import generator, normal, trainable

PROMPTS, PAIRS, OWN_REGION = 4, 24, 0.95
SEQUENCES = Sequences(6, 4)
REGION = (SEQUENCES.tokens[:, 0] >= SEQUENCES.vocabulary // 2).long()
SHARES = (0.5, 0.7, 0.85)
AT = (20, 50, 100, 200)
COSINE = "cosine"
OWN = ("dpo once", "dpo online")
"""Without stored pairs, so the same whatever their shares."""
STORED = ("dpo", "wpo none", "wpo greedy", "wpo sampled", "wpo permuted")


def cell(name: str, share: float) -> str:
    return name if name in OWN else f"f = {share}: {name}"


def logits(parameters: Sequence[Tensor]) -> Tensor:
    """First-token logits [X, V] and those of each later place [X, T−1, V], whatever came before → [X, P, V]."""
    first, later = parameters
    place = (SEQUENCES.prefix_tokens() >= 0).sum(dim=1)
    return torch.cat([first[:, None], later], dim=1)[:, place]


def draw_pairs(logp: Tensor, reward: Tensor, count: int, random: torch.Generator) -> Pairs:
    """``count`` pairs per prompt: a sample of the policy, and one of the policy in the same region."""
    probability = logp.detach().exp()
    one = torch.multinomial(probability, count, replacement=True, generator=random)
    alike = REGION[one].flatten()[:, None] == REGION[None]
    prompt = torch.arange(len(logp)).repeat_interleave(count)
    other = torch.multinomial(probability[prompt] * alike, 1, generator=random)
    return labelled(prompt, torch.cat([one.view(-1, 1), other], dim=1), reward)


def task(seed: int, share: float) -> Task:
    random = generator(seed)
    later = normal(random, PROMPTS, SEQUENCES.length - 1, SEQUENCES.vocabulary)
    value = normal(random, PROMPTS, SEQUENCES.length - 1, SEQUENCES.vocabulary)
    places = torch.arange(SEQUENCES.length - 1)
    reward = value[:, places, SEQUENCES.tokens[:, 1:]].sum(dim=-1) * (1.0 - 2.0 * REGION)
    half = SEQUENCES.vocabulary // 2
    own, foreign = torch.tensor([OWN_REGION, 1 - OWN_REGION], dtype=torch.float64).div(half).log()
    first = torch.cat([own.expand(PROMPTS, half), foreign.expand(PROMPTS, half)], dim=1)
    far = SEQUENCES.logp(logits([first.flip(1), later]))
    near = SEQUENCES.logp(logits([first, later]))
    count = round(share * PAIRS)
    stored = draw_pairs(far, reward, count, random) + draw_pairs(near, reward, PAIRS - count, random)
    return Task(
        sequences=SEQUENCES,
        reward=reward,
        start=[first, later],
        logits=logits,
        draw=lambda logp, stream: draw_pairs(logp, reward, PAIRS, stream),
        stored=stored,
    )


def own_gradient(of: Task) -> Tensor:
    """∇ of the expected DPO loss on the reference's own pairs, over all pairs of one region."""
    parameters = trainable(of.start)
    logp = SEQUENCES.logp(logits(parameters))
    total = torch.zeros((), dtype=torch.float64)
    for region in (0, 1):
        inside = torch.nonzero(region == REGION).squeeze(1)
        pairs = inside[torch.combinations(torch.arange(len(inside)), r=2)]
        for prompt in range(len(of.reward)):
            chosen = labelled(torch.full((len(pairs),), prompt), pairs, of.reward).sequence
            probability = logp[prompt].detach().exp()
            earned = of.reward[prompt][chosen]
            # equal rewards are chosen either way, and at π = π_ref the two ways cancel
            share = 2 * probability[chosen].prod(dim=1) / probability[inside].sum() * (earned[:, 0] > earned[:, 1])
            pair = logp[prompt][chosen]
            total = total + (share * dpo_loss(pair, pair.detach(), beta=BETA)).sum() / len(of.reward)
    return flat(torch.autograd.grad(total, parameters))


def stored_gradient(of: Task, name: str, seed: int) -> Tensor:
    parameters = trainable(of.start)
    table = logits(parameters)
    ref_logp = SEQUENCES.logp(table).detach()
    found = batch_loss(of, CELLS[name], table, ref_logp, of.stored, generator(seed, 8))
    return flat(torch.autograd.grad(found, parameters))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def measure(seed: int) -> tuple[Point, ...]:
    points = []

    def follow(of: Task, label: str, name: str) -> None:
        found = train(of, CELLS[name], seed, lr=0.02, at=AT)
        points.extend(Point(cell=label, at=at, values=values) for at, values in found)

    own = own_gradient(task(seed, SHARES[0]))
    for name in OWN:
        follow(task(seed, SHARES[0]), name, name)
    for share in SHARES:
        of = task(seed, share)
        for name in STORED:
            cosine = torch.cosine_similarity(stored_gradient(of, name, seed), own, dim=0).item()
            points.append(Point(cell=cell(name, share), at=0, values={COSINE: cosine}))
            follow(of, cell(name, share), name)
        follow(of, cell("dpo hybrid", share), "dpo hybrid")
    return tuple(points)


def later(share: float) -> Claim:
    label = cell("wpo sampled", share)
    return Claim(
        text=f"f = {share}: E[r] of wpo sampled: step {AT[-1]} − step {AT[-2]}",
        value=lambda seed: seed.value(label, REWARD, AT[-1]) - seed.value(label, REWARD, AT[-2]),
    )


def claims() -> tuple[Claim, ...]:
    found = [
        Claim(text=f"E[r] at {at}: dpo online − dpo once", value=ahead("dpo online", "dpo once", REWARD, at))
        for at in (20, 100)
    ]
    for share in SHARES:
        found += [
            Claim(
                text=f"f = {share}: first gradient's cosine, {one} − {other}",
                value=ahead(cell(one, share), cell(other, share), COSINE, 0),
            )
            for one, other in (("wpo sampled", "dpo"), ("wpo sampled", "wpo permuted"))
        ]
        found += [
            Claim(
                text=f"f = {share}: E[r] at {at}: {one} − {other}",
                value=ahead(cell(one, share), cell(other, share), REWARD, at),
            )
            for one, other in (
                ("wpo sampled", "dpo"),
                ("wpo sampled", "wpo permuted"),
                ("wpo sampled", "wpo none"),
                ("wpo sampled", "wpo greedy"),
                ("dpo online", "wpo sampled"),
                ("dpo online", "dpo hybrid"),
                ("dpo hybrid", "dpo"),
            )
            for at in (20, 100)
        ]
        found.append(later(share))
    return tuple(found)


def draw(figure: Figure, seeds: Sequence[Measured]) -> None:
    for axes, share in zip(figure.subplots(1, 3, sharey=True), SHARES, strict=True):
        for number, name in enumerate((*STORED, "dpo hybrid", *OWN)):
            paths = [seed.path(cell(name, share)) for seed in seeds]
            rewards = [[(p.at, p.values[REWARD]) for p in path if REWARD in p.values] for path in paths]
            band(axes, name, rewards, number)
        axes.set_xscale("log")
        axes.set_xticks(AT, [str(at) for at in AT])
        axes.minorticks_off()
        axes.set_title(f"f = {share}", fontsize=9)
        finish(axes, "step", "E[r]" if share == SHARES[0] else "")


READING = (
    "Where a part of the data misleads, the weight helps at every share of it. Its permuted control does not keep "
    "up, and the cosine of the first gradient says why. It does not replace fresh samples: online pairs do more, "
    "and half of them beats none. That one alignment is better than another is not shown, nor which way the "
    "reward goes in the last hundred steps."
)
EXPERIMENT = Experiment(
    name="e4b",
    title="Stored pairs that teach opposite lessons: WPO's weight and its controls",
    about=__doc__ or "",
    reading=READING,
    at="step",
    measure=measure,
    claims=claims(),
    draw=draw,
    caption="Exact expected reward by step, where a share f of the stored pairs teaches the wrong lesson.",
)
