"""Which rows a filter keeps: scores by hand, quantiles at their edges, ties, and files that come back whole."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_groups import random_groups

from rayalign.data.select import likelihood, read_selected_rows, rows_file, scores_of, select_best, write_selected_rows
from rayalign.data.shard import write_column_shard, write_shard
from rayalign.data.store import TokenStore, commit_columns, commit_store
from rayalign.errors import UserError
from rayalign.storage.manifest import TornDirectory, commit


def test_likelihood_is_the_mean_over_completions_of_the_mean_over_tokens() -> None:
    # (−1 − 3)/2 = −2 and (−0.5 − 1.5 − 4)/3 = −2: a long completion counts as much as a short one
    assert likelihood([-1.0, -3.0, -0.5, -1.5, -4.0], [2, 3]) == -2.0
    assert likelihood([-1.0, -1.0, -1.0, -7.0], [3, 1]) == -4.0
    assert likelihood([-1.0, -3.0, -9.0, -9.0], [2]) == -2.0  # a mismatched completion stands behind, uncounted


def test_likelihood_orders_pairs_as_wpos_unaligned_weight_does() -> None:
    """log (w(y_w) · w(y_l)) = 2 · likelihood, with w = exp of the mean log-prob per token."""
    logps = np.log([0.5, 0.25, 0.1, 0.8, 0.9])
    weights = [math.sqrt(0.5 * 0.25), (0.1 * 0.8 * 0.9) ** (1 / 3)]
    assert math.log(math.prod(weights)) == pytest.approx(2 * likelihood(logps, [2, 3]), rel=1e-12)


TEN = np.array([-3.0, -1.0, -9.0, -4.0, -2.0, -10.0, -5.0, -7.0, -6.0, -8.0])


@pytest.mark.parametrize(
    ("quantile", "rows", "threshold"),
    [
        (0.7, [0, 1, 4], -3.0),  # 1 − 0.7 is 0.30000000000000004 in floating point: not four rows
        (0.9, [1], -1.0),
        (0.999, [1], -1.0),  # never none
        (0.5, [0, 1, 3, 4, 6], -5.0),
        (0.65, [0, 1, 3, 4], -4.0),  # ⌈3.5⌉
        (0.1, [0, 1, 2, 3, 4, 6, 7, 8, 9], -9.0),
        (0.001, list(range(10)), -10.0),  # ⌈9.99⌉: all
    ],
)
def test_the_highest_scores_are_kept(quantile: float, rows: list[int], threshold: float) -> None:
    selection = select_best([TEN], quantile)
    assert (selection.kept[0].tolist(), selection.threshold) == (rows, threshold)


def test_the_readmes_numbers() -> None:
    (kept,) = select_best([np.linspace(-3.0, -0.5, 2312)], 0.7).kept
    assert len(kept) == 694


def test_all_that_tie_with_the_threshold_are_kept() -> None:
    tied = np.array([-1.0, -2.0, -2.0, -2.0, -3.0, -3.0, -4.0, -5.0, -5.0, -6.0])
    assert select_best([tied], 0.8).kept[0].tolist() == [0, 1, 2, 3]
    assert select_best([tied], 0.9).kept[0].tolist() == [0]
    assert len(select_best([np.full(7, -1.5)], 0.99).kept[0]) == 7
    assert select_best([np.array([-2.0])], 0.5).kept[0].tolist() == [0]


def test_one_threshold_holds_for_all_stores() -> None:
    selection = select_best([np.array([-1.0, -8.0, -2.0]), np.array([-9.0, -7.0]), np.array([-3.0])], 0.5)
    assert selection.threshold == -3.0
    assert [rows.tolist() for rows in selection.kept] == [[0, 2], [], [0]]


@settings(deadline=None)
@given(st.lists(st.integers(-6, 0), min_size=1, max_size=40), st.integers(1, 99), st.randoms())
def test_selection_is_a_function_of_the_scores_alone(values: list[int], percent: int, random: object) -> None:
    scores = np.array(values, np.float64)
    selection = select_best([scores], percent / 100)
    kept = set(selection.kept[0].tolist())
    wanted = -(-(100 - percent) * len(values) // 100)
    above = [row for row, value in enumerate(values) if value > selection.threshold]
    assert len(above) < wanted <= len(kept)
    assert kept == {row for row, value in enumerate(values) if value >= selection.threshold}
    shuffled = list(range(len(values)))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    (other,) = select_best([scores[shuffled]], percent / 100).kept
    assert {shuffled[row] for row in other.tolist()} == kept
    split = len(values) // 2
    first, second = select_best([scores[:split], scores[split:]], percent / 100).kept
    assert {*first.tolist(), *(row + split for row in second.tolist())} == kept


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_no_other_quantile(quantile: float) -> None:
    with pytest.raises(ValueError, match="is outside"):
        select_best([TEN], quantile)


def test_nothing_to_select_from() -> None:
    with pytest.raises(ValueError, match="there is no score"):
        select_best([np.empty(0)], 0.5)


def scored_store(folder: Path, per_group: list[float], num_candidates: list[int]) -> TokenStore:
    """A store in which every token of candidate k has the log-prob of its group less k."""
    groups = random_groups(num_candidates, vocabulary=50, seed=0)
    store = commit_store(folder / "store", [write_shard(folder / "store", "0", groups)], meta={})
    columns = [
        np.concatenate(
            [np.full(candidate.num_predicted, value - number) for number, candidate in enumerate(group.candidates)]
        ).astype(np.float32)
        for group, value in zip(groups, per_group, strict=True)
    ]
    shard = write_column_shard(folder / "logps", "0", first=0, per_token={"ref_token_logp": columns})
    commit_columns(folder / "logps", store, [shard], meta={})
    return store.with_columns(folder / "logps")


def test_scores_of_a_store(tmp_path: Path) -> None:
    """Every token of candidate k has value − k, so a group of K scores value − (K − 1)/2, whatever its lengths."""
    store = scored_store(tmp_path, [-1.0, -2.0, -4.0, -3.0], [2, 1, 4, 2])
    scores = scores_of(store, column="ref_token_logp", own_candidates=None)
    assert scores.tolist() == [-1.5, -2.0, -5.5, -3.5]
    assert scores_of(store, column="ref_token_logp", own_candidates=1).tolist() == [-1.0, -2.0, -4.0, -3.0]


def test_a_log_prob_that_is_none_is_named(tmp_path: Path) -> None:
    store = scored_store(tmp_path, [-1.0, float("nan"), float("-inf")], [2, 2, 2])
    message = rf"log-probability of {store.index.name(1)} is nan \(2 of 3 rows are affected\)"
    with pytest.raises(UserError, match=message):
        scores_of(store, column="ref_token_logp", own_candidates=None)


def test_rows_come_back_and_a_damaged_file_does_not(tmp_path: Path) -> None:
    write_selected_rows(tmp_path, select_best([TEN, np.array([-11.0])], 0.7))
    with pytest.raises(TornDirectory, match="never committed"):
        read_selected_rows(rows_file(tmp_path, 0))
    commit(tmp_path, {})
    rows = read_selected_rows(rows_file(tmp_path, 0))
    assert (rows.tolist(), rows.dtype) == ([0, 1, 3, 4], np.int64)  # ⌈0.3 · 11⌉
    assert read_selected_rows(rows_file(tmp_path, 1)).tolist() == []
    content = rows_file(tmp_path, 0).read_bytes()
    rows_file(tmp_path, 0).write_bytes(content[:-8] + (5).to_bytes(8, "little"))
    with pytest.raises(TornDirectory, match="does not have the digest"):
        read_selected_rows(rows_file(tmp_path, 0))
