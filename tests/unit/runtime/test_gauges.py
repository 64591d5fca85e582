"""Which number of a row becomes which gauge."""

from __future__ import annotations

from rayalign.runtime.gauges import gauge_values


def test_a_row_of_samples_and_one_of_pairs() -> None:
    sampled = {"step": 3, "loss": 0.5, "rollout/reward": 0.25, "reward": 0.75, "kl/ref_k1": 2, "kl/ref_k3": 1}
    assert gauge_values(sampled) == {"step": 3.0, "loss": 0.5, "reward": 0.75, "kl": 1.0}
    pairs = {"step": 1, "loss": None, "rewards/margins": -0.5, "step_tokens": 30, "seconds": 1.5}
    assert gauge_values(pairs) == {"step": 1.0, "margin": -0.5, "tokens_per_second": 20.0}
