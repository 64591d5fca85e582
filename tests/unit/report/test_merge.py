"""Several comparisons in one report: which may stand together, under which names, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_comparison import few_cells, seeded

from rayalign.cli import main
from rayalign.errors import UserError
from rayalign.report.estimates import summarize
from rayalign.report.merge import measured_differences, merge, merge_folders
from rayalign.report.points import ComparisonRecord, load_comparison, save_comparison
from rayalign.report.render import render_report
from rayalign.report.statistics import Bootstrap

MEASURED = {"reference": "r", "prompts": "p", "scorers": "s", "package": "v"}


def comparison(name: str, **changes: Any) -> ComparisonRecord:
    return ComparisonRecord.model_validate(few_cells() | {"name": name, "measured": MEASURED} | changes)


def renamed(given: dict[str, Any], suffix: str) -> list[dict[str, Any]]:
    return [cell | {"id": cell["id"] + suffix, "label": cell["label"] + suffix} for cell in given["cells"]]


def test_cells_of_all_stand_under_their_own_names_with_their_own_numbers() -> None:
    first, second = comparison("one"), comparison("two", cells=renamed(few_cells(), "-b"))
    merged = merge([("runs/one", first), ("runs/two", second)])
    assert [cell.id for cell in merged.cells] == [cell.id for cell in (*first.cells, *second.cells)]
    assert [(part.name, part.cells) for part in merged.parts] == [
        ("one", tuple(cell.id for cell in first.cells)),
        ("two", tuple(cell.id for cell in second.cells)),
    ]
    quick = Bootstrap(resamples=50)
    alone = {point.cell: point for point in summarize(second, quick).points}
    together = {point.cell: point for point in summarize(merged, quick).points}
    cell = second.cells[0].id
    assert together[cell].scores == alone[cell].scores and together[cell].kl == alone[cell].kl
    ComparisonRecord.model_validate(merged.model_dump())


def test_equal_names_are_told_apart_everywhere() -> None:
    tuning = {"label": "dpo", "cells": [few_cells()["cells"][0]["id"]], "asked": 2, "seeds": [9], "scorer": "oracle",
              "prompt_set": "shop", "num_prompts": 2}  # fmt: skip
    given = seeded(few_cells(), seeds=2)
    same = ComparisonRecord.model_validate(
        given | {"name": "quick", "measured": MEASURED, "tuning": [tuning | {"cells": [given["cells"][0]["id"]]}]}
    )
    merged = merge([("a", same), ("b", same)])
    ComparisonRecord.model_validate(merged.model_dump())
    assert merged.name == "quick + quick (2)"
    assert (
        merged.cells[0].id == f"quick: {same.cells[0].id}" and merged.cells[0].entry == f"quick: {same.cells[0].entry}"
    )
    assert merged.tuning[1].cells == (f"quick (2): {same.cells[0].id}",)
    assert len(summarize(merged, Bootstrap(resamples=20)).entries) == 2 * len(
        summarize(same, Bootstrap(resamples=20)).entries
    )


def test_beside_tuned_cells_the_others_are_called_untuned(tmp_path: Path) -> None:
    tuning = {"label": "dpo, off", "cells": [few_cells()["cells"][0]["id"]], "asked": 2, "seeds": [9],
              "scorer": "oracle", "prompt_set": "shop", "num_prompts": 2}  # fmt: skip
    first = comparison("one", tuning=[tuning])
    page = render_report(merge([("a", first), ("b", comparison("two", cells=renamed(few_cells(), "-b")))]), tmp_path)
    for text in (page.read_text(), page.with_name("report.md").read_text()):
        assert "Untuned: dpo, on, orpo, off, dpo, off-b, dpo, on-b, orpo, off-b." in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"measured": MEASURED | {"reference": "x"}}, ["the reference model"]),
        (
            {"measured": MEASURED | {"scorers": "x", "package": "w"}},
            ["the scorers' code or weights", "the version of rayalign"],
        ),
        ({"sampling": {"seed": 8, "temperature": 1.0, "max_new_tokens": 72}}, ["the sampling"]),
        ({"diagnostics": []}, ["the diagnostics"]),
    ],
)
def test_another_measurement_is_named(change: dict[str, Any], reason: list[str]) -> None:
    given = few_cells()
    if "diagnostics" in change:
        for point in [*given["reference"], *(point for cell in given["cells"] for point in cell["points"])]:
            point["diagnostics"] = {}
    other = ComparisonRecord.model_validate(given | {"name": "other", "measured": MEASURED} | change)
    assert measured_differences(comparison("one"), other) == reason
    with pytest.raises(UserError, match=rf"nothing to merge: other \(b\) differs from one in {reason[0]}"):
        merge([("a", comparison("one")), ("b", other)])


def test_other_prompts_are_named_and_older_files_are_judged_by_the_references_numbers() -> None:
    given = few_cells()
    given["prompt_sets"][0]["prompts"][0] = "Another one?"
    assert measured_differences(comparison("one"), ComparisonRecord.model_validate(given | {"measured": MEASURED})) == [
        "the prompts"
    ]
    old = comparison("old", measured={})
    assert measured_differences(comparison("one"), old) == []
    moved = few_cells()
    moved["reference"][0]["scores"]["oracle"][0][0] = 0.123
    assert measured_differences(old, ComparisonRecord.model_validate(moved)) == ["the numbers of the reference"]


def test_the_command_line_merges_what_it_can_and_names_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, measured in (("one", MEASURED), ("two", MEASURED), ("three", MEASURED | {"reference": "x"})):
        save_comparison(comparison(name, measured=measured), tmp_path / name)
    folders = [str(tmp_path / name) for name in ("one", "two", "three")]
    monkeypatch.setattr("sys.argv", ["rayalign", "report", *folders, "--out", str(tmp_path / "all")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert f"left out: three ({folders[2]}) differs from one in the reference model" in capsys.readouterr().out
    report = tmp_path / "all" / "report"
    results = json.loads((report / "results.json").read_text())
    assert [part["name"] for part in results["parts"]] == ["one", "two"] and len(results["cells"]) == 8
    for text in ((report / "report.html").read_text(), (report / "report.md").read_text()):
        assert "Merged of 2 comparisons that were measured the same way: one, two." in text
        assert "which differs from one in the reference model" in text
    assert load_comparison(tmp_path / "all").parts[0].name == "one"


def test_folders_are_distinct_and_the_report_has_its_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_comparison(comparison(name), tmp_path / name)
    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.raises(UserError, match="a folder is given twice"):
        merge_folders([one, tmp_path / "two" / ".." / "one"], tmp_path / "all")
    for out in (None, one):
        with pytest.raises(UserError, match="say where: --out"):
            merge_folders([one, two], out)
    with pytest.raises(UserError, match="holds no comparison.json"):
        merge_folders([one, tmp_path], tmp_path / "all")
