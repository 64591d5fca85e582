"""Rows become rankings: stored pairs keep their order, completions are ordered by their rewards, ties are no order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import CHATML, byte_level

from rayalign.config.data import TokenBudget
from rayalign.data.chat import make_chat
from rayalign.data.rank import places_of_scores
from rayalign.data.records import RawRow
from rayalign.data.store import commit_store
from rayalign.data.tokenize_rows import Unit, UnitReport, prepare_rows


def prepared(directory: Path, rows: list[dict[str, Any]]) -> UnitReport:
    return prepare_rows(
        [[RawRow(source="rows.jsonl", line=line, value=row) for line, row in enumerate(rows, start=1)]],
        make_chat(byte_level(template=CHATML)),
        TokenBudget(),
        unit=Unit(path="rows.jsonl"),
        shape="ranking",
        directory=directory,
        name="0",
    )


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([0.5, 3.0, -1.0], [1, 0, 2]), ([1.0, 1.0, 0.0, 2.0], [1, 1, 3, 0]), ([2.0, 2.0], [0, 0])],
)
def test_a_place_counts_those_above(rewards: list[float], expected: list[int]) -> None:
    assert places_of_scores(rewards).tolist() == expected
    assert places_of_scores(rewards).dtype == np.float32


def test_pairs_and_rankings_of_one_file(tmp_path: Path) -> None:
    report = prepared(
        tmp_path,
        [
            # Stored order is the preference, whatever the scores beside it say.
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5, "chosen_score": 1.0, "rejected_score": 2.0},
            {"prompt": "a", "completions": ["b", "c", "d"], "rewards": [1.0, 2.0, 1.0]},
            {"prompt": "a", "completions": ["b", "c"], "rewards": [1.0, 1.0]},
            {"prompt": "a", "completions": ["b", "c"]},
            {"prompt": "a", "completion": "b"},
        ],
    )
    assert (report.rows, report.dropped, report.bad) == (5, 1, 2)
    assert [bad.line for bad in report.bad_rows] == [4, 5]
    assert "without `rewards` does not say which is preferred" in report.bad_rows[0].reason
    assert report.shards
    store = commit_store(tmp_path, report.shards, meta={})
    assert [store[index].per_candidate["rank"].tolist() for index in range(len(store))] == [[0, 1], [1, 0, 1]]
    assert store[0].per_candidate["margin"][0] == 0.5 and np.isnan(store[1].per_candidate["margin"]).all()
