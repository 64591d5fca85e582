"""Everybody against everybody: shares by hand, and what seeds do to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from synthetic_comparison import few_cells, seeded

from rayalign.report.entries import entries_of
from rayalign.report.matrix import contests, contests_by_pair
from rayalign.report.points import REFERENCE, ComparisonRecord
from rayalign.report.statistics import Bootstrap

QUICK = Bootstrap(resamples=200)


def table(given: dict[str, Any]) -> Any:
    comparison = ComparisonRecord.model_validate(given)
    return contests_by_pair(list(contests(comparison, entries_of(comparison.cells), QUICK)))


def test_a_share_is_that_of_all_pairings_of_a_prompt() -> None:
    """Scores (1, 3) against (2, 2): of four pairings two are won; (1, 1) against (1, 0): one won, one tied, twice."""
    given = few_cells(num_prompts=3)
    first, second = given["cells"][:2]
    first["points"][2]["scores"]["oracle"] = [[1.0, 3.0], [1.0, 1.0], [1.0, 1.0]]
    second["points"][2]["scores"]["oracle"] = [[2.0, 2.0], [1.0, 0.0], [1.0, 1.0]]
    found = table(given)
    wins = found[first["id"], second["id"], "oracle"].wins
    assert (wins.mean, wins.n) == (pytest.approx((0.5 + 0.75 + 0.5) / 3), 3)
    lost = found[second["id"], first["id"], "oracle"].wins
    assert lost.mean == pytest.approx(1 - wins.mean)
    assert (lost.low, lost.high) == (pytest.approx(1 - wins.high), pytest.approx(1 - wins.low))


def test_all_pairs_are_there_but_nobody_against_himself_nor_who_was_not_measured() -> None:
    given = few_cells()
    found = table(given)
    names = {row for row, _, _ in found}
    assert names == {REFERENCE, *(cell["id"] for cell in given["cells"] if cell["points"])}
    assert set(found) == {
        (row, column, scorer) for row in names for column in names if row != column for scorer in ("oracle", "audit2")
    }


def test_samples_of_several_seeds_are_pooled_and_have_no_interval() -> None:
    given = seeded(few_cells(num_prompts=5), seeds=2)
    wins = table(given)["dpo, on", REFERENCE, "oracle"].wins
    mine = np.concatenate([np.array(cell["points"][2]["scores"]["oracle"])
                           for cell in given["cells"] if cell["entry"] == "dpo, on"], axis=1)  # fmt: skip
    theirs = np.array(given["reference"][0]["scores"]["oracle"])
    by_hand = [
        np.mean([(a > b) + 0.5 * (a == b) for a in one for b in other]) for one, other in zip(mine, theirs, strict=True)
    ]
    assert mine.shape == (5, 4) and wins.mean == pytest.approx(np.mean(by_hand))
    assert np.isnan(wins.low) and np.isnan(wins.high)
