"""Intervals over seeds and prompts, and differences, against simulation, tables and hand-made numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from rayalign.report.differences import Contender, entry_differences
from rayalign.report.replication import Difference, Replicated, detectable, difference, holm, replicated, two_level
from rayalign.report.statistics import Bootstrap, Estimate, Matrix, estimate_mean, quantile, two_sided_p

QUICK = Bootstrap(resamples=300)
SEED_SPREAD, PROMPT_SPREAD, NOISE = 0.1, 0.3, 0.4


def simulated(random: np.random.Generator, *, seeds: int, prompts: np.ndarray) -> Matrix:
    """[S, P] around 0: every seed is a little better or worse on all prompts, every prompt easier for all seeds."""
    effect = random.normal(0, SEED_SPREAD, (seeds, 1))
    return effect + prompts + random.normal(0, NOISE, (seeds, len(prompts)))


def coverage(interval: Callable[[Matrix], Estimate], *, runs: int) -> float:
    random = np.random.default_rng(20)
    covered = 0
    for _ in range(runs):
        found = interval(simulated(random, seeds=5, prompts=random.normal(0, PROMPT_SPREAD, 40)))
        covered += found.low <= 0 <= found.high
    return covered / runs


def nominal(share: float, runs: int) -> bool:
    """Within three standard errors of 95 %, or above: conservative is allowed, up to 99.5 %."""
    return 0.95 - 3 * math.sqrt(0.95 * 0.05 / runs) <= share <= 0.995


def prompts_only(values: Matrix) -> Estimate:
    return estimate_mean(values.mean(axis=0), QUICK)


def one_seed_as_all(values: Matrix) -> Estimate:
    return estimate_mean(values[0], QUICK)


def nested(values: Matrix) -> Estimate:
    """Prompts drawn anew within each seed, percentiles: what the module's docstring warns of."""
    random = np.random.default_rng(0)
    S, P = values.shape
    rows, columns = random.integers(S, size=(300, S, 1)), random.integers(P, size=(300, S, P))
    low, high = np.quantile(values[rows, columns].mean(axis=(1, 2)), [0.025, 0.975])
    return Estimate(mean=float(values.mean()), low=float(low), high=float(high), n=P)


def test_the_interval_covers_under_a_seed_effect_and_one_over_prompts_does_not() -> None:
    assert nominal(coverage(lambda values: two_level(values, QUICK), runs=600), 600)
    assert not nominal(coverage(prompts_only, runs=600), 600)
    assert not nominal(coverage(one_seed_as_all, runs=600), 600)
    assert not nominal(coverage(nested, runs=600), 600)


def test_the_standard_error_is_that_of_the_two_way_design() -> None:
    """E[SE²] = σ_seed² / S + σ_prompt² / P + σ_noise² / SP."""
    random = np.random.default_rng(1)
    S, P = 4, 30
    squares = []
    for _ in range(400):
        found = two_level(simulated(random, seeds=S, prompts=random.normal(0, PROMPT_SPREAD, P)), QUICK)
        squares.append(((found.high - found.mean) / quantile(0.975, S - 1)) ** 2)
    expected = SEED_SPREAD**2 / S + PROMPT_SPREAD**2 / P + NOISE**2 / (S * P)
    assert np.mean(squares) == pytest.approx(expected, rel=0.08)


def test_one_seed_is_the_interval_over_prompts() -> None:
    values = np.random.default_rng(0).normal(size=(1, 30))
    assert two_level(values, Bootstrap()) == estimate_mean(values[0], Bootstrap())


def test_two_equal_seeds_still_have_the_width_of_the_prompts() -> None:
    row = np.random.default_rng(0).normal(size=30)
    found = two_level(np.stack([row, row]), Bootstrap(resamples=5000))
    half = quantile(0.975, 1) * row.std() / math.sqrt(30)
    assert found.high - found.mean == pytest.approx(half, rel=0.05)


def test_missing_values_are_left_out() -> None:
    values = np.array([[1.0, 2.0, math.nan], [3.0, math.nan, math.nan]])
    found = two_level(values, Bootstrap())
    assert (found.mean, found.n) == (2.0, 2)
    gone = two_level(np.array([[1.0, 2.0], [math.nan, math.nan]]), Bootstrap())
    assert gone.mean == 1.5 and math.isnan(gone.low)
    assert math.isnan(two_level(np.full((2, 3), math.nan), Bootstrap()).mean)


def test_pairing_by_prompt_removes_what_prompts_share() -> None:
    random = np.random.default_rng(0)
    prompts = random.normal(0, 5, 40)
    a, b = (replicated(prompts + random.normal(0, 0.1, (3, 40)) + shift, QUICK, stream=index)
            for index, shift in enumerate((1.0, 0.5)))  # fmt: skip
    found = difference(a, b, QUICK)
    assert found.standard_error < 0.05 < 5 / math.sqrt(40)
    assert found.low < 0.5 < found.high


def test_welchs_degrees_of_freedom_and_p_by_hand() -> None:
    """Seeds that answer every prompt alike: the two-sample t-test of their means. (0, 2, 4) against (10, 11, 12):
    s² = 4 and 1, variances 4/3 and 1/3, df = (5/3)² / ((16/9 + 1/9) / 2) = 50/17, t = −9 / √(5/3)."""
    bootstrap = Bootstrap(resamples=50_000)
    a, b = (replicated(np.repeat(np.array(means)[:, None], 4, axis=1), bootstrap, stream=index)
            for index, means in enumerate(([0.0, 2.0, 4.0], [10.0, 11.0, 12.0])))  # fmt: skip
    found = difference(a, b, bootstrap)
    assert found.mean == -9
    assert found.standard_error == pytest.approx(math.sqrt(5 / 3), rel=0.02)
    assert found.degrees_of_freedom == pytest.approx(50 / 17)
    assert found.p == pytest.approx(two_sided_p(9 / math.sqrt(5 / 3), 50 / 17), rel=0.1)


@pytest.mark.parametrize(
    ("df", "probability", "expected"),
    [(1, 0.975, 12.706), (2, 0.975, 4.303), (4, 0.975, 2.776), (9, 0.995, 3.250), (30, 0.95, 1.697), (4, 0.8, 0.941)],
)
def test_quantiles_of_the_printed_table(df: float, probability: float, expected: float) -> None:
    assert quantile(probability, df) == pytest.approx(expected, abs=6e-4)
    assert two_sided_p(expected, df) == pytest.approx(2 * (1 - probability), rel=3e-3)


def test_t_with_one_degree_of_freedom_is_cauchys() -> None:
    for t in (0.0, 0.5, 3.0, 1000.0):
        assert two_sided_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t))
    # With two: 1 − t / √(2 + t²), far out too, where most of a sum would cancel.
    assert two_sided_p(1e4, 2) == pytest.approx(1e-8, rel=1e-3)


def test_where_nothing_varies_nothing_is_told_apart() -> None:
    """Two seeds that agree on every prompt have no spread to judge a difference by: no certainty comes of that."""
    a, b = (
        Contender(entry=name, scorer="s", step=1, replicated=replicated(np.full((2, 5), value), QUICK))
        for name, value in (("a", 0.0), ("b", 1.0))
    )
    (row,) = entry_differences([a, b], QUICK)
    assert (row.found.mean, row.adjusted_p, row.better) == (-1.0, 1.0, "")
    assert math.isnan(row.detectable)


def test_holm_by_hand() -> None:
    """0.01 · 4, then max(0.04, 0.02 · 3), max(0.06, 0.03 · 2), max(0.06, 0.5)."""
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.4, 0.6]) == [0.8, 0.8]
    assert holm([]) == []


def test_the_detectable_difference_by_hand() -> None:
    """df = 4: t_{0.975} = 2.776, t_{0.995} = 4.604 (five comparisons), t_{0.8} = 0.941."""
    found = Difference(mean=0, low=0, high=0, standard_error=2.0, degrees_of_freedom=4.0, p=1)
    assert detectable(found, 1) == pytest.approx(2 * (2.776 + 0.941), abs=3e-3)
    assert detectable(found, 5) == pytest.approx(2 * (4.604 + 0.941), abs=3e-3)


def reports_with_a_better_entry(runs: int) -> float:
    """27 cells, all alike: nine entries of three seeds. The share of reports in which any is called better."""
    random = np.random.default_rng(4)
    bootstrap = Bootstrap(resamples=200)
    found = 0
    for _ in range(runs):
        prompts = random.normal(0, PROMPT_SPREAD, 24)
        entries = [
            Contender(
                entry=str(index),
                scorer="oracle",
                step=1,
                replicated=replicated(simulated(random, seeds=3, prompts=prompts), bootstrap, stream=index),
            )
            for index in range(9)
        ]
        found += any(row.better for row in entry_differences(entries, bootstrap))
    return found / runs


def test_of_identical_cells_hardly_a_report_calls_one_better() -> None:
    assert reports_with_a_better_entry(80) <= 0.05


@pytest.mark.slow
def test_of_identical_cells_hardly_a_report_calls_one_better_at_length() -> None:
    assert reports_with_a_better_entry(1000) <= 0.05


def test_a_large_difference_is_found_and_named_in_either_order() -> None:
    random = np.random.default_rng(2)
    prompts = random.normal(0, 1, 30)

    def contender(name: str, shift: float, stream: int) -> Contender:
        values = prompts + shift + random.normal(0, 0.02, (4, 1)) + random.normal(0, 0.1, (4, 30))
        return Contender(entry=name, scorer="s", step=3, replicated=replicated(values, QUICK, stream=stream))

    good, plain, bad = contender("good", 1.0, 0), contender("plain", 0.0, 1), contender("bad", -1.0, 2)
    rows = entry_differences([plain, good, bad], QUICK)
    assert [(row.entry, row.other, row.better) for row in rows] == [
        ("plain", "good", "good"), ("plain", "bad", "plain"), ("good", "bad", "good")
    ]  # fmt: skip
    assert all(row.adjusted_p < 0.05 and row.detectable < 0.3 for row in rows)
    assert rows[0].seeds == (4, 4)


def test_an_entry_without_a_variance_between_seeds_is_compared_with_nothing() -> None:
    alone = Contender(entry="a", scorer="s", step=1, replicated=replicated(np.ones((1, 3)), QUICK))
    pair = Contender(entry="b", scorer="s", step=1, replicated=replicated(np.ones((2, 3)), QUICK))
    assert entry_differences([alone, pair], QUICK) == ()
    assert isinstance(alone.replicated, Replicated) and math.isnan(alone.replicated.seeds)
