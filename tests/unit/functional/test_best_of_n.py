"""Best-of-n in closed form, against counting all draws."""

from __future__ import annotations

import itertools

import pytest
import torch

from rayalign.functional.best_of_n import best_of_n_distribution
from rayalign.functional.kl import exact_kl
from rayalign.report.best_of_n import kl_bound


def test_distribution_equals_counting_all_triples() -> None:
    probability = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    reward = torch.tensor([0.1, 2.0, -1.0], dtype=torch.float64)
    counted = torch.zeros(3, dtype=torch.float64)
    for triple in itertools.product(range(3), repeat=3):
        counted[max(triple, key=lambda i: float(reward[i]))] += probability[list(triple)].prod()
    torch.testing.assert_close(best_of_n_distribution(probability, reward, n=3), counted)


def test_one_draw_changes_nothing() -> None:
    probability = torch.tensor([0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(best_of_n_distribution(probability, torch.tensor([1.0, 0.0]), n=1), probability)
    assert kl_bound(1) == 0


@pytest.mark.parametrize("n", [2, 8])
def test_kl_stays_below_the_bound_and_reaches_it_for_many_small_outcomes(n: int) -> None:
    probability = torch.full((4000,), 1 / 4000, dtype=torch.float64)
    best = best_of_n_distribution(probability, torch.arange(4000.0), n=n)
    kl = exact_kl(best.log()[None], probability.log()[None]).item()
    assert kl <= kl_bound(n) + 1e-12
    assert kl == pytest.approx(kl_bound(n), abs=1e-2)
