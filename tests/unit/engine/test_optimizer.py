"""The learning rate by hand, and AdamW against its own arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rayalign.config.training import OptimConfig
from rayalign.engine.optimizer import learning_rate, make_optimizer, set_learning_rate


def rates(*, steps: int = 6, **fields: object) -> list[float]:
    optim = OptimConfig(lr=8.0, **fields)
    return [learning_rate(optim, step, steps=steps) for step in range(steps)]


def test_warmup_ends_at_the_rate() -> None:
    assert rates(schedule="constant", warmup=4) == [2, 4, 6, 8, 8, 8]


def test_linear() -> None:
    assert rates(schedule="linear", warmup=2) == [4, 8, 8, 6, 4, 2]
    assert rates(schedule="linear", warmup=2, min_lr_ratio=0.5) == [4, 8, 8, 7, 6, 5]


def test_cosine() -> None:
    half = 1 / math.sqrt(2)
    assert rates(schedule="cosine", warmup=2) == pytest.approx([4, 8, 8, 4 + 4 * half, 4, 4 - 4 * half])
    lowered = rates(schedule="cosine", warmup=2, min_lr_ratio=0.25)
    assert lowered == pytest.approx([4, 8, 8, 5 + 3 * half, 5, 5 - 3 * half])


def test_warmup_may_fill_the_whole_run() -> None:
    assert rates(schedule="cosine", steps=3, warmup=3) == pytest.approx([8 / 3, 16 / 3, 8])


def test_only_matrices_decay_and_frozen_parameters_stay() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    module[2].weight.requires_grad_(False)
    optimizer = make_optimizer(module, OptimConfig(lr=0.1, weight_decay=0.5))
    before = {name: p.clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    after = dict(module.named_parameters())
    assert torch.allclose(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    assert all(torch.equal(after[name], before[name]) for name in before if name != "0.weight")


def test_tied_weights_are_one_parameter() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(2, 3, bias=False)})
    module["b"].weight = module["a"].weight
    (group,) = make_optimizer(module, OptimConfig(lr=0.1)).param_groups
    assert len(group["params"]) == 1


def test_two_steps_of_adam_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    start = module.weight.item()
    optimizer = make_optimizer(module, OptimConfig(lr=0.1, betas=(0.9, 0.99), eps=1e-8))
    moved = 0.0
    m = v = 0.0
    for step, (gradient, rate) in enumerate([(2.0, 0.1), (-1.0, 0.05)], start=1):
        set_learning_rate(optimizer, rate)
        module.weight.grad = torch.full_like(module.weight, gradient)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        moved -= rate * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.99**step)) + 1e-8)
    assert module.weight.item() == pytest.approx(start + moved, rel=1e-6)
