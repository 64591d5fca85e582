"""Stores of many shards: few files, one shared index, a bounded number of open files, columns read at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_store import APART, assert_equal, make_group

from rayalign.data.group import Group
from rayalign.data.index import NAME, Before
from rayalign.data.open_files import MOST_FILES
from rayalign.data.pack import group_lengths
from rayalign.data.shard import ShardWriter, write_column_shard, write_shard
from rayalign.data.store import TokenStore, commit_columns, commit_store
from rayalign.data.unpair import partners_in, partners_of
from rayalign.errors import UserError
from rayalign.storage.manifest import MANIFEST, TornDirectory, verify


def any_groups(count: int) -> list[Group]:
    sizes = np.random.default_rng(0).integers(1, 6, size=(count, 3))
    return [make_group(line, tuple(own[: 1 + line % 3].tolist())) for line, own in enumerate(sizes)]


def store_of(directory: Path, groups: list[Group], per_shard: int, *, shard_bytes: int = APART) -> TokenStore:
    shards = [
        write_shard(directory, f"{first:06d}", groups[first : first + per_shard])
        for first in range(0, len(groups), per_shard)
    ]
    return commit_store(directory, shards, meta={}, shard_bytes=shard_bytes)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 200])
def test_the_index_says_of_any_group_what_lies_before_it(tmp_path: Path, count: int) -> None:
    groups = any_groups(count)
    index = store_of(tmp_path, groups, 37).index
    before = Before(0, 0, 0, 0)
    for number, group in enumerate(groups):
        lengths = group_lengths(group)
        assert index.before(number) == index.entry(number).before == before
        assert index.entry(number).lengths == lengths
        assert index.entry(number).finished == tuple(candidate.finished for candidate in group.candidates)
        assert index.name(number) == f"{group.source}:{group.line}"
        before = Before(
            candidates=before.candidates + len(group.candidates),
            tokens=before.tokens + lengths.packed,
            predicted=before.predicted + sum(lengths.predicted),
            said=0,
        )
    assert index.before(count) == before
    pieces = list(index.pieces(size=50))
    assert np.concatenate([piece.line for piece in pieces]).tolist() == [group.line for group in groups]
    assert [piece.first for piece in pieces] == list(range(0, count, 50))


def test_a_shard_may_have_any_name(tmp_path: Path) -> None:
    groups = any_groups(3)
    for name in ("index", "groups", "shard-000000", "store"):
        shards = [write_shard(tmp_path / name, name, groups[:1]), write_shard(tmp_path / name, "other", groups[1:])]
        store = commit_store(tmp_path / name, shards, meta={})
        for number, group in enumerate(groups):
            assert_equal(store[number], group)


def test_an_index_takes_less_than_forty_bytes_a_pair(tmp_path: Path) -> None:
    pairs = [make_group(line, (2, 2), columns=False) for line in range(4_096)]
    store_of(tmp_path, pairs, 4_096)
    assert (tmp_path / NAME).stat().st_size < 40 * len(pairs)


def test_small_shards_are_joined_and_their_files_go(tmp_path: Path) -> None:
    groups = any_groups(90)
    apart = store_of(tmp_path / "apart", groups, 10)
    one = store_of(tmp_path / "one", groups, 10, shard_bytes=1 << 20)
    bound = 3 * apart.nbytes(range(10))
    some = store_of(tmp_path / "some", groups, 10, shard_bytes=bound)
    assert [len(store.tokens.shards) for store in (apart, one)] == [9, 1]
    sizes = [shard.num_bytes for shard in some.tokens.shards]
    assert max(sizes) <= bound and all(a + b > bound for a, b in zip(sizes, sizes[1:], strict=False))
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        MANIFEST,
        NAME,
        "shard-000000.tokens",
        "shard-000000.columns",
    }
    for store in (apart, one, some):
        for number, group in enumerate(groups):
            assert_equal(store[number], group)
    assert set(verify(tmp_path / "some")["files"]) == {
        path.name for path in (tmp_path / "some").iterdir() if path.name != MANIFEST
    }


def test_shards_of_other_columns_are_not_joined(tmp_path: Path) -> None:
    groups = [make_group(line, columns=line >= 4) for line in range(8)]
    store = store_of(tmp_path, groups, 2, shard_bytes=1 << 20)
    assert [shard.groups for shard in store.tokens.shards] == [4, 4]
    assert [shard.has(".columns") for shard in store.tokens.shards] == [False, True]
    for number, group in enumerate(groups):
        assert_equal(store[number], group)


def test_a_writer_closes_a_full_shard_and_one_that_lacks_a_column(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "part", shard_bytes=4_000)
    groups = [replace(make_group(line, (9, 9)), per_token={}) for line in range(120)]
    for first in range(0, 60, 10):
        writer.append([replace(group, per_candidate={}) for group in groups[first : first + 10]])
    for first in range(60, 120, 10):
        writer.append(groups[first : first + 10], said=[{"prompt": str(line)} for line in range(first, first + 10)])
    shards = writer.close()
    assert [shard.name for shard in shards] == ["part", *(f"part-{n}" for n in range(1, len(shards)))]
    assert all(shard.num_bytes < 4_000 + 10 * 2_000 for shard in shards)
    store = commit_store(tmp_path, shards, meta={}, shard_bytes=APART)
    assert [store[n].line for n in range(120)] == list(range(120))
    assert store.said(77) == b'{"prompt": "77"}'
    with pytest.raises(TornDirectory, match="has no prompts"):
        store.said(3)


def test_a_store_opens_a_bounded_number_of_files(tmp_path: Path) -> None:
    groups = any_groups(3 * MOST_FILES)
    store = store_of(tmp_path, groups, 1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number, group in enumerate(groups):
        assert_equal(store[number], group)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= MOST_FILES


def test_a_column_is_read_at_once_as_it_is_read_group_by_group(tmp_path: Path) -> None:
    groups = any_groups(150)
    store = store_of(tmp_path / "store", groups, 40)
    values = [np.arange(n, dtype=np.float32) / 7 - row for row, n in enumerate(store.index.whole().num_predicted)]
    parts = [
        write_column_shard(tmp_path / "ref", str(first), first=first, per_token={"ref": values[first : first + 70]})
        for first in range(0, 150, 70)
    ]
    laid = commit_columns(tmp_path / "ref", store, parts, meta={}, shard_bytes=APART)
    for name in ("reward", "behavior_token_logp", "ref"):
        found = list(laid.column(name))
        together = np.concatenate([values for _, values in found])
        single = [{**group.per_candidate, **group.per_token}[name] for group in (laid[n] for n in range(150))]
        np.testing.assert_array_equal(together, np.concatenate(single))
        assert sum(len(piece) for piece, _ in found) == 150

    path = next((tmp_path / "ref").glob("70*.columns"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(TornDirectory, match="the record of group 139 does not have its checksum"):
        list(TokenStore.open(tmp_path / "store").with_columns(tmp_path / "ref").column("ref"))


def test_a_column_that_some_shards_lack_is_missing_there(tmp_path: Path) -> None:
    groups = [make_group(line, columns=line >= 4) for line in range(8)]
    store = store_of(tmp_path, groups, 2)
    values = np.concatenate([part for _, part in store.column("reward")])
    assert np.isnan(values[:8]).all() and values[8:].tolist()[::2] == [0.25] * 4


def test_partners_in_a_store_are_those_of_its_groups(tmp_path: Path) -> None:
    singles = [replace(make_group(line, (3,), columns=False), prompt_ids=np.arange(1 + line % 7)) for line in range(60)]
    labels = np.random.default_rng(1).choice([0.0, 1.0, np.nan], size=60)
    groups = [
        replace(
            group,
            prompt_ids=group.prompt_ids.astype(np.int32),
            per_candidate={"label": np.array([label], np.float32)},
        )
        for group, label in zip(singles, labels, strict=True)
    ]
    assert partners_in(store_of(tmp_path / "labelled", groups, 25)).tolist() == partners_of(groups).tolist()
    with pytest.raises(UserError, match="stands alone, but here are 2 candidates"):
        partners_in(store_of(tmp_path / "pairs", [make_group(1)], 1))
