"""The packer against a batch written out by hand and against the definition of its rule."""

from __future__ import annotations

from collections import Counter
from math import isnan, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.data.group import Candidate, Group
from rayalign.data.pack import group_lengths, pack
from rayalign.data.rows import rows_needed
from rayalign.types import PackedBatch


def candidate(ids: list[int], mask: list[int] | None = None) -> Candidate:
    return Candidate(ids=np.array(ids, np.int32), mask=np.array(mask or [1] * len(ids), np.bool_))


def group(prompt: list[int], *candidates: Candidate, per_candidate=None, per_token=None) -> Group:
    as_columns = lambda columns: {name: np.array(v, np.float32) for name, v in (columns or {}).items()}  # noqa: E731
    return Group(
        prompt_ids=np.array(prompt, np.int32),
        candidates=candidates,
        per_candidate=as_columns(per_candidate),
        per_token=as_columns(per_token),
        source="pairs.jsonl",
        line=7,
    )


@pytest.fixture
def two_groups() -> list[Group]:
    pair = group(
        [1, 2],
        candidate([3, 4, 5, 6], [1, 0, 0, 1]),  # a user turn of two tokens in the middle is seen, not predicted
        candidate([7]),
        per_candidate={"reward": [0.5, -1.0]},
        per_token={"ref_token_logp": [-1.0, -2.0, -4.0]},
    )
    single = group([8], candidate([9, 10]))
    return [pair, single]


def test_two_groups_written_out(two_groups):
    batch = pack(two_groups, positions=[40, 41], num_candidates=2, pad_id=99, row_tokens=8)

    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 99, 99, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2], [0, 1, 2, 0, 0, 0, 0]]
    assert batch.group_ids.tolist() == [[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, -1, -1, -1, -1]]
    assert batch.branch_ids.tolist() == [[0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 0, 0, 0, 0]]
    assert batch.parent_of_branch.tolist() == [0, 0, 0]
    assert batch.predict_from.tolist() == [1, 4, 1, 7, 8]
    assert batch.target_ids.tolist() == [3, 6, 7, 9, 10]
    assert batch.candidate_of.tolist() == [0, 0, 1, 2, 2]
    assert batch.candidate_mask.tolist() == [[True, True], [True, False]]
    assert batch.group_index.tolist() == [40, 41]
    assert sorted(batch.per_candidate) == ["ref_logp", "reward"]
    expected = {"reward": [[0.5, -1.0], [nan, nan]], "ref_logp": [[-3.0, -4.0], [nan, nan]]}
    for name, values in expected.items():
        torch.testing.assert_close(batch.per_candidate[name], torch.tensor(values), equal_nan=True, rtol=0, atol=0)
    ref = batch.per_token["ref_token_logp"]
    torch.testing.assert_close(ref, torch.tensor([-1.0, -2.0, -4.0, nan, nan]), equal_nan=True, rtol=0, atol=0)


def test_concatenated_is_one_sequence_per_row(two_groups):
    batch = pack(two_groups, positions=[0, 1], num_candidates=2, pad_id=99, row_tokens=8, layout="concatenated")

    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 7, 99, 99, 99], [8, 9, 10, 99, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 0], [0, 1, 2, 0, 0, 0]]
    assert batch.group_ids.tolist() == [[0] * 6, [0, 0, 0, -1, -1, -1], [1, 1, 1, -1, -1, -1]]
    assert batch.branch_ids.tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 2, 0, 0, 0], [0, 1, 1, 0, 0, 0]]
    assert batch.predict_from.tolist() == [1, 4, 7, 12, 13]
    assert batch.target_ids.tolist() == [3, 6, 7, 9, 10]


def test_a_group_larger_than_a_row_repeats_its_prompt():
    wide = group([1, 2], candidate([3, 3]), candidate([4, 4, 4]), candidate([5]))
    batch = pack([wide], positions=[0], num_candidates=3, pad_id=0, row_tokens=6)

    # 4 4 4 goes first (decreasing), 5 fits behind it, 3 3 needs another row with its own prompt.
    assert batch.input_ids.tolist() == [[1, 2, 4, 4, 4, 5], [1, 2, 3, 3, 0, 0]]
    assert batch.branch_ids.tolist() == [[0, 0, 2, 2, 2, 3], [0, 0, 1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2], [0, 1, 2, 3, 0, 0]]
    assert batch.target_ids.tolist() == [3, 3, 4, 4, 4, 5]
    assert batch.predict_from.tolist() == [7, 8, 1, 2, 3, 1]


def test_a_candidate_longer_than_a_row_makes_the_row_longer():
    long = group([1], candidate([2] * 9))
    short = group([3], candidate([4] * 3))
    assert pack([long, short], positions=[0, 1], num_candidates=1, pad_id=0, row_tokens=4).input_ids.shape == (2, 10)


def test_one_row_without_row_tokens(two_groups):
    assert pack(two_groups, positions=[0, 1], num_candidates=2, pad_id=0, row_tokens=None).input_ids.shape == (1, 10)


def test_dummy_keeps_shapes_and_masks_every_candidate(two_groups):
    arguments = {"positions": [0, 1], "num_candidates": 2, "pad_id": 0, "row_tokens": 8}
    real, dummy = pack(two_groups, **arguments), pack(two_groups, **arguments, dummy=True)
    assert dummy.candidate_mask.tolist() == [[False, False], [False, False]]
    assert torch.equal(dummy.input_ids, real.input_ids)
    assert torch.equal(dummy.predict_from, real.predict_from)


def test_an_excluded_candidate_keeps_its_tokens_and_is_masked():
    failed = group([1], candidate([2, 3]), per_candidate={"reward": [np.nan], "excluded": [1.0]})
    scored = group([4], candidate([5]), candidate([6]), per_candidate={"reward": [0.5, 1.5]})
    batch = pack([failed, scored], positions=[0, 1], num_candidates=2, pad_id=0, row_tokens=None)
    assert batch.candidate_mask.tolist() == [[False, False], [True, True]]
    assert batch.target_ids.tolist() == [2, 3, 5, 6]
    assert list(batch.per_candidate) == ["reward"]


def test_sums_are_made_in_float64():
    # In float32 the 1,000 small terms vanish one by one behind 2^24.
    column = [2.0**24] + [0.5] * 1000
    one = group([1], candidate([2] * 1001), per_token={"behavior_token_logp": column})
    batch = pack([one], positions=[0], num_candidates=1, pad_id=0, row_tokens=None)
    assert batch.per_candidate["behavior_logp"].item() == 2.0**24 + 500
    assert batch.per_candidate["behavior_logp"].dtype == torch.float32


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (group([], candidate([1])), "pairs.jsonl:7: the prompt has no token"),
        (group([1], candidate([1]), candidate([2]), candidate([3])), "3 candidates in a batch of 2"),
        (group([1]), "no candidate"),
        (group([1], candidate([1]), candidate([2], [0])), "candidate 1 has no predicted token"),
        (group([1], candidate([1]), per_candidate={"reward": [1, 2]}), "'reward' has 2 values, not 1"),
        (group([1], candidate([1, 2]), per_token={"advantage": [1]}), "'advantage' has 1 values, not 2"),
    ],
)
def test_malformed_groups_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        pack([bad], positions=[0], num_candidates=2, pad_id=0, row_tokens=8)


@st.composite
def many_groups(draw) -> list[Group]:
    """Groups of distinct token ids, so that every token names where it came from."""
    fresh = iter(range(1, 100_000))
    take = lambda n: [next(fresh) for _ in range(n)]  # noqa: E731
    groups = []
    for _ in range(draw(st.integers(1, 5))):
        candidates = []
        for _ in range(draw(st.integers(1, 4))):
            mask = draw(st.lists(st.integers(0, 1), max_size=6)) + [1]
            candidates.append(candidate(take(len(mask)), mask))
        groups.append(group(take(draw(st.integers(1, 5))), *candidates))
    return groups


def context_of(batch: PackedBatch, n: int) -> list[int]:
    """What predicted token n may look at, read off the attention rule."""
    length = batch.input_ids.shape[1]
    row, q = divmod(int(batch.predict_from[n]), length)
    same_group = batch.group_ids[row] == batch.group_ids[row, q]
    # The prompt's last token predicts a candidate's first one, so the branch is the query's own.
    branch = (batch.branch_ids[row] == 0) | (batch.branch_ids[row] == batch.branch_ids[row, q])
    seen = same_group & branch & (torch.arange(length) <= q)
    assert batch.position_ids[row][seen].tolist() == list(range(int(seen.sum())))
    return batch.input_ids[row][seen].tolist()


@settings(max_examples=80, deadline=None)
@given(many_groups(), st.sampled_from([None, 1, 6, 12, 30]), st.sampled_from(["packed", "concatenated"]))
def test_every_predicted_token_sees_exactly_its_prompt_and_candidate(groups, row_tokens, layout):
    batch = pack(groups, positions=range(len(groups)), num_candidates=4, pad_id=0, row_tokens=row_tokens, layout=layout)

    expected = [
        (4 * b + k, int(answer.ids[t]), [*g.prompt_ids.tolist(), *answer.ids[:t].tolist()])
        for b, g in enumerate(groups)
        for k, answer in enumerate(g.candidates)
        for t in np.flatnonzero(answer.mask)
    ]
    owners, targets = batch.candidate_of.tolist(), batch.target_ids.tolist()
    assert [(owners[n], targets[n], context_of(batch, n)) for n in range(len(owners))] == expected

    lengths = [group_lengths(g) for g in groups]
    assert batch.input_ids.shape == rows_needed(lengths, row_tokens=row_tokens, layout=layout)
    copies = Counter(batch.input_ids[batch.branch_ids > 0].tolist())
    assert copies == Counter(i for g in groups for c in g.candidates for i in c.ids.tolist())


@given(st.integers(1, 4), st.integers(1, 4))
def test_missing_values_are_nan_never_zero(size, missing):
    with_column = group([1], *[candidate([2])] * size, per_candidate={"reward": range(size)})
    without = group([1], *[candidate([2])] * missing)
    reward = pack([with_column, without], positions=[0, 1], num_candidates=4, pad_id=0, row_tokens=None).per_candidate
    assert reward["reward"][0, :size].tolist() == list(range(size))
    assert all(isnan(v) for v in reward["reward"][0, size:].tolist() + reward["reward"][1].tolist())
