"""The plan of a step: every group once, equal numbers of micro-batches, the budget kept, little padding."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.data.group import GroupLengths
from rayalign.data.micro_batches import MicroBatch, PlanError, StepCounts, count_step, plan_step
from rayalign.data.rows import rows_needed


def lengths(prompt: int, *candidates: int) -> GroupLengths:
    return GroupLengths(prompt=prompt, candidates=candidates, predicted=candidates)


def test_counts_of_a_step():
    pair = GroupLengths(prompt=9, candidates=(5, 6), predicted=(4, 6))
    single = lengths(3, 2)
    assert count_step([pair, pair, single]) == StepCounts(pairs=2, groups=3, sequences=5, tokens=22)


def test_a_step_written_out():
    step = [lengths(2, 4), lengths(1, 7), lengths(1, 1), lengths(4, 2)]
    plan = plan_step(step, num_workers=2, tokens_per_micro_batch=8, row_tokens=None, layout="packed")
    # Packed they take 6, 8, 2 and 6 tokens: 8 | 6 | 6 + 2 in order of length, so two per worker and one dummy.
    assert plan == (
        (MicroBatch(slots=(1,)), MicroBatch(slots=(0,))),
        (MicroBatch(slots=(2, 3)), MicroBatch(slots=(2,), dummy=True)),
    )


groups = st.builds(
    lambda p, c: lengths(p, *c), st.integers(1, 60), st.lists(st.integers(1, 60), min_size=1, max_size=4)
)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(groups, min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(480, 1500),
    st.sampled_from([None, 50, 100, 300]),
    st.sampled_from(["packed", "concatenated"]),
)
def test_plan_keeps_its_promises(step, workers, budget, row_tokens, layout):
    plan = plan_step(step, num_workers=workers, tokens_per_micro_batch=budget, row_tokens=row_tokens, layout=layout)
    assert len(plan) == workers
    assert len({len(worker) for worker in plan}) == 1
    real = [slot for worker in plan for batch in worker if not batch.dummy for slot in batch.slots]
    assert sorted(real) == list(range(len(step)))
    for batch in (batch for worker in plan for batch in worker):
        rows, tokens = rows_needed([step[slot] for slot in batch.slots], row_tokens=row_tokens, layout=layout)
        assert rows * tokens <= budget
        assert not batch.dummy or len(batch.slots) == 1
    assert sum(batch.dummy for worker in plan for batch in worker) < workers * len(plan[0])


def test_a_stream_without_groups_in_this_step_has_no_micro_batch():
    assert plan_step([], num_workers=3, tokens_per_micro_batch=8, row_tokens=None, layout="packed") == ((), (), ())


def test_a_group_above_the_budget_is_refused_by_name():
    with pytest.raises(PlanError, match=r"pairs.jsonl:12 takes 150 tokens .* = 100; raise it to at least 150"):
        plan_step(
            [lengths(5, 5), lengths(50, 60, 40)],
            num_workers=1,
            tokens_per_micro_batch=100,
            row_tokens=None,
            layout="packed",
            describe=lambda slot: f"pairs.jsonl:{11 + slot}",
        )


@pytest.fixture(scope="module")
def real_lengths(test_data) -> list[GroupLengths]:
    """Real pairs at about four characters per token, prompts ending at the last assistant turn."""
    pairs = []
    with gzip.open(test_data / "hh_harmless_test.jsonl.gz", "rt") as lines:
        for line in lines:
            row = json.loads(line)
            cut = row["chosen"].rfind("Assistant:") + len("Assistant:")
            prompt, chosen, rejected = row["chosen"][:cut], row["chosen"][cut:], row["rejected"][cut:]
            pairs.append(lengths(*(len(text) // 4 + 1 for text in (prompt, chosen, rejected))))
    return pairs


@pytest.mark.parametrize(("row_tokens", "padding"), [(1024, 0.08), (None, 0.0)])
def test_little_padding_and_balanced_workers_on_real_pairs(real_lengths, row_tokens, padding):
    tokens = slots = 0
    for start in range(0, 2048, 256):
        step = real_lengths[start : start + 256]
        plan = plan_step(step, num_workers=4, tokens_per_micro_batch=8192, row_tokens=row_tokens, layout="packed")
        loads = []
        for worker in plan:
            shapes = [
                rows_needed([step[slot] for slot in batch.slots], row_tokens=row_tokens, layout="packed")
                for batch in worker
            ]
            loads.append(sum(rows * length for rows, length in shapes))
        tokens += sum(length.packed for length in step)
        slots += sum(loads)
        assert max(loads) < 1.08 * sum(loads) / len(loads)
        assert not any(batch.dummy for worker in plan for batch in worker)
    assert 1 - tokens / slots <= padding
