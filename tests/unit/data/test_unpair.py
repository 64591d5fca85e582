from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from rayalign.data.group import Candidate, Group
from rayalign.data.unpair import Mismatched, other_prompts, unpair
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


NAN = math.nan


@pytest.mark.parametrize(
    ("prompts", "labels", "expected"),
    [
        # Pairs that were taken apart: chosen beside the next prompt's chosen, rejected beside its rejected.
        ([1, 1, 2, 2, 3, 3], [1, 0, 1, 0, 1, 0], [2, 3, 4, 5, 0, 1]),
        ([1, 2, 3], [1, 1, 1], [1, 2, 0]),
        ([1, 1, 2, 2], [1, 1, 1, 1], [2, 3, 0, 1]),
        # Undesirable answers have one prompt only, so all change places together.
        ([1, 2, 3], [1, 0, 1], [1, 2, 0]),
        ([1, 1, 2, 2], [1, 0, 0, 0], [2, 3, 0, 1]),
        # Three of four answer one prompt: two of them get another completion of it.
        ([1, 2, 1, 1], [1, 1, 1, 1], [1, 3, 0, 2]),
        # Every prompt is the same.
        ([1, 1, 1], [1, 1, 1], [1, 2, 0]),
        ([1, 1, 1], [1, 0, 1], [1, 2, 0]),
        # Without a label, and alone.
        ([1, 2, 3, 4], [1, NAN, 1, NAN], [2, -1, 0, -1]),
        ([1], [1], [-1]),
        ([1, 2], [1, NAN], [-1, -1]),
        ([], [], []),
    ],
)
def test_whose_completion_is_set_beside_a_prompt(prompts: list[int], labels: list[float], expected: list[int]) -> None:
    assert other_prompts(np.array(prompts, np.int64), np.array(labels, np.float64)).tolist() == expected


def test_the_mismatched_completions_are_the_answers_themselves_of_each_kind() -> None:
    """Counted for ten random data sets, prompts of any multiplicity."""
    random = np.random.default_rng(0)
    for _ in range(10):
        prompts = random.integers(0, 40, size=200)
        labels = random.choice([0.0, 1.0, NAN], size=200, p=[0.3, 0.6, 0.1])
        found = other_prompts(prompts, labels)
        for kind in (0.0, 1.0):
            own = np.flatnonzero(labels == kind)
            assert sorted(found[own]) == own.tolist()
            assert (prompts[found[own]] != prompts[own]).all()


@dataclass
class Counted:
    """Groups, and how often one was read."""

    groups: list[Group]
    reads: int = 0

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int, /) -> Group:
        self.reads += 1
        return self.groups[index]


@pytest.mark.parametrize("prompts", [1, 3, 1000])
def test_every_group_is_read_a_fixed_number_of_times(prompts: int) -> None:
    groups = Counted([labelled(index % prompts, index, label=index % 2) for index in range(1000)])
    view = Mismatched(groups)
    for index in range(len(view)):
        view[index]
    assert groups.reads == 3 * len(groups)


def test_an_answer_without_a_label_neither_gives_nor_gets() -> None:
    view = Mismatched([labelled(1, 10), labelled(2, 20, label=math.nan), labelled(3, 30)])
    assert [[int(own.ids[0]) for own in view[index].candidates] for index in range(3)] == [[10, 30], [20], [30, 10]]


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
        Mismatched([PAIR])
    with pytest.raises(IndexError):
        Mismatched([labelled(1, 10)])[1]
