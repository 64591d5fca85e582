"""Drawing one token: frequencies, truncation and log-probabilities against distributions known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayalign.rollout.base import SamplingParams
from rayalign.rollout.sampling import draw, sample_key, truncated, uniforms

PROBABILITIES = (0.05, 0.5, 0.15, 0.3)
LOGITS = torch.tensor([[math.log(p) + 2.0 for p in PROBABILITIES]])  # any constant may be added
EVERYWHERE = torch.arange(10_000, dtype=torch.float64) / 10_000
"""A fine grid of noise: frequencies are then exact to 1e-4."""


def _frequencies(params: SamplingParams) -> list[float]:
    token, _ = draw(LOGITS.expand(10_000, -1), EVERYWHERE, params)
    return (torch.bincount(token, minlength=4) / 10_000).tolist()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), PROBABILITIES),
        # T = 1/2 squares: 25, 2500, 225, 900 of 3650
        (SamplingParams(temperature=0.5), (25 / 3650, 2500 / 3650, 225 / 3650, 900 / 3650)),
        (SamplingParams(temperature=0.0), (0, 1, 0, 0)),
        # .5 + .3 < .9 ≤ .5 + .3 + .15: three tokens stay
        (SamplingParams(top_p=0.9), (0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95)),
        (SamplingParams(top_p=0.79), (0, 0.5 / 0.8, 0, 0.3 / 0.8)),
        (SamplingParams(top_p=0.01), (0, 1, 0, 0)),
        (SamplingParams(top_k=2), (0, 0.5 / 0.8, 0, 0.3 / 0.8)),
        (SamplingParams(top_k=1), (0, 1, 0, 0)),
        (SamplingParams(top_k=9), PROBABILITIES),
        # of what top-k leaves (.5263, .3158, .1579) two tokens hold .84
        (SamplingParams(top_k=3, top_p=0.82), (0, 0.5 / 0.8, 0, 0.3 / 0.8)),
    ],
)
def test_frequencies(params: SamplingParams, expected: tuple[float, ...]) -> None:
    assert _frequencies(params) == pytest.approx(expected, abs=2e-4)


def test_behavior_and_sampler_log_probabilities() -> None:
    noise = torch.tensor([0.1, 0.99], dtype=torch.float64)
    logits = LOGITS.expand(2, -1)
    token, logp = draw(logits, noise, SamplingParams(top_p=0.9))
    assert token.tolist() == [1, 3]
    assert logp[0].tolist() == pytest.approx([math.log(0.5 / 0.95), math.log(0.3 / 0.95)], abs=1e-6)
    assert logp[1].tolist() == pytest.approx([math.log(0.5), math.log(0.3)], abs=1e-6)
    _, logp = draw(logits, noise, SamplingParams(temperature=0.5))
    assert torch.equal(logp[0], logp[1])
    token, logp = draw(logits, noise, SamplingParams(temperature=0.0))
    assert logp[0].tolist() == [0, 0] and logp[1].tolist() == pytest.approx([math.log(0.5)] * 2, abs=1e-6)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    token, _ = draw(logits.expand(3, -1), edges, SamplingParams())
    assert token.tolist() == [1, 3, 3]


def test_ties_at_the_edge_keep_the_first_tokens() -> None:
    logp = torch.log(torch.full((1, 4), 0.25))
    assert truncated(logp, top_k=2, top_p=1.0).exp().tolist() == [pytest.approx([0.5, 0.5, 0, 0])]
    assert truncated(logp, top_k=0, top_p=0.5).exp().tolist() == [pytest.approx([0.5, 0.5, 0, 0])]


def test_a_long_tail_keeps_its_probability() -> None:
    """Half of the mass lies in 200 000 tokens of 2.5e-6 each, which a float32 running sum would lose one by one."""
    tail = 200_000
    logits = torch.log(torch.tensor([0.5] + [0.5 / tail] * tail))[None]
    token, _ = draw(logits.expand(3, -1), torch.tensor([0.4999, 0.5001, 0.75], dtype=torch.float64), SamplingParams())
    assert token.tolist() == [0, pytest.approx(40, abs=2), pytest.approx(tail / 2, abs=10)]


def test_noise_is_uniform_and_fixed_by_its_key() -> None:
    many = np.concatenate([uniforms(sample_key(0, prompt, 0), 64) for prompt in range(500)])
    assert many.min() >= 0 and many.max() < 1
    counts = np.histogram(many, bins=20, range=(0, 1))[0]
    assert ((counts - 1600) ** 2 / 1600).sum() < 43.8  # χ² with 19 degrees of freedom, p = .001
    assert uniforms(sample_key(3, 4, 5), 8).tolist() == uniforms(sample_key(3, 4, 5), 20)[:8].tolist()
    keys = {sample_key(seed, prompt, sample) for seed in range(9) for prompt in range(9) for sample in range(9)}
    assert len(keys) == 9**3


def test_noise_never_changes() -> None:
    """A committed round must be reproducible by a later version."""
    expected = [0.42222251938319133, 0.7287667556791214, 0.4101375696931917]
    assert uniforms(sample_key(1, 2, 3), 3).tolist() == expected


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}, {"num_samples": 0}],
)
def test_parameters_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_truncates() -> None:
    assert not SamplingParams(temperature=0.7).truncates
    assert all(SamplingParams(**t).truncates for t in ({"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}))
