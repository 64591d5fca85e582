"""What one process is asked of a strategy; several workers are in the equivalence tests."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny

from rayalign.config.training import OptimConfig
from rayalign.engine.model.forward import Policy
from rayalign.engine.strategy.base import Single, Strategy, make_strategy

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2"])
def test_a_process_without_a_group_trains_alone(name: str) -> None:
    strategy = make_strategy(name, CPU)
    assert strategy == Single(CPU) and isinstance(strategy, Strategy)
    assert (strategy.rank, strategy.world_size, strategy.broadcast("x")) == (0, 1, "x")
    assert strategy.all_sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("max_norm", "scale"), [(0.0, 1.0), (100.0, 1.0), (2.5, 0.5)])
def test_clip_returns_the_norm_before_clipping(max_norm: float, scale: float) -> None:
    strategy = make_strategy("single", CPU)
    module, _ = strategy.wrap(Policy(tiny("llama")), OptimConfig(lr=1e-3))
    first, second, *others = module.parameters()
    first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
    first.grad.view(-1)[0], second.grad.view(-1)[1] = 3.0, 4.0
    assert strategy.clip(module, max_norm).item() == pytest.approx(5.0)
    assert first.grad.norm().item() == pytest.approx(3.0 * scale, rel=1e-5)
    assert second.grad.norm().item() == pytest.approx(4.0 * scale, rel=1e-5)
    assert all(parameter.grad is None for parameter in others)


def test_a_gradient_that_is_not_finite_has_no_finite_norm() -> None:
    module = Policy(tiny("llama"))
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    assert not math.isfinite(make_strategy("single", CPU).clip(module, 1.0).item())
