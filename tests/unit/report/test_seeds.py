"""Several training seeds: one row per configuration, every run still there, and only claims that hold adjusted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from synthetic_comparison import few_cells, seeded

from rayalign.report.estimates import summarize
from rayalign.report.points import ComparisonRecord
from rayalign.report.render import render_report
from rayalign.report.replication import two_level
from rayalign.report.statistics import Bootstrap, half_of, in_half
from rayalign.report.summary import Summary

GIVEN = seeded(few_cells(num_prompts=12))
QUICK = Bootstrap(resamples=100)


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarize(ComparisonRecord.model_validate(GIVEN), QUICK)


def scores(entry: str, step: int, prompt_set: str = "shop") -> np.ndarray:
    """[S, P]"""
    cells = [cell for cell in GIVEN["cells"] if cell["entry"] == entry]
    return np.array(
        [
            np.mean(point["scores"]["oracle"], axis=1)
            for cell in cells
            for point in cell["points"]
            if (point["step"], point["prompt_set"]) == (step, prompt_set)
        ]
    )


def test_an_entry_is_the_mean_of_its_seeds_with_the_two_level_interval(summary: Summary) -> None:
    (point,) = [point for point in summary.path("dpo, on", "shop") if point.step == 100]
    values = scores("dpo, on", 100)
    assert values.shape == (3, 12)
    assert point.scores["oracle"].mean == pytest.approx(values.mean())
    assert point.scores["oracle"] == two_level(values, QUICK, stream=1)
    assert (point.num_seeds, point.of_seeds) == (3, 3)


def test_every_run_keeps_its_own_row(summary: Summary) -> None:
    (run,) = [point for point in summary.of("dpo-on_policy__seed-2", "shop") if point.step == 100]
    assert run.scores["oracle"].mean == pytest.approx(scores("dpo, on", 100)[2].mean())
    assert run.num_seeds == run.of_seeds == 1


def test_per_token_is_the_ratio_of_sums(summary: Summary) -> None:
    point = GIVEN["cells"][0]["points"][2]
    (run,) = [run for run in summary.of("dpo-off_policy__seed-0", "shop") if run.step == point["step"]]
    assert run.kl_per_token["k1"].mean == pytest.approx(np.sum(point["kl"]["k1"]) / np.sum(point["length"]))


def test_a_level_says_how_many_seeds_reach_it(summary: Summary) -> None:
    rows = {row.level: row.crossings["oracle"] for row in summary.seed_crossings("orpo, off", "shop")}
    singles = [summary.crossings(f"orpo__seed-{seed}", "shop") for seed in range(3)]
    for index, level in enumerate((1.0, 2.0, 5.0)):
        reached = [single[index].crossings["oracle"] for single in singles]
        found = [crossing.score for crossing in reached if crossing]
        assert (rows[level].reached, rows[level].seeds) == (len(found), 3)
        if found:
            assert rows[level].score == pytest.approx(np.mean(found))
    assert rows[5.0].reached == 0  # its one checkpoint is near 1.6


def test_differences_are_all_pairs_under_all_scorers(summary: Summary) -> None:
    assert [(row.entry, row.other, row.scorer) for row in summary.differences] == [
        (one, other, scorer)
        for scorer in ("oracle", "audit2")
        for one, other in (("dpo, off", "dpo, on"), ("dpo, off", "orpo, off"), ("dpo, on", "orpo, off"))
    ]
    row = summary.differences[0]
    assert row.found.mean == pytest.approx(scores("dpo, off", 100).mean() - scores("dpo, on", 100).mean())
    assert row.adjusted_p >= row.found.p


def test_the_chosen_checkpoint_is_measured_on_the_other_half(summary: Summary) -> None:
    prompts = GIVEN["prompt_sets"][0]["prompts"]
    select = np.array([half_of(prompt) == "select" for prompt in prompts])
    (row,) = [row for row in summary.chosen if (row.entry, row.prompt_set) == ("dpo, on", "shop")]
    means = {step: scores("dpo, on", step)[:, select].mean() for step in (20, 50, 100)}
    assert row.step == max(means, key=lambda step: means[step])
    assert row.scores["oracle"].mean == pytest.approx(scores("dpo, on", row.step)[:, ~select].mean())
    assert (row.num_select, row.num_report) == (select.sum(), (~select).sum())


def test_halves_are_halves_and_a_matter_of_the_text_alone() -> None:
    prompts = [f"prompt {index}" for index in range(2000)]
    select = in_half(prompts, "select")
    assert 900 < select.sum() < 1100
    assert (select != in_half(prompts, "report")).all()
    assert (in_half(prompts[::-1], "select")[::-1] == select).all()
    assert [half_of(text) for text in ("a", "b", "Why?")] == ["select", "select", "report"]


def alike(given: dict[str, Any]) -> dict[str, Any]:
    """The same with every run's points those of the first, which no seed changes: nothing differs."""
    points = given["cells"][0]["points"]
    return given | {"cells": [cell | {"points": points} if cell["points"] else cell for cell in given["cells"]]}


def better(given: dict[str, Any]) -> dict[str, Any]:
    """The same with on-policy far ahead at its last step."""
    for cell in given["cells"]:
        if cell["entry"] == "dpo, on":
            for point in cell["points"]:
                point["scores"] = {name: (np.array(rows) + 5).tolist() for name, rows in point["scores"].items()}
    return given


def written(given: dict[str, Any], folder: Path) -> tuple[str, str, dict[str, Any]]:
    page = render_report(ComparisonRecord.model_validate(given), folder)
    results = json.loads(page.with_name("results.json").read_text())
    return page.read_text(), page.with_name("report.md").read_text(), results


def test_the_files_say_seeds_and_call_better_what_the_table_says(tmp_path: Path) -> None:
    html, markdown, results = written(better(seeded(few_cells(num_prompts=8))), tmp_path)
    for text in (html, markdown):
        assert "interval over training seeds and prompts" in text
        assert "interval over prompts, one training run" not in text
        assert "dpo, on is better" in text and "Holm-adjusted over all 6 differences" in text
        assert "dpo, off is better" not in text and "not told apart" in text
        assert "not reached" in text and "of 3 seeds" in text
    assert "| dpo, on (on-policy; 3 of 3 seeds) | 100 |" in markdown
    assert "orpo, off (3 of 3 seeds failed)" in markdown
    assert "every training run by itself" in html
    assert results["interval"]["unit"] == "training seed and prompt"
    assert {row["better"] for row in results["differences"]} == {"dpo, on", ""}
    assert len(results["points"]) == 2 + 3 * 13 and len(results["entry_points"]) == 2 + 13
    assert results["entries"][0] == {
        "id": "dpo, off", "label": "dpo, off", "cells": [f"dpo-off_policy__seed-{seed}" for seed in range(3)]
    }  # fmt: skip


def test_nothing_is_better_where_nothing_differs(tmp_path: Path) -> None:
    html, markdown, results = written(alike(seeded(few_cells(num_prompts=8))), tmp_path)
    assert {row["better"] for row in results["differences"]} == {""}
    for text in (html, markdown):
        assert " is better" not in text and "not told apart" in text


def test_one_seed_is_called_better_nowhere(tmp_path: Path) -> None:
    """Not even where it is far ahead; nor beside others that have several."""
    given = better(few_cells(num_prompts=8) | {"cells": [c | {"entry": c["label"]} for c in few_cells(8)["cells"]]})
    html, markdown, results = written(given, tmp_path / "alone")
    assert results["differences"] == []
    for text in (html, markdown):
        assert "None is tested: every cell is one training run" in text
        assert set(re.findall(r"[^.;]*\bbetter\b[^.]*", text.split("<style>")[0] + text.split("</style>")[-1])) == {
            sentence for sentence in re.findall(r"[^.;]*calls no cell better than another[^.]*", text)
        }
    mixed = seeded(few_cells(num_prompts=8))
    mixed["cells"] = [cell for cell in mixed["cells"] if cell["entry"] != "dpo, on" or cell["seed"] == 0]
    html, markdown, results = written(better(mixed), tmp_path / "mixed")
    assert {row["entry"] for row in results["differences"]} == {"dpo, off"}
    assert "1 of 1 seeds: interval over prompts" in html
    assert "| dpo, on, seed=0 (on-policy; 1 of 1 seeds: interval over prompts) | 100 |" in markdown
    assert "it is called neither better nor worse than anything" in markdown


def test_tables_stay_rectangular(tmp_path: Path) -> None:
    html, markdown, _ = written(seeded(few_cells(num_prompts=5)), tmp_path)
    for table in re.findall(r'<table class="sortable">.*?</table>', html, flags=re.DOTALL):
        head, body = table.split("</thead>")
        columns = re.findall(r'<th scope="col"( class="num")? aria-sort="none"><button type="button">', head)
        for row in re.findall(r"<tr>.*?</tr>", body, flags=re.DOTALL):
            assert len(re.findall(r'<t[hd][^>]* data-value="[^"]*"', row)) == len(columns)
    for block in re.split(r"\n(?!\|)", markdown):
        assert len({line.count("|") for line in block.splitlines() if line.startswith("|")}) <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "entry 'dpo, off': seed: 1 more than once"),
        ({"data_policy": "hybrid"}, "must share display_name and data_policy"),
        ({"label": "dpo, on"}, "entry 'dpo, on': is the id or label of a cell as well"),
    ],
)
def test_an_entry_is_one_configuration(change: dict[str, Any], message: str) -> None:
    given = seeded(few_cells())
    given["cells"][0] = given["cells"][0] | change
    with pytest.raises(ValidationError, match=message):
        ComparisonRecord.model_validate(given)
