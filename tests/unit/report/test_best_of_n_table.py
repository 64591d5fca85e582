"""Best of n from samples: against counting subsets, against the exact distribution, and in the report."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_comparison import comparison_input, few_cells

from rayalign.functional.best_of_n import best_of_n_distribution
from rayalign.report.best_of_n import best_of_n, expected_best, kl_bound
from rayalign.report.estimates import summarize
from rayalign.report.points import ComparisonRecord
from rayalign.report.results_json import results_json
from rayalign.report.statistics import Bootstrap


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_it_is_the_mean_over_all_subsets(n: int) -> None:
    samples = np.array([[0.3, -1.0, 2.0, 2.0, 0.5], [7.0, 7.0, 7.0, 7.0, 7.0]])
    expected = [np.mean([max(subset) for subset in itertools.combinations(row, n)]) for row in samples]
    assert expected_best(samples, n) == pytest.approx(expected, rel=1e-12)


def test_three_samples_by_hand() -> None:
    """Of 1, 2, 4 the pairs have the maxima 2, 4, 4."""
    assert expected_best(np.array([[4.0, 1.0, 2.0]]), 2).tolist() == [pytest.approx(10 / 3)]


def test_missing_samples_are_left_out_and_too_few_give_nothing() -> None:
    samples = np.array([[4.0, np.nan, 2.0, 1.0], [np.nan, np.nan, 1.0, 3.0]])
    assert expected_best(samples, 2).tolist() == [pytest.approx(10 / 3), 3.0]
    found = expected_best(samples, 4)
    assert np.isnan(found).all()


def test_it_is_unbiased() -> None:
    """Over every sample of four draws, weighted by its probability: the reward of the exact best-of-2 distribution."""
    probability, reward = np.array([0.5, 0.2, 0.3]), np.array([0.1, 2.0, -1.0])
    draws = np.array(list(itertools.product(range(3), repeat=4)))
    mean = float(expected_best(reward[draws], 2) @ probability[draws].prod(axis=1))
    best = best_of_n_distribution(torch.from_numpy(probability), torch.from_numpy(reward), n=2)
    assert mean == pytest.approx(float(best @ torch.from_numpy(reward)), rel=1e-12)


def test_v34() -> None:
    """All 4^4 samples of the vector's distribution, each with its probability."""
    vectors = json.loads((Path(__file__).parents[2] / "fixtures" / "vectors.json").read_text())["vectors"]
    vector = next(vector for vector in vectors if vector["id"] == "V34")
    probability, reward = np.array(vector["inputs"]["pi"]), np.array(vector["inputs"]["reward"])
    draws = np.array(list(itertools.product(range(4), repeat=4)))
    mean = float(expected_best(reward[draws], vector["params"]["n"]) @ probability[draws].prod(axis=1))
    assert mean == pytest.approx(vector["expected"]["expected_reward_bon"], rel=1e-9)
    assert kl_bound(4) == pytest.approx(vector["expected"]["kl_bound"], rel=1e-9)


def test_sizes_are_powers_of_two_up_to_the_samples() -> None:
    for samples, sizes in ((1, []), (2, [1, 2]), (3, [1, 2]), (4, [1, 2, 4]), (9, [1, 2, 4, 8])):
        given = ComparisonRecord.model_validate(comparison_input(num_prompts=3, num_samples=samples))
        found = best_of_n(given.reference[0], Bootstrap(resamples=10))
        assert [row.n for row in found] == sizes
        assert [row.kl_bound for row in found] == pytest.approx([kl_bound(n) for n in sizes])


def test_the_bound_by_hand() -> None:
    assert kl_bound(1) == 0 and kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_one_draw_is_the_reference_itself_and_more_are_better() -> None:
    given = ComparisonRecord.model_validate(few_cells(num_prompts=5, num_samples=4))
    summary = summarize(given, Bootstrap(resamples=20))
    for prompt_set in ("shop", "travel"):
        (reference,) = summary.of("reference", prompt_set)
        rows = summary.best(prompt_set)
        for scorer in ("oracle", "audit2"):
            assert rows[0].scores[scorer].mean == pytest.approx(reference.scores[scorer].mean)
            means = [row.scores[scorer].mean for row in rows]
            assert means == sorted(means) and len(means) == 3


def test_results_carry_it() -> None:
    given = ComparisonRecord.model_validate(few_cells())
    assert '"best_of_n": [\n  {\n   "prompt_set": "shop",\n   "n": 1,\n   "kl_bound": 0.0' in results_json(
        given, summarize(given, Bootstrap(resamples=20))
    )
