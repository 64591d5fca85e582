"""Masked values, NaN included, reach neither value nor gradient."""

from __future__ import annotations

import math

import torch

from rayalign.functional.masked import masked_log_softmax, masked_mean, masked_sum

VALUES = torch.tensor([[1.0, math.nan, 3.0], [math.nan, math.nan, math.inf]])
MASK = torch.tensor([[True, False, True], [False, False, False]])


def test_sum_and_mean_skip_masked_values() -> None:
    assert masked_sum(VALUES, MASK).item() == 4
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [4, 0]
    assert masked_mean(VALUES, MASK).item() == 2
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [2, 0]


def test_mean_has_no_epsilon() -> None:
    assert masked_mean(torch.ones(3, dtype=torch.float64), torch.tensor([True, True, False])).item() == 1.0


def test_gradient_of_masked_values_is_zero() -> None:
    values = VALUES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(masked_mean(values, MASK), values)
    assert gradient.tolist() == [[0.5, 0, 0.5], [0, 0, 0]]


def test_softmax_is_that_of_the_real_candidates() -> None:
    logits = torch.tensor([[0.3, math.nan, -1.2]], requires_grad=True)
    log_p = masked_log_softmax(logits, torch.tensor([[True, False, True]]))
    real = torch.log_softmax(torch.tensor([0.3, -1.2]), dim=0)
    assert torch.equal(log_p[0, [0, 2]], real)
    assert log_p.exp()[0, 1] == 0
    (gradient,) = torch.autograd.grad((log_p.exp() * log_p).sum(), logits)
    assert gradient[0, 1] == 0
    assert torch.isfinite(gradient).all()


def test_softmax_of_a_group_without_candidates_is_finite() -> None:
    logits = torch.tensor([[math.nan, 5.0]], requires_grad=True)
    log_p = masked_log_softmax(logits, torch.tensor([[False, False]]))
    assert log_p.exp().tolist() == [[0.5, 0.5]]
    assert torch.autograd.grad(log_p.sum(), logits)[0].tolist() == [[0, 0]]


def test_softmax_without_mask_is_the_ordinary_one() -> None:
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(masked_log_softmax(logits, None), torch.log_softmax(logits, dim=1))
