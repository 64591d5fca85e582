"""DPO with and without WPO's weight on stored, own and mixed pairs of enumerable sequences: what E4 and E4b share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rayalign.methods import dpo_loss, wpo_pair_weight

from .enumeration import Alignment, Sequences, expected, kl
from .training import descend, generator, trainable

BETA = 0.1
REWARD, KL = "E[r]", "KL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    prompt: Tensor
    """[N]"""
    sequence: Tensor
    """[N, 2]: chosen, rejected"""

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(prompt=torch.cat([self.prompt, other.prompt]), sequence=torch.cat([self.sequence, other.sequence]))

    def some(self, count: int, random: torch.Generator) -> Pairs:
        kept = torch.randperm(len(self.prompt), generator=random)[:count]
        return Pairs(prompt=self.prompt[kept], sequence=self.sequence[kept])


def labelled(prompt: Tensor, sequence: Tensor, reward: Tensor) -> Pairs:
    """The higher reward is chosen."""
    order = reward[prompt[:, None], sequence].argsort(dim=1, descending=True, stable=True)
    return Pairs(prompt=prompt, sequence=sequence.gather(1, order))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    sequences: Sequences
    reward: Tensor
    """[X, Y]"""
    start: Sequence[Tensor]
    """The reference's parameters."""
    logits: Callable[[Sequence[Tensor]], Tensor]
    """parameters → next-token logits, [X, P, V]"""
    draw: Callable[[Tensor, torch.Generator], Pairs]
    """log π [X, Y] → a batch of pairs of this policy's own samples, labelled"""
    stored: Pairs
    """As many as ``draw`` gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    data: Literal["stored", "once", "hybrid", "online"] = "stored"
    """``once``: samples of the reference; ``hybrid``: half of every batch stored, half the policy's own."""
    alignment: Alignment | None = None
    which: Literal["both", "chosen", "rejected"] = "both"
    permuted: bool = False


CELLS: Mapping[str, Cell] = {
    "dpo": Cell(),
    "wpo none": Cell(alignment="none"),
    "wpo greedy": Cell(alignment="greedy"),
    "wpo sampled": Cell(alignment="sampled"),
    "wpo permuted": Cell(alignment="sampled", permuted=True),
    "wpo chosen only": Cell(alignment="sampled", which="chosen"),
    "wpo rejected only": Cell(alignment="sampled", which="rejected"),
    "dpo once": Cell(data="once"),
    "dpo hybrid": Cell(data="hybrid"),
    "dpo online": Cell(data="online"),
}


def batch_loss(
    task: Task, cell: Cell, logits: Tensor, ref_logp: Tensor, pairs: Pairs, random: torch.Generator
) -> Tensor:
    """Mean over pairs of weight × DPO's loss, as the method ``wpo`` has it: weights are not normalised."""
    logp = task.sequences.logp_of(logits, pairs.prompt, pairs.sequence)
    losses = dpo_loss(logp, ref_logp[pairs.prompt[:, None], pairs.sequence], beta=BETA)
    if cell.alignment is None:
        return losses.mean()
    prompts, sequences = pairs.prompt.repeat_interleave(2), pairs.sequence.flatten()
    each = task.sequences.weight(logits, prompts, sequences, cell.alignment).view(-1, 2)
    weight = wpo_pair_weight(each, clamp="product", which=cell.which)
    if cell.permuted:
        weight = weight[torch.randperm(len(weight), generator=random)]
    return (weight * losses).mean()


def train(task: Task, cell: Cell, seed: int, *, lr: float, at: Sequence[int]) -> list[tuple[int, dict[str, float]]]:
    """Exact E[r] and KL after so many steps; every cell of a seed begins with the same random numbers."""
    random = generator(seed, 7)
    parameters = trainable(task.start)
    ref_logp = task.sequences.logp(task.logits(task.start))
    once = task.draw(ref_logp, random)

    def batch(logits: Tensor) -> Pairs:
        if cell.data == "stored":
            return task.stored
        if cell.data == "once":
            return once
        own = task.draw(task.sequences.logp(logits.detach()), random)
        half = len(own.prompt) // 2
        return own if cell.data == "online" else own.some(half, random) + task.stored.some(half, random)

    def step_loss(step: int) -> Tensor:
        logits = task.logits(parameters)
        return batch_loss(task, cell, logits, ref_logp, batch(logits), random)

    found = []
    for step in descend(parameters, step_loss, lr=lr, at=at):
        logp = task.sequences.logp(task.logits(parameters)).detach()
        found.append((step, {REWARD: expected(logp, task.reward), KL: kl(logp, ref_logp)}))
    return found
