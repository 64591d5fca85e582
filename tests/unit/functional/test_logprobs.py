"""Sums over candidates and token statistics, against Python loops and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.functional.logprobs import (
    count_per_candidate,
    last_per_candidate,
    last_token,
    log_max_p,
    log_sum_p2,
    sum_per_candidate,
    token_logp,
)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4))
def test_reductions_over_candidates_equal_a_loop(lengths: list[list[int]]) -> None:
    flat = [length for group in lengths for length in group]
    candidate_of = torch.repeat_interleave(torch.arange(len(flat)), torch.tensor(flat))
    values = torch.arange(1.0, len(candidate_of) + 1, dtype=torch.float64)
    shape = {"num_groups": len(lengths), "num_candidates": 3}
    pieces = torch.split(values, flat)
    sums = torch.tensor([float(piece.sum()) for piece in pieces], dtype=torch.float64).view(-1, 3)
    lasts = torch.tensor([float(piece[-1]) if len(piece) else 0.0 for piece in pieces], dtype=torch.float64)
    assert torch.equal(sum_per_candidate(values, candidate_of, **shape), sums)
    assert torch.equal(last_per_candidate(values, candidate_of, **shape), lasts.view(-1, 3))
    assert count_per_candidate(candidate_of, **shape).tolist() == lengths


def test_gradient_of_a_sum_reaches_every_token_of_its_candidate() -> None:
    values = torch.zeros(4, requires_grad=True)
    total = sum_per_candidate(values, torch.tensor([0, 0, 1, 3]), num_groups=2, num_candidates=2)
    (gradient,) = torch.autograd.grad((total * torch.tensor([[1.0, 2.0], [4.0, 8.0]])).sum(), values)
    assert gradient.tolist() == [1, 1, 2, 8]


def test_gradient_of_the_last_value_reaches_only_the_last_token() -> None:
    values = torch.zeros(4, requires_grad=True)
    last = last_per_candidate(values, torch.tensor([0, 0, 1, 3]), num_groups=2, num_candidates=2)
    (gradient,) = torch.autograd.grad(last.sum(), values)
    assert gradient.tolist() == [0, 1, 1, 1]


def test_last_token_of_nothing_is_nothing() -> None:
    assert last_token(torch.zeros(0, dtype=torch.long)).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_are_summed_in_float32(dtype: torch.dtype) -> None:
    values = torch.full((500,), -1.5, dtype=dtype)
    values[0] = -0.25
    total = sum_per_candidate(values, torch.zeros(500, dtype=torch.long), num_groups=1, num_candidates=1)
    assert total.dtype == torch.float32
    assert total.item() == -748.75  # 499 · 1.5 + 0.25, which neither half format can hold


def test_token_logp_divides_by_the_temperature() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    expected = torch.log_softmax(logits / 0.5, dim=-1)[0, 1]
    assert torch.equal(token_logp(logits, torch.tensor([1]), temperature=0.5)[0], expected)


def test_uniform_tokens_have_their_closed_forms() -> None:
    logits = torch.full((1, 8), 3.0, dtype=torch.float64)
    log_eighth = -torch.tensor([8.0], dtype=torch.float64).log()
    torch.testing.assert_close(token_logp(logits, torch.tensor([5])), log_eighth)
    torch.testing.assert_close(log_sum_p2(logits), log_eighth)  # 8 · (1/8)²
    torch.testing.assert_close(log_max_p(logits), log_eighth)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.0, 20.0))
def test_the_chance_of_two_equal_draws_lies_between_the_square_of_the_mode_and_the_mode(
    seed: int, scale: float
) -> None:
    logits = scale * torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mode, coincide = log_max_p(logits), log_sum_p2(logits)
    assert (2 * mode <= coincide + 1e-12).all()
    assert (coincide <= mode + 1e-12).all()


def test_statistics_carry_no_gradient() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    assert not log_sum_p2(logits).requires_grad
    assert not log_max_p(logits).requires_grad
    assert token_logp(logits, torch.tensor([0, 1])).requires_grad
