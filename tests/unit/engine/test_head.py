"""The chunked LM head against log_softmax over all logits at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rayalign.engine.model.head import STATISTICS, HeadForm, token_logprobs

N, H, V = 37, 16, 53
FORMS = {
    "plain": HeadForm(),
    "temperature": HeadForm(temperature=0.7),
    "softcap": HeadForm(softcap=1.5),
    "scale": HeadForm(scale=0.5),
    "all": HeadForm(scale=0.5, softcap=1.5, temperature=0.7),
}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=dtype)
    hidden, weight, bias = draw(N, H), draw(V, H), draw(V)
    targets = torch.randint(V, (N,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: HeadForm) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias) * form.scale
    return logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)


def oracle(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, form: HeadForm) -> Tensor:
    logp = (logits_of(hidden, weight, bias, form) / form.temperature).log_softmax(dim=-1)
    return logp.gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_value_and_gradient_are_those_of_log_softmax(form: HeadForm, with_bias: bool) -> None:
    hidden, weight, bias, targets = inputs()
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    used = bias if with_bias else None
    expected = oracle(hidden, weight, targets, used, form)
    actual = token_logprobs(hidden, weight, targets, bias=used, form=form)["token_logp"]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    coefficient = torch.randn(N, generator=torch.Generator().manual_seed(1))
    for got, want in zip(
        torch.autograd.grad(actual @ coefficient, leaves),
        torch.autograd.grad(expected @ coefficient, leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(form: HeadForm) -> None:
    hidden, weight, bias, targets = inputs(torch.float64)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden[:4, :3], weight[:7, :3], bias[:7])]

    def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logprobs(hidden, weight, targets[:4] % 7, bias=bias, form=form)["token_logp"]

    # a second backward pass computes what the first one found kept: equal but for rounding
    assert torch.autograd.gradcheck(head, leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("rows_per_chunk", [1, 5, N])
def test_chunks_change_nothing(rows_per_chunk: int) -> None:
    hidden, weight, _, targets = inputs(torch.float64)
    results = []
    for chunk_bytes in (rows_per_chunk * V * 8, 1 << 30):
        form = HeadForm(chunk_bytes=chunk_bytes)
        outputs = token_logprobs(hidden, weight, targets, form=form, statistics=frozenset(STATISTICS))
        gradients = torch.autograd.grad(outputs["token_logp"].square().sum(), (hidden, weight))
        results.append((*outputs.values(), *gradients))
    torch.testing.assert_close(*results)


class LargestLogits(TorchDispatchMode):
    """Remembers the most tokens whose logits, or anything of their shape, were ever in one tensor."""

    tokens = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim == 2 and result.shape[1] == V and result.shape[0] != H:
            self.tokens = max(self.tokens, result.shape[0])
        return result


def test_no_more_than_a_chunk_of_logits_exists() -> None:
    hidden, weight, _, targets = inputs()
    form = HeadForm(chunk_bytes=4 * V * 4)
    with LargestLogits() as largest:
        outputs = token_logprobs(hidden, weight, targets, form=form, statistics=frozenset(STATISTICS))
        outputs["token_logp"].sum().backward()
    assert largest.tokens == 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_are_at_temperature_one_and_without_gradient(temperature: float) -> None:
    hidden, weight, bias, targets = inputs(torch.float64)
    form = HeadForm(softcap=3.0, temperature=temperature)
    outputs = token_logprobs(hidden, weight, targets, bias=bias, form=form, statistics=frozenset(STATISTICS))
    p = logits_of(hidden, weight, bias, form).softmax(dim=-1)
    torch.testing.assert_close(outputs["log_sum_p2"], p.square().sum(dim=-1).log())
    torch.testing.assert_close(outputs["log_max_p"], p.amax(dim=-1).log())
    torch.testing.assert_close(outputs["entropy"], torch.distributions.Categorical(probs=p).entropy())
    torch.testing.assert_close(outputs["plain_token_logp"], p.gather(1, targets[:, None])[:, 0].log())
    assert not any(outputs[name].requires_grad for name in STATISTICS)
    assert outputs["token_logp"].requires_grad


def test_statistics_come_only_when_asked_for() -> None:
    hidden, weight, _, targets = inputs()
    assert set(token_logprobs(hidden, weight, targets)) == {"token_logp"}
    asked = token_logprobs(hidden, weight, targets, statistics=frozenset({"log_max_p"}))
    assert set(asked) == {"token_logp", "log_max_p"}


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[400.0], [-400.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    outputs = token_logprobs(hidden, weight, torch.tensor([1, 1]), statistics=frozenset(STATISTICS))
    torch.testing.assert_close(outputs["token_logp"], torch.tensor([-800.0, 0.0]))
    torch.testing.assert_close(outputs["log_sum_p2"], torch.zeros(2))
    outputs["token_logp"].sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[-2.0], [0.0]]))


def test_large_logits_lose_nothing_in_log_sum_p2() -> None:
    """logsumexp(2z) − 2 logsumexp(z) of logits near 1e4 would be off by 1e-3 in float32."""
    logits = torch.tensor([1e4, 1e4 - 1.0, 1e4 - 2.0])
    outputs = token_logprobs(torch.ones(1, 1), logits[:, None], torch.tensor([0]), statistics=frozenset(STATISTICS))
    expected = logits.double().softmax(dim=0).square().sum().log().float()
    torch.testing.assert_close(outputs["log_sum_p2"], expected[None], atol=1e-6, rtol=0)


def test_no_tokens() -> None:
    hidden, weight, _, targets = inputs()
    token_logprobs(hidden[:0], weight, targets[:0])["token_logp"].sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_autocast_computes_products_in_bfloat16_and_the_softmax_in_float32() -> None:
    hidden, weight, bias, targets = inputs()
    expected = oracle(hidden.bfloat16().float(), weight.bfloat16().float(), targets, bias, HeadForm())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = token_logprobs(hidden, weight, targets, bias=bias)["token_logp"]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0)
    actual.sum().backward()
    got = (hidden.grad, weight.grad)
    for mine, want in zip(got, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        assert mine is not None and mine.dtype == torch.float32
        assert (mine - want).norm() < 0.02 * want.norm()


def test_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, targets = inputs()
    frozen = weight.detach()
    token_logprobs(hidden, frozen, targets)["token_logp"].sum().backward()
    assert hidden.grad is not None and frozen.grad is None
