"""Stores on an object store: what is committed, opened and read there moves no more bytes than it needs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import storages
from test_large_store import any_groups
from test_store import APART, assert_equal

from rayalign.data.group import Column, Group
from rayalign.data.index import NAME
from rayalign.data.shard import ShardInfo, write_column_shard, write_shard
from rayalign.data.store import TokenStore, commit_columns, commit_store
from rayalign.data.stream import WindowedOrder
from rayalign.rounds.stored import StoredGroups
from rayalign.rounds.streams import StoredStream
from rayalign.storage import cache
from rayalign.storage.cache import working
from rayalign.storage.manifest import MANIFEST, TornDirectory, read_manifest
from rayalign.storage.place import ObjectPath, Place

server, objects, place = storages.server, storages.objects, storages.place
PER_SHARD = 10


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ROOT_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were fetched or sent, as they are."""
    names: list[str] = []

    def noted(method: Callable[[ObjectPath, Path], None]) -> Callable[[ObjectPath, Path], None]:
        def call(self: ObjectPath, local: Path) -> None:
            names.append(self.name)
            method(self, local)

        return call

    monkeypatch.setattr(ObjectPath, "fetch", noted(ObjectPath.fetch))
    monkeypatch.setattr(ObjectPath, "send", noted(ObjectPath.send))
    return names


def write_shards(directory: Place, groups: list[Group]) -> list[ShardInfo]:
    """As the processes of a stage do, each with a folder of its own."""
    found = []
    for first in range(0, len(groups), PER_SHARD):
        with working(directory) as folder:
            found.append(write_shard(folder, f"{first:06d}", groups[first : first + PER_SHARD]))
    return found


def write_columns(directory: Place, groups: list[Group]) -> list[ShardInfo]:
    found = []
    for first in range(0, len(groups), PER_SHARD):
        scores = [group.per_candidate["reward"] for group in groups[first : first + PER_SHARD]]
        with working(directory) as folder:
            columns = {"again": scores}
            found.append(write_column_shard(folder, f"{first:06d}", first=first, per_candidate=columns))
    return found


def values_of(store: TokenStore, name: str) -> Column:
    return np.concatenate([values for _, values in store.column(name)])


def over(objects: ObjectPath, groups: list[Group]) -> Place:
    """Columns of their own place, which are laid over the store that lies at ``objects``."""
    directory = objects.parent / f"{objects.name}-over"
    commit_columns(directory, TokenStore.open(objects), write_columns(directory, groups), meta={}, shard_bytes=APART)
    return directory


@pytest.mark.parametrize("shard_bytes", [APART, 1 << 20], ids=["apart", "joined"])
def test_a_store_is_the_same_as_on_a_disk(place: Place, tmp_path: Path, shard_bytes: int) -> None:
    groups = any_groups(45)
    disk = commit_store(tmp_path / "disk", write_shards(tmp_path / "disk", groups), meta={}, shard_bytes=shard_bytes)
    store = commit_store(place / "store", write_shards(place / "store", groups), meta={}, shard_bytes=shard_bytes)
    laid = commit_columns(
        place / "over", store, write_columns(place / "over", groups), meta={}, shard_bytes=shard_bytes
    )
    assert store.digest == disk.digest
    assert len(laid.tokens.shards) == len(laid.column_shards) / 2 == (5 if shard_bytes == APART else 1)
    opened = TokenStore.open(place / "store", verify=True).with_columns(place / "over", verify=True)
    for number, group in enumerate(groups):
        scores = {**group.per_candidate, "again": group.per_candidate["reward"]}
        assert_equal(opened[number], replace(group, per_candidate=scores))
    np.testing.assert_array_equal(values_of(opened, "again"), values_of(opened, "reward"))
    for directory in (place / "store", place / "over"):
        manifest = read_manifest(directory)
        assert manifest is not None
        assert {path.name for path in directory.iterdir()} == {MANIFEST, *manifest["files"]}


def test_large_shards_stay_where_they_are(objects: ObjectPath, moved: list[str]) -> None:
    shards = write_shards(objects / "store", any_groups(45))
    moved.clear()
    store = commit_store(objects / "store", shards, meta={}, shard_bytes=APART)
    assert sorted(moved) == sorted([NAME, NAME, *(f"{shard.name}.index" for shard in shards)])
    columns = write_columns(objects / "over", [store[number] for number in range(len(store))])
    moved.clear()
    commit_columns(objects / "over", store, columns, meta={}, shard_bytes=APART)
    assert moved == []


def test_a_shard_is_fetched_when_it_is_read(objects: ObjectPath, moved: list[str]) -> None:
    groups = any_groups(45)
    commit_store(objects / "store", write_shards(objects / "store", groups), meta={}, shard_bytes=APART)
    moved.clear()
    store = TokenStore.open(objects / "store")
    assert store.lengths(44).prompt == len(groups[44].prompt_ids) and moved == []
    assert_equal(store[23], groups[23])
    assert moved == ["000020.tokens", "000020.columns"]
    assert_equal(store[27], groups[27])
    again = TokenStore.open(objects / "store")
    assert_equal(again[20], groups[20])
    assert moved == ["000020.tokens", "000020.columns"], "once for all readers of the node"


@pytest.mark.parametrize(("data", "said"), [(None, "is missing"), (b"other", "has 5 bytes, its manifest says")])
def test_a_shard_that_is_lost_or_another_is_refused(objects: ObjectPath, data: bytes | None, said: str) -> None:
    store = commit_store(objects, write_shards(objects, any_groups(45)), meta={}, shard_bytes=APART)
    (objects / "000020.tokens").unlink()
    if data is not None:
        (objects / "000020.tokens").put(data)
    assert len(store[0].candidates)
    with pytest.raises(TornDirectory, match=rf"000020.tokens {said}"):
        store[23]


def test_what_is_fetched_ahead_is_there_when_it_is_read(objects: ObjectPath, moved: list[str]) -> None:
    groups = any_groups(45)
    commit_store(objects, write_shards(objects, groups), meta={}, shard_bytes=APART)
    store = TokenStore.open(objects).with_columns(over(objects, groups))
    moved.clear()
    wait(store.fetch_ahead([4, 2]))
    files = [f"0000{number}0.{ending}" for number in (2, 4) for ending in ("tokens", "columns")]
    assert sorted(moved) == sorted([*files, "000020.columns", "000040.columns"])
    assert store.fetch_ahead([4, 2]) == []
    moved.clear()
    assert_equal(replace(store[41], per_candidate=groups[41].per_candidate), groups[41])
    assert moved == []


def test_training_fetches_the_shards_of_a_window_and_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_store(tmp_path, write_shards(tmp_path, any_groups(90)), meta={}, shard_bytes=APART)
    asked: list[list[int]] = []
    monkeypatch.setattr(TokenStore, "fetch_ahead", lambda self, shards: asked.append(shards))
    stream = StoredStream(
        name="pairs",
        stores=(tmp_path,),
        columns=((),),
        weights=(1.0,),
        groups_per_step=5,
        num_candidates=3,
        window=2,
    )
    StoredGroups(stream, seed=3).of_step(1)
    assert asked == [WindowedOrder(3, "pairs/0", [PER_SHARD] * 9, 2).needed(0, 9)]
    assert len(asked[0]) == 4
