"""What each KL estimator estimates, by enumeration over a vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayalign.functional.kl import exact_kl, k1, k2, k3

LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
REF_LOGITS = torch.tensor([-0.2, 0.4, 0.5, -1.0], dtype=torch.float64)


def expectation_of_gradient(estimator: object) -> Tensor:
    """E_{v ~ π}[∇ estimator(v)] with the samples held fixed: what the estimator does as a loss."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(0)
    values = estimator(logp, REF_LOGITS.log_softmax(0))
    return torch.autograd.grad((logp.exp().detach() * values).sum(), logits)[0]


def kl_gradient(*, reverse: bool) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    pair = (logits[None], REF_LOGITS[None])
    return torch.autograd.grad(exact_kl(*(pair if reverse else pair[::-1])).sum(), logits)[0]


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased_numbers(estimator: object) -> None:
    logp, ref_logp = LOGITS.log_softmax(0), REF_LOGITS.log_softmax(0)
    expected = (logp.exp() * estimator(logp, ref_logp)).sum()
    torch.testing.assert_close(expected, exact_kl(LOGITS[None], REF_LOGITS[None])[0])


def test_as_losses_k1_gives_no_signal_k2_the_reverse_and_k3_the_forward_kl() -> None:
    torch.testing.assert_close(expectation_of_gradient(k1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(expectation_of_gradient(k2), kl_gradient(reverse=True))
    torch.testing.assert_close(expectation_of_gradient(k3), kl_gradient(reverse=False))


def test_estimators_are_not_clamped_and_keep_float64() -> None:
    far, zero = torch.tensor([-25.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert k1(far, zero).item() == -25
    assert k2(far, zero).item() == 312.5
    assert k3(far, zero).item() == pytest.approx(torch.tensor(25.0, dtype=torch.float64).exp().item() - 26, rel=1e-12)


def test_k3_is_exact_for_tiny_differences() -> None:
    u = torch.tensor([1e-4], dtype=torch.float32)
    assert k3(u, torch.zeros(1)).item() == pytest.approx(5e-9, rel=1e-2)
