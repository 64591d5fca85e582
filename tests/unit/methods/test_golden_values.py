"""Numbers worked out by hand from the published formulas.

One pair: log-probabilities −40 and −55 under the policy, −42 and −50 under the reference, lengths 20 and 25. So the
log-ratios are 2 and −5, and their margin is 7.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayalign.methods import (
    dpo_loss,
    dpo_rw_loss,
    exo_loss,
    exo_pref_targets,
    exo_reward_targets,
    hinge_loss,
    ipo_loss,
    robust_dpo_loss,
    simpo_loss,
    wpo_pair_weight,
    wpo_weight,
)


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


POLICY, REFERENCE, LENGTH = double([[-40.0, -55.0]]), double([[-42.0, -50.0]]), double([[20.0, 25.0]])
GROUP = double([[2.0, -1.0, 0.5, -3.0]]), torch.zeros(1, 4, dtype=torch.float64), double([[1.0, 0.2, 0.7, -0.5]])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (dpo_loss(POLICY, REFERENCE, beta=0.1), 0.4031860489),
        (dpo_loss(POLICY, REFERENCE, beta=0.1, label_smoothing=0.1), 0.4731860489),
        (robust_dpo_loss(POLICY, REFERENCE, beta=0.1, label_smoothing=0.1), 0.3156860489),
        (hinge_loss(POLICY, REFERENCE, beta=0.1), 0.3),
        (ipo_loss(POLICY, REFERENCE, LENGTH, tau=0.1, normalize="sum"), 4.0),
        (ipo_loss(POLICY, REFERENCE, LENGTH, tau=0.1, normalize="mean"), 22.09),
        (exo_loss(POLICY, REFERENCE, exo_pref_targets(1e-3)[None], beta_pi=0.1), 1.6572915822),
        (exo_loss(*GROUP[:2], exo_reward_targets(GROUP[2], 0.5), beta_pi=0.5), 0.0085889833),
        (dpo_rw_loss(*GROUP, beta_pi=0.5, beta_r=0.5), 1.0411929801),
        (simpo_loss(POLICY, LENGTH, beta=2.0, gamma=1.0), 1.0374879505),
    ],
    ids=["dpo", "cdpo", "robust", "hinge", "ipo-sum", "ipo-mean", "exo-pref", "exo-rw", "dpo-rw", "simpo"],
)
def test_one_pair_or_group(value: Tensor, expected: float) -> None:
    assert value.item() == pytest.approx(expected, abs=1e-10)


def aligned_weight(chosen: list[float], rejected: list[float], clamp: str) -> float:
    """Pair weight of token log-probabilities from which the alignment is subtracted already."""
    candidate_of = torch.tensor([0] * len(chosen) + [1] * len(rejected))
    weight = wpo_weight(double(chosen + rejected), candidate_of, num_candidates=2, alignment="none")
    return wpo_pair_weight(weight[None], clamp=clamp).item()


def test_wpo_weight() -> None:
    assert aligned_weight([-0.5, -0.2, -1.0], [-0.3, -0.9], "product") == pytest.approx(0.3114032239, abs=1e-10)
    assert aligned_weight([0.35, 0.35], [0.15], "none") == pytest.approx(1.6487212707, abs=1e-10)
    assert aligned_weight([0.35, 0.35], [0.15], "product") == 1.0
    assert aligned_weight([0.35, 0.35], [-0.15], "each") == pytest.approx(0.8607079764, abs=1e-10)
