"""Estimates of a made-up comparison, recomputed from its raw numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from synthetic_comparison import against_another, comparison_input, few_cells, judged

from rayalign.report.estimates import summarize
from rayalign.report.points import BASELINE, ComparisonRecord
from rayalign.report.statistics import Bootstrap
from rayalign.report.summary import Summary

GIVEN = comparison_input(num_prompts=6, num_samples=3)


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarize(ComparisonRecord.model_validate(GIVEN), Bootstrap(resamples=50))


def raw(cell: int, point: int) -> dict[str, Any]:
    found: dict[str, Any] = GIVEN["cells"][cell]["points"][point]
    return found


def test_means_are_those_of_the_raw_numbers(summary: Summary) -> None:
    found = summary.of("dpo-off_policy", "travel")[1]
    given = raw(0, 4)
    assert (found.step, found.num_samples, found.length.n) == (50, 3, 6)
    assert found.scores["oracle"].mean == pytest.approx(np.mean(given["scores"]["oracle"]))
    assert found.kl["k1_rb"].mean == pytest.approx(np.mean(given["kl"]["k1_rb"]))
    assert found.length.mean == pytest.approx(np.mean(given["length"]))
    assert found.cut.mean == pytest.approx(1 - np.mean(given["finished"]))
    assert found.diagnostics["no_valid_opening"].mean == pytest.approx(
        np.mean(given["diagnostics"]["no_valid_opening"])
    )
    change = np.mean(given["scores"]["audit2"]) - np.mean(GIVEN["reference"][1]["scores"]["audit2"])
    assert found.changes["audit2"].mean == pytest.approx(change)


def test_win_rate_is_over_all_pairings_with_the_reference(summary: Summary) -> None:
    policy, reference = raw(2, 2)["scores"]["oracle"], GIVEN["reference"][0]["scores"]["oracle"]
    wins = [(a > b) + 0.5 * (a == b) for p, r in zip(policy, reference, strict=True) for a in p for b in r]
    assert summary.of("dpo-on_policy", "shop")[-1].win_rates["oracle"].mean == pytest.approx(np.mean(wins))


def test_the_reference_changes_nothing_and_ties_with_itself(summary: Summary) -> None:
    (reference,) = summary.of("reference", "shop")
    assert reference.step == 0
    assert reference.changes["oracle"].mean == reference.changes["oracle"].high == 0
    assert reference.win_rates["audit2"].mean == 0.5
    assert "oracle" in reference.on_front  # nothing has a KL below zero on average


def test_front_is_of_one_prompt_set_and_one_scorer(summary: Summary) -> None:
    for prompt_set in ("shop", "travel"):
        points = [point for point in summary.points if point.prompt_set == prompt_set]
        for scorer in ("oracle", "audit2"):
            ordered = sorted(points, key=lambda point: (point.kl["k1"].mean, -point.scores[scorer].mean))
            best, expected = -np.inf, set()
            for point in ordered:
                if point.scores[scorer].mean > best:
                    best = point.scores[scorer].mean
                    expected.add((point.cell, point.step))
            assert {(point.cell, point.step) for point in points if scorer in point.on_front} == expected


def test_every_cell_with_points_has_every_level(summary: Summary) -> None:
    assert [row.level for row in summary.crossings("rloo-on_policy", "shop")] == [1.0, 2.0, 5.0]
    assert summary.crossings("rloo-on_policy", "shop")[2].crossings["oracle"] is None
    crossing = summary.crossings("dpo-off_policy", "shop")[0].crossings["oracle"]
    assert crossing is not None and crossing.from_step == 0
    assert summary.crossings("ppo", "shop") == ()


def test_last_points_keep_the_order_of_the_cells(summary: Summary) -> None:
    last = summary.last("shop")
    assert [point.cell for point in last][:3] == ["reference", "dpo-off_policy", "dpo-hybrid"]
    assert {point.cell: point.step for point in last}["orpo"] == 20
    assert [point.cell for point in summary.last("travel")][-1] == "rloo-on_policy"


def test_the_judges_win_rate_is_the_mean_of_its_verdicts() -> None:
    given = judged(few_cells(num_prompts=5, num_samples=3))
    found = summarize(ComparisonRecord.model_validate(given), Bootstrap(resamples=50))
    verdicts = np.array(given["cells"][0]["points"][2]["verdicts"], dtype=float)
    point = found.of("dpo-off_policy", "shop")[-1]
    assert point.judged is not None
    assert point.judged.mean == pytest.approx(np.nanmean(verdicts, axis=1).mean())
    assert point.judged.low < point.judged.mean < point.judged.high and point.judged.n == 5
    (reference,) = found.of("reference", "shop")
    assert reference.judged is not None and reference.judged.mean == reference.judged.low == 0.5
    assert summarize(ComparisonRecord.model_validate(few_cells())).points[0].judged is None


def test_what_was_asked_is_summed_over_steps_and_prompt_sets() -> None:
    found = summarize(
        ComparisonRecord.model_validate(judged(few_cells(num_prompts=4, num_samples=2))), Bootstrap(resamples=9)
    )
    rows = {row.cell: row for row in found.answers}
    assert list(rows) == ["dpo-off_policy", "dpo-on_policy", "orpo"]
    row = rows["dpo-off_policy"]  # two prompt sets, three steps
    assert (row.replies, row.calls, row.failures, row.ties, row.disagreements, row.missing) == (48, 132, 48, 12, 6, 6)
    assert rows["orpo"].calls == 22
    assert row.problem.startswith("careful at")


def test_wins_are_counted_against_the_baseline_and_changes_against_the_reference() -> None:
    given = against_another(few_cells(num_prompts=5, num_samples=2))
    found = summarize(ComparisonRecord.model_validate(given), Bootstrap(resamples=9))
    policy = given["cells"][0]["points"][2]["scores"]["oracle"]
    other = given["baseline"]["points"][0]["scores"]["oracle"]
    wins = [(a > b) + 0.5 * (a == b) for p, r in zip(policy, other, strict=True) for a in p for b in r]
    point = found.of("dpo-off_policy", "shop")[-1]
    assert point.win_rates["oracle"].mean == pytest.approx(np.mean(wins))
    reference = given["reference"][0]["scores"]["oracle"]
    assert point.changes["oracle"].mean == pytest.approx(np.mean(policy) - np.mean(reference))
    (baseline,), (start,) = found.of(BASELINE, "shop"), found.of("reference", "shop")
    assert baseline.win_rates["oracle"].mean == 0.5 and start.win_rates["oracle"].low < 0.5
    assert [point.cell for point in found.last("shop")][:2] == ["reference", BASELINE]
    assert all(row.cell != BASELINE for row in found.at_kl)
