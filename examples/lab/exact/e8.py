"""How concentrated WPO's weights of the policy's own samples are, by alignment: an ideal weight would treat all of
them alike. There are 64 prompts of three tokens each. Each prompt's next-token logits are normal with a scale of its
own between 0.5 and 4. So some prompts are nearly uniform and some nearly certain. Tokens do not depend on each other.
Then mean and deviation of exp(mean over tokens of log weight) factor over tokens. They are exact without a sample,
even for a vocabulary of 2000. Concentration is the coefficient of variation, sd/mean; the sd alone is of weights of
different size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rayalign.functional.logprobs import log_max_p, log_sum_p2
from rayalign.methods import wpo_weight

from .enumeration import Alignment
from .figures import band, finish
from .record import Claim, Experiment, Measured, Point, ahead
from .training import generator, normal

PROMPTS, TOKENS, SCALES = 64, 3, (0.5, 4.0)
VOCABULARIES = (50, 2000)
ALIGNMENTS: tuple[Alignment, ...] = ("none", "greedy", "sampled")
MEAN, DEVIATION, VARIATION = "mean", "sd", "sd/mean"


def logits(seed: int, vocabulary: int, *, prompts: int = PROMPTS, tokens: int = TOKENS) -> Tensor:
    """[prompts, tokens, V]"""
    random = generator(seed, vocabulary)
    low, high = SCALES
    scale = low + (high - low) * torch.rand(prompts, 1, 1, generator=random, dtype=torch.float64)
    return scale * normal(random, prompts, tokens, vocabulary)


def token_weight(rows: Tensor, alignment: Alignment) -> Tensor:
    """WPO's weight of every token as a response of its own; rows [N, V] → [N, V]."""
    count, vocabulary = rows.shape
    logp = torch.log_softmax(rows, dim=-1)
    found = wpo_weight(
        logp.flatten(),
        torch.arange(count * vocabulary),
        num_candidates=count * vocabulary,
        alignment=alignment,
        log_sum_p2=log_sum_p2(rows).repeat_interleave(vocabulary) if alignment == "sampled" else None,
        log_max_p=log_max_p(rows).repeat_interleave(vocabulary) if alignment == "greedy" else None,
    )
    return found.view(count, vocabulary)


def moments(of: Tensor, alignment: Alignment) -> tuple[float, float]:
    """Mean and standard deviation of the weight of y ~ π, over prompts and samples; ``of`` is [prompts, tokens, V].

    A response's weight is the geometric mean of its tokens', and tokens are independent: E[w^n] is a product.
    """
    prompts, tokens, vocabulary = of.shape
    rows = of.flatten(0, 1)
    weight, probability = token_weight(rows, alignment), torch.softmax(rows, dim=-1)

    def moment(power: int) -> float:
        per_token = (probability * weight ** (power / tokens)).sum(dim=-1)
        return float(per_token.view(prompts, tokens).prod(dim=1).mean())

    return moment(1), math.sqrt(moment(2) - moment(1) ** 2)


def measure(seed: int) -> tuple[Point, ...]:
    points = []
    for vocabulary in VOCABULARIES:
        of = logits(seed, vocabulary)
        for alignment in ALIGNMENTS:
            mean, deviation = moments(of, alignment)
            values = {MEAN: mean, DEVIATION: deviation, VARIATION: deviation / mean}
            points.append(Point(cell=alignment, at=vocabulary, values=values))
    return tuple(points)


def claims() -> tuple[Claim, ...]:
    found = []
    for size in VOCABULARIES:
        found += [
            Claim(text=f"V = {size}: {quantity}, {one} − {other}", value=ahead(one, other, quantity, size))
            for quantity, one, other in (
                (VARIATION, "none", "greedy"),
                (VARIATION, "greedy", "sampled"),
                (DEVIATION, "none", "greedy"),
                (DEVIATION, "greedy", "sampled"),
                (MEAN, "sampled", "greedy"),
            )
        ]
    return tuple(found)


def draw(figure: Figure, seeds: Sequence[Measured]) -> None:
    left, right = figure.subplots(1, 2)
    for number, alignment in enumerate(ALIGNMENTS):
        for axes, quantity in ((left, VARIATION), (right, MEAN)):
            band(axes, alignment, [path(seed, alignment, quantity) for seed in seeds], number)
    for axes, label in ((left, "sd/mean of the weights"), (right, "mean weight")):
        axes.set_xscale("log")
        axes.set_xticks(VOCABULARIES, [str(size) for size in VOCABULARIES])
        axes.minorticks_off()
        finish(axes, "vocabulary", label)


def path(seed: Measured, alignment: str, quantity: str) -> list[tuple[float, float]]:
    return [(point.at, point.values[quantity]) for point in seed.path(alignment)]


READING = (
    "Relative to their mean, weights are the more concentrated the more is aligned, as the WPO paper has it, at "
    "both sizes of vocabulary. Their plain standard deviation goes the other way, since alignment makes them "
    "larger."
)
EXPERIMENT = Experiment(
    name="e8",
    title="How concentrated the weights are, by alignment",
    about=__doc__ or "",
    reading=READING,
    at="V",
    measure=measure,
    claims=claims(),
    draw=draw,
    caption="Coefficient of variation (left) and mean (right) of the weights of own samples, by vocabulary.",
)
