"""Small policies in float64, one optimizer, and seeds that give the same numbers whatever else is run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor


def generator(seed: int, *purpose: int) -> torch.Generator:
    """One stream of random numbers per seed and purpose."""
    for number in purpose:
        seed = seed * 1_009 + number
    return torch.Generator().manual_seed(seed)


def normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def network(random: torch.Generator, sizes: Sequence[int], *, gain: float = 1.0) -> list[Tensor]:
    """Weights and biases of a tanh network; ``gain`` scales the last layer."""
    found = []
    for number, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        scale = gain if number == len(sizes) - 2 else 1.0
        found += [scale * normal(random, inputs, outputs) / inputs**0.5, torch.zeros(1, outputs, dtype=torch.float64)]
    return found


def forward(parameters: Sequence[Tensor], inputs: Tensor) -> Tensor:
    *hidden, weight, bias = parameters
    for w, b in zip(hidden[::2], hidden[1::2], strict=True):
        inputs = torch.tanh(inputs @ w + b)
    return inputs @ weight + bias


def copies(parameters: Sequence[Tensor], count: int) -> list[Tensor]:
    """``count`` networks in one, to be trained apart: [C, …] of each parameter."""
    return [parameter.expand(count, *parameter.shape) for parameter in parameters]


def trainable(parameters: Sequence[Tensor]) -> list[Tensor]:
    """A copy to be trained."""
    return [parameter.detach().clone().requires_grad_() for parameter in parameters]


def descend(
    parameters: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    *,
    lr: float,
    at: Collection[int],
    cosine: bool = False,
) -> Iterator[int]:
    """Adam on ``loss(step)`` up to the largest of ``at``; stops at each of these numbers of updates, 0 included."""
    steps = max(at)
    optimizer = torch.optim.Adam(list(parameters), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    if 0 in at:
        yield 0
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        if schedule:
            schedule.step()
        if step + 1 in at:
            yield step + 1
