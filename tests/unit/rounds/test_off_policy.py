"""Stored groups as training meets them: every group once per epoch, whatever the workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import store, synthetic_groups

from rayalign.data.micro_batches import PlanError
from rayalign.data.select import Selection, rows_file, write_selected_rows
from rayalign.data.shard import write_column_shard
from rayalign.data.store import StoreMismatch, TokenStore, commit_columns
from rayalign.engine.batches import StreamWork
from rayalign.rounds.source import StreamSource
from rayalign.rounds.streams import SourceSpec, StoredStream
from rayalign.storage.manifest import commit

PAIRS = synthetic_groups([2] * 13)
ANSWERS = synthetic_groups([1] * 5, seed=1)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SourceSpec:
    """13 pairs, four a step, and 5 answers, three a step."""
    folder = tmp_path_factory.mktemp("off_policy")
    pairs = store(folder / "pairs", PAIRS, groups_per_step=4)
    answers = store(folder / "answers", ANSWERS, name="desk", groups_per_step=3)
    return SourceSpec(streams=(pairs, answers), seed=7, tokens_per_micro_batch=110, row_tokens=60)


def sources(spec: SourceSpec, num_workers: int) -> list[StreamSource]:
    return [
        StreamSource(spec, layout="packed", pad_id=0, rank=rank, world_size=num_workers) for rank in range(num_workers)
    ]


def positions(work: StreamWork) -> list[int]:
    """Positions of the groups that count."""
    return [
        int(position)
        for batch in work.micro_batches
        for position, real in zip(batch.group_index, batch.candidate_mask.any(dim=1), strict=True)
        if real
    ]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_group_exactly_once_per_epoch(spec: SourceSpec, num_workers: int) -> None:
    workers = sources(spec, num_workers)
    epochs = 4
    for number, groups in enumerate((PAIRS, ANSWERS)):
        stream = spec.streams[number]
        seen: Counter[tuple[int, str]] = Counter()
        for step in range(-(-epochs * len(groups) // stream.groups_per_step)):
            work = [source.get(step)[number] for source in workers]
            own = sorted(position for part in work for position in positions(part))
            assert own == list(range(step * stream.groups_per_step, (step + 1) * stream.groups_per_step))
            assert len({len(part.micro_batches) for part in work}) == 1
            seen.update((position // len(groups), work[0].describe(position)) for position in own)
        names = [f"synthetic.jsonl:{line}" for line in range(1, len(groups) + 1)]
        assert [seen[epoch, name] for epoch in range(epochs) for name in names] == [1] * (epochs * len(groups))


def test_batches_hold_the_tokens_of_the_groups_they_name(spec: SourceSpec) -> None:
    (source,) = sources(spec, 1)
    for step in range(3):
        (part, _) = source.get(step)
        for batch in part.micro_batches:
            for b, position in enumerate(batch.group_index.tolist()):
                group = PAIRS[int(part.describe(position).rpartition(":")[2]) - 1]
                for k, candidate in enumerate(group.candidates):
                    own = batch.target_ids[batch.candidate_of == 2 * b + k]
                    assert own.tolist() == candidate.ids.tolist()
                assert batch.per_candidate["reward"][b].tolist() == group.per_candidate["reward"].tolist()


def test_facts_of_a_step_are_of_all_workers(spec: SourceSpec) -> None:
    one, (first, second) = sources(spec, 1)[0], sources(spec, 2)
    for step in range(5):
        for alone, part, other in zip(one.get(step), first.get(step), second.get(step), strict=True):
            assert (part.counts, part.num_tokens, part.epoch) == (alone.counts, alone.num_tokens, alone.epoch)
            assert sum(batch.candidate_mask.sum() for batch in part.micro_batches + other.micro_batches) == (
                alone.counts.sequences
            )
    (pairs, desk) = one.get(2)
    assert (pairs.epoch, desk.epoch) == (12 / 13, 9 / 5)
    assert (pairs.counts.pairs, pairs.counts.groups, pairs.counts.sequences) == (4, 4, 8)
    assert (desk.counts.pairs, desk.counts.groups, desk.counts.sequences) == (0, 3, 3)
    tokens = [int(batch.target_ids.numel()) for batch in pairs.micro_batches]
    assert pairs.counts.tokens == sum(tokens)


def keep(folder: Path, *rows: list[int]) -> tuple[Path, ...]:
    """A committed selection of these rows of every store."""
    write_selected_rows(folder, Selection(threshold=0.0, kept=tuple(np.array(own, np.int64) for own in rows)))
    commit(folder, {})
    return tuple(rows_file(folder, number) for number in range(len(rows)))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_only_kept_groups_are_drawn_and_every_one_once_per_epoch(
    spec: SourceSpec, tmp_path: Path, num_workers: int
) -> None:
    """Rows 1, 4, 5, 9 and 12 of 13: five groups, four a step, so that four epochs are five steps."""
    rows = [1, 4, 5, 9, 12]
    stream = replace(spec.streams[0], kept=keep(tmp_path / "kept", rows))
    workers = sources(replace(spec, streams=(stream, spec.streams[1])), num_workers)
    seen: Counter[int] = Counter()
    for step in range(5):
        work = [source.get(step)[0] for source in workers]
        assert {part.epoch for part in work} == {(step + 1) * 4 / 5}
        for part in work:
            for batch in part.micro_batches:
                for b, position in enumerate(batch.group_index.tolist()):
                    if not batch.candidate_mask[b].any():
                        continue
                    name = part.describe(position)
                    group = PAIRS[int(name.rpartition(":")[2]) - 1]
                    assert batch.per_candidate["reward"][b].tolist() == group.per_candidate["reward"].tolist()
                    seen[group.line - 1] += 1
    assert seen == {row: 4 for row in rows}
    auxiliary = Counter(work.describe(p) for work in [workers[0].get(0)[1]] for p in range(3))
    assert len(auxiliary) == 3  # another stream is as it was


def test_a_store_of_which_nothing_is_kept_is_not_drawn(spec: SourceSpec, tmp_path: Path) -> None:
    first = store(tmp_path / "first", synthetic_groups([2] * 6))
    second = store(tmp_path / "second", [replace(g, source="other.jsonl") for g in synthetic_groups([2] * 4, seed=2)])
    both = replace(
        first,
        stores=first.stores + second.stores,
        columns=((), ()),
        weights=(1.0, 0.5),
        kept=keep(tmp_path / "kept", [0, 2], []),
        groups_per_step=2,
    )
    (source,) = sources(replace(spec, streams=(both,)), 1)
    for step in range(3):
        (part,) = source.get(step)
        assert {part.describe(p) for p in positions(part)} == {"synthetic.jsonl:1", "synthetic.jsonl:3"}


def test_steps_may_be_asked_in_any_order_and_again(spec: SourceSpec) -> None:
    (source,) = sources(spec, 1)
    later, first = source.get(6), source.get(0)
    for again, before in ((source.get(6), later), (sources(spec, 1)[0].get(0), first)):
        for part, other in zip(again, before, strict=True):
            assert positions(part) == positions(other)
            for batch, same in zip(part.micro_batches, other.micro_batches, strict=True):
                assert torch.equal(batch.input_ids, same.input_ids)


def test_a_mixture_draws_from_every_store_by_its_weight(spec: SourceSpec, tmp_path: Path) -> None:
    first = store(tmp_path / "first", synthetic_groups([2] * 6))
    others = [replace(group, source="other.jsonl") for group in synthetic_groups([2] * 4, seed=2)]
    second = store(tmp_path / "second", others)
    both = StoredStream(
        name="train",
        stores=first.stores + second.stores,
        columns=((), ()),
        weights=(1.0, 0.5),
        groups_per_step=8,
        num_candidates=2,
    )
    (source,) = sources(replace(spec, streams=(both,)), 1)
    (part,) = source.get(0)
    drawn = Counter(part.describe(position).partition(".")[0] for position in positions(part))
    assert drawn == {"synthetic": 6, "other": 2} and part.epoch == 1.0


def test_columns_lie_over_their_store(spec: SourceSpec, tmp_path: Path) -> None:
    stream = spec.streams[0]
    opened = TokenStore.open(stream.stores[0])
    values = [np.full(length, index, np.float32) for index, length in enumerate(opened.index.whole().num_predicted)]
    shard = write_column_shard(tmp_path / "ref", "shard", first=0, per_token={"ref_token_logp": values})
    commit_columns(tmp_path / "ref", opened, [shard], meta={})
    laid = replace(spec, streams=(replace(stream, columns=((tmp_path / "ref",),)),))
    (part,) = sources(laid, 1)[0].get(0)
    for batch in part.micro_batches:
        rows = [int(part.describe(position).rpartition(":")[2]) - 1 for position in batch.group_index.tolist()]
        owners = torch.tensor(rows).repeat_interleave(2)[batch.candidate_of]
        assert torch.equal(batch.per_token["ref_token_logp"], owners.float())
    foreign = replace(spec.streams[1], columns=((tmp_path / "ref",),))
    with pytest.raises(StoreMismatch):
        sources(replace(spec, streams=(foreign,)), 1)


def test_a_group_above_the_budget_is_refused_at_once(spec: SourceSpec) -> None:
    largest = max(PAIRS, key=lambda group: len(group.prompt_ids) + sum(len(c.ids) for c in group.candidates))
    with pytest.raises(PlanError, match=rf"^synthetic\.jsonl:{largest.line} takes \d+ tokens .*groups are too large"):
        sources(replace(spec, tokens_per_micro_batch=20, row_tokens=None), 1)


def test_groups_of_fewer_candidates_are_masked(spec: SourceSpec, tmp_path: Path) -> None:
    stream = store(tmp_path / "ragged", synthetic_groups([1, 2, 4]), groups_per_step=3)
    (part,) = sources(replace(spec, streams=(stream,), tokens_per_micro_batch=1000), 1)[0].get(0)
    (batch,) = part.micro_batches
    sizes = {position: int(part.describe(position).rpartition(":")[2]) for position in positions(part)}
    expected = [{1: 1, 2: 2, 3: 4}[sizes[int(position)]] for position in batch.group_index]
    assert batch.candidate_mask.sum(dim=1).tolist() == expected and part.counts.sequences == 7
