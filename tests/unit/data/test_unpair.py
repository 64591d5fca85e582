from __future__ import annotations

import numpy as np
import pytest

from rayalign.data.group import Candidate, Group
from rayalign.data.unpair import Mismatched, unpair
from rayalign.errors import UserError


def candidate(*ids: int) -> Candidate:
    return Candidate(ids=np.array(ids, np.int32), mask=np.array([token > 0 for token in ids]))


def labelled(prompt: int, completion: int, label: float = 1.0) -> Group:
    return Group(
        prompt_ids=np.array([prompt], np.int32),
        candidates=(candidate(completion),),
        per_candidate={"label": np.array([label], np.float32)},
        per_token={"ref_token_logp": np.array([-0.5], np.float32)},
        source="f.jsonl",
        line=prompt,
    )


PAIR = Group(
    prompt_ids=np.array([1, 2], np.int32),
    candidates=(candidate(3, 0, 4), candidate(5)),
    per_candidate={
        "reward": np.array([2.0, -1.0], np.float32),
        "margin": np.array([3.0, np.nan], np.float32),
        "soft_label": np.array([0.9, np.nan], np.float32),
    },
    per_token={"behavior_token_logp": np.array([-0.1, -0.2, -0.3], np.float32)},
    source="f.jsonl",
    line=9,
)


def test_a_pair_becomes_two_labelled_answers() -> None:
    chosen, rejected = unpair(PAIR)
    assert chosen.candidates == PAIR.candidates[:1] and rejected.candidates == PAIR.candidates[1:]
    assert chosen.per_candidate["label"].tolist() == [1.0] and rejected.per_candidate["label"].tolist() == [0.0]
    assert chosen.per_candidate["reward"].tolist() == [2.0] and rejected.per_candidate["reward"].tolist() == [-1.0]
    assert set(chosen.per_candidate) == {"label", "reward"}
    np.testing.assert_allclose(chosen.per_token["behavior_token_logp"], [-0.1, -0.2])
    np.testing.assert_allclose(rejected.per_token["behavior_token_logp"], [-0.3])
    assert (rejected.source, rejected.line, rejected.prompt_ids.tolist()) == ("f.jsonl", 9, [1, 2])


def test_only_pairs_are_unpaired() -> None:
    with pytest.raises(UserError, match="f.jsonl:7: a pair has .* not 1 candidates"):
        unpair(labelled(7, 70))


def partners(groups: list[Group]) -> list[int]:
    view = Mismatched(groups)
    assert len(view) == len(groups)
    return [int(view[index].candidates[1].ids[0]) for index in range(len(view))]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([1, 2, 3], [20, 30, 10]),
        ([1, 1, 2, 2], [30, 30, 10, 10]),
        ([1, 2, 1, 1], [20, 30, 20, 20]),
        ([1, 1, 1], [20, 30, 10]),
        ([1], [10]),
    ],
)
def test_completion_of_the_next_other_prompt(prompts: list[int], expected: list[int]) -> None:
    groups = [labelled(prompt, 10 * (index + 1)) for index, prompt in enumerate(prompts)]
    assert partners(groups) == expected


def test_mismatched_numbers_are_missing() -> None:
    group = Mismatched([labelled(1, 10, label=0.0), labelled(2, 20)])[0]
    assert group.prompt_ids.tolist() == [1] and group.candidates[0].ids.tolist() == [10]
    np.testing.assert_array_equal(group.per_candidate["label"], np.array([0.0, np.nan], np.float32))
    np.testing.assert_array_equal(group.per_token["ref_token_logp"], np.array([-0.5, np.nan], np.float32))
    assert {column.dtype for column in (*group.per_candidate.values(), *group.per_token.values())} == {
        np.dtype("float32")
    }


def test_only_labelled_answers_get_a_mismatch() -> None:
    with pytest.raises(UserError, match="f.jsonl:9: a labelled answer stands alone, but here are 2 candidates"):
        Mismatched([PAIR])[0]
    with pytest.raises(IndexError):
        Mismatched([PAIR])[1]
