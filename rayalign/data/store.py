"""The token store: groups of token ids on disk, read one at a time without reading the rest.

A store is a committed directory of shards (:mod:`rayalign.data.shard`). Columns that are made later, such as reference
log-probabilities, lie in directories of their own and are laid over the store that they were made for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.data.group import Column, Group, GroupLengths
from rayalign.data.index import Index, offsets, read_index
from rayalign.data.layer import Layer
from rayalign.data.shard import ShardInfo, decode_tokens, finished_shards
from rayalign.storage.cache import fetched
from rayalign.storage.manifest import TornDirectory, commit, read_manifest
from rayalign.storage.manifest import verify as verify_files
from rayalign.storage.place import Place, place_of


class StoreMismatch(ValueError):
    """Columns were made for another store, or do not cover it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStore:
    """A committed store, opened for reading; many processes may do so at once. Every record's checksum is checked."""

    digest: str
    """Digest of the content: the same for equal groups in equal shards, whatever machine and file names."""
    meta: Mapping[str, Any]
    """What the commit said about the store."""
    index: Index
    tokens: Layer
    columns: tuple[Layer, ...]

    @classmethod
    def open(cls, directory: Place | str, *, verify: bool = False) -> TokenStore:
        """Open a store, or this node's copy of it; with ``verify`` every byte is compared with the digests first.

        Raises:
            TornDirectory: never committed, or a file is missing, cut short or (``verify``) altered.
        """
        local = fetched(place_of(directory))
        return _open(local, _manifest(local, verify=verify))

    def with_columns(self, where: Place | str, *, verify: bool = False) -> TokenStore:
        """This store with the columns of a directory laid over it.

        Raises:
            StoreMismatch: the columns were made for another store.
            TornDirectory: never committed, or a file is missing, cut short or (``verify``) altered.
        """
        directory = fetched(place_of(where))
        manifest = _manifest(directory, verify=verify)
        if manifest["store"] != self.digest:
            raise StoreMismatch(f"{where} was made for store {manifest['store']}, not for {self.digest}")
        return replace(self, columns=(*self.columns, _column_layer(directory, _shards(manifest), self.index)))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, group: int) -> Group:
        """Raises IndexError outside the store, TornDirectory where a record is damaged."""
        if not 0 <= group < len(self):
            raise IndexError(f"group {group} is outside a store of {len(self)}")
        lengths = self.lengths(group)
        finished = self.index.candidate_finished[self.index.candidates(group)].tolist()
        prompt_ids, candidates = decode_tokens(self.tokens.read(group), lengths, finished)
        per_candidate: dict[str, Column] = {}
        per_token: dict[str, Column] = {}
        for layer in self.columns:
            shard = layer.shards[layer.shard_of(group)]
            values = layer.read(group).view(np.float32)
            split = len(shard.per_candidate) * len(candidates)
            per_candidate |= _named(shard.per_candidate, values[:split])
            per_token |= _named(shard.per_token, values[split:])
        return Group(
            prompt_ids=prompt_ids,
            candidates=candidates,
            per_candidate=per_candidate,
            per_token=per_token,
            source=self.index.sources[self.index.source[group]],
            line=int(self.index.line[group]),
        )

    def lengths(self, group: int) -> GroupLengths:
        """Numbers of tokens, without reading the group."""
        return self.index.lengths(group)

    @property
    def column_names(self) -> frozenset[str]:
        """Columns that every shard carries."""
        per_layer = (
            frozenset[str].intersection(*(frozenset(s.per_candidate + s.per_token) for s in layer.shards))
            for layer in self.columns
            if layer.shards
        )
        return frozenset[str]().union(*per_layer)

    def nbytes(self, groups: Sequence[int]) -> int:
        """Bytes that reading these groups touches."""
        return sum(layer.nbytes(groups) for layer in (self.tokens, *self.columns))

    @property
    def bytes_read(self) -> int:
        """Bytes of the records that this process has read."""
        return sum(layer.bytes_read for layer in (self.tokens, *self.columns))


def commit_store(directory: Place, shards: Sequence[ShardInfo], *, meta: Mapping[str, Any]) -> TokenStore:
    """Make the shards one store, in the order given; the manifest is the commit.

    ``meta`` is plain JSON about how the store was made; it is no part of the digest. Raises TornDirectory where a shard
    is not complete in ``directory``.
    """
    _check_complete(directory, shards)
    first = offsets(np.array([shard.groups for shard in shards], np.int64)).tolist()
    placed = [replace(shard, first=start) for shard, start in zip(shards, first[:-1], strict=True)]
    _commit(directory, placed, meta=meta)
    return TokenStore.open(directory)


def commit_columns(
    directory: Place, store: TokenStore, shards: Iterable[ShardInfo], *, meta: Mapping[str, Any]
) -> TokenStore:
    """Make column shards one set of columns for ``store`` and return the store with them.

    Raises:
        StoreMismatch: the shards leave out groups of the store or cover some twice.
        TornDirectory: a shard is not complete in ``directory``, or its columns have other lengths than the groups.
    """
    ordered = sorted(shards, key=lambda shard: shard.first)
    _check_complete(directory, ordered)
    covered = 0
    for shard in ordered:
        if shard.first != covered:
            raise StoreMismatch(f"{directory}: shard {shard.name!r} begins at group {shard.first}, not at {covered}")
        covered += shard.groups
    if covered != len(store):
        raise StoreMismatch(f"{directory}: the columns cover {covered} groups of a store of {len(store)}")
    if isinstance(directory, Path):
        _column_layer(directory, ordered, store.index)
    _commit(directory, ordered, meta=meta, store=store.digest)
    return store.with_columns(directory)


def _check_complete(directory: Place, shards: Sequence[ShardInfo]) -> None:
    finished = finished_shards(directory)
    for shard in shards:
        if finished.get(shard.name) != shard:
            raise TornDirectory(f"{directory}: shard {shard.name!r} is not complete")


def _commit(directory: Place, shards: Sequence[ShardInfo], **facts: Any) -> None:
    content = [
        [shard.groups, shard.per_candidate, shard.per_token, [shard.files[name] for name in sorted(shard.files)]]
        for shard in shards
    ]
    digest = hashlib.sha256(json.dumps([content, facts.get("store")]).encode()).hexdigest()
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink()
    commit(directory, {"digest": digest, "shards": [asdict(shard) for shard in shards], **facts})


def _manifest(directory: Place, *, verify: bool = False) -> dict[str, Any]:
    manifest = verify_files(directory) if verify else read_manifest(directory)
    if manifest is None:
        raise TornDirectory(f"{directory} was never committed")
    return manifest


def _shards(manifest: Mapping[str, Any]) -> tuple[ShardInfo, ...]:
    return tuple(ShardInfo.from_json(shard) for shard in manifest["shards"])


def _open(directory: Path, manifest: Mapping[str, Any]) -> TokenStore:
    shards = _shards(manifest)
    index = read_index(directory, shards)
    tokens = Layer(
        shards=shards,
        paths=tuple(directory / f"{shard.name}.tokens" for shard in shards),
        offsets=offsets(index.packed_tokens + 1),
    )
    return TokenStore(
        digest=manifest["digest"],
        meta=manifest["meta"],
        index=index,
        tokens=tokens,
        columns=(_column_layer(directory, shards, index),),
    )


def _column_layer(directory: Path, shards: Sequence[ShardInfo], index: Index) -> Layer:
    sizes = np.ones(len(index), np.int64)  # the checksum
    for shard in shards:
        own = slice(shard.first, shard.first + shard.groups)
        sizes[own] += len(shard.per_candidate) * index.num_candidates[own]
        sizes[own] += len(shard.per_token) * index.num_predicted[own]
    return Layer(
        shards=tuple(shards),
        paths=tuple(directory / f"{shard.name}.columns" for shard in shards),
        offsets=offsets(sizes),
    )


def _named(names: Sequence[str], values: Column) -> dict[str, Column]:
    return dict(zip(names, values.reshape(len(names), -1), strict=True)) if names else {}
