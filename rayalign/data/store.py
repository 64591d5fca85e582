"""The token store: groups of token ids on disk, read one at a time without reading the rest.

A store is a committed directory of shards (:mod:`rayalign.data.shard`) and one index of them, on a disk or an object
store. Columns that are made
later, such as reference log-probabilities, lie in directories of their own. They are laid over the store that they were
made for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

import numpy as np

from rayalign.data.group import Column, Group, GroupLengths
from rayalign.data.index import NAME, PIECE, Index, Piece, open_index, write_index
from rayalign.data.layer import Layer, column_layer, make_layer
from rayalign.data.merge import joined, neighbouring_runs, records_of
from rayalign.data.open_files import File, OpenFiles
from rayalign.data.shard import (
    INDEX,
    SAID,
    SHARD_BYTES,
    TOKENS,
    ShardInfo,
    decode_tokens,
    files_of,
    is_complete,
    sizes_below,
)
from rayalign.storage.cache import TRANSFERS, gathered
from rayalign.storage.manifest import TornDirectory, commit, file_facts, read_manifest
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
    files: OpenFiles = field(repr=False)

    @classmethod
    def open(cls, directory: Place | str, *, verify: bool = False) -> TokenStore:
        """Open a store; with ``verify`` every byte on a disk is compared with the digests first.

        From an object store a shard is fetched, and compared, when it is first read.

        Raises:
            TornDirectory: never committed, or a file is missing, cut short or (``verify``) altered.
        """
        place = place_of(directory)
        return _open(place, _manifest(place, verify=verify))

    def with_columns(self, where: Place | str, *, verify: bool = False) -> TokenStore:
        """This store with the columns of a directory laid over it.

        Raises:
            StoreMismatch: the columns were made for another store.
            TornDirectory: never committed, or a file is missing, cut short or (``verify``) altered.
        """
        directory = place_of(where)
        manifest = _manifest(directory, verify=verify)
        if manifest["store"] != self.digest:
            raise StoreMismatch(f"{where} was made for store {manifest['store']}, not for {self.digest}")
        layer = column_layer(directory, _shards(manifest), self.index, self.files)
        return replace(self, columns=(*self.columns, layer))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, group: int) -> Group:
        """Raises IndexError outside the store, TornDirectory where a record is damaged."""
        if not 0 <= group < len(self):
            raise IndexError(f"group {group} is outside a store of {len(self)}")
        entry = self.index.entry(group)
        read = self.tokens.read(group, entry)
        assert read is not None, "every shard has tokens"
        prompt_ids, candidates = decode_tokens(read[1], entry.lengths, entry.finished)
        per_candidate: dict[str, Column] = {}
        per_token: dict[str, Column] = {}
        for layer in self.columns:
            if (found := layer.read(group, entry)) is not None:
                shard, values = found[0], found[1].view(np.float32).copy()
                split = len(shard.per_candidate) * len(candidates)
                per_candidate |= _named(shard.per_candidate, values[:split])
                per_token |= _named(shard.per_token, values[split:])
        return Group(
            prompt_ids=prompt_ids,
            candidates=candidates,
            per_candidate=per_candidate,
            per_token=per_token,
            source=self.index.source(group),
            line=int(self.index.arrays["line"][group]),
        )

    def lengths(self, group: int) -> GroupLengths:
        """Numbers of tokens, without reading the group."""
        return self.index.entry(group).lengths

    def said(self, group: int) -> bytes:
        """What the row of a group says, as JSON; raises TornDirectory where the store was made without."""
        number = self.tokens.shard_of(group)
        shard, start = self.tokens.shards[number], self.tokens.starts[number]
        if not shard.has(SAID):
            raise TornDirectory(f"{self.tokens.directory} has no prompts: make the store again with --fresh tokens")
        entry = self.index.entry(group)
        name = f"{shard.name}{SAID}"
        words = self.files.bytes_of(File(self.tokens.directory / name, shard.files[name]))
        first = entry.before.said - start.said
        return words[first : first + entry.said_bytes].tobytes()

    def fetch_ahead(self, shards: Iterable[int]) -> list[Future[None]]:
        """Bring shards, and the columns of their groups, from an object store in the background.

        Returns what has begun with this call.
        """
        wanted: list[File] = []
        for number in shards:
            shard = self.tokens.shards[number]
            groups = range(shard.first, shard.first + shard.groups)
            for layer in (self.tokens, *self.columns):
                wanted += layer.files_of(groups)
        return self.files.fetch_ahead(wanted)

    def column(self, name: str) -> Iterator[tuple[Piece, Column]]:
        """A column of all groups, some at a time: float32 over their candidates, or tokens; NaN = missing.

        Raises:
            TornDirectory: a record is damaged.
        """
        per_token = name in self.token_columns
        firsts = {shard.first for shard in self.column_shards}
        for groups in self._pieces(firsts):
            piece = self.index.piece(groups)
            before = self.index.before(groups.start)
            values = np.full(len(piece.candidate_tokens) if not per_token else piece.num_predicted.sum(), np.nan, "f4")
            for layer in self.columns:
                found = layer.column(name, layer.shard_of(groups.start), piece, before)
                values = values if found is None else found
            yield piece, values

    def prompts(self) -> Iterator[bytes]:
        """The tokens of every prompt as they are stored: equal for equal prompts.

        Raises:
            TornDirectory: a record is damaged.
        """
        firsts = {shard.first for shard in self.tokens.shards}
        for groups in self._pieces(firsts):
            yield from self.tokens.prompts(self.index.piece(groups), self.index.before(groups.start))

    def _pieces(self, firsts: Collection[int]) -> Iterator[range]:
        """All groups in order, in ranges that fit into memory and do not cross ``firsts`` of shards."""
        ends = sorted({*firsts, *range(0, len(self), PIECE), len(self)})
        return (range(start, stop) for start, stop in zip(ends, ends[1:], strict=False))

    @property
    def column_names(self) -> frozenset[str]:
        """Columns that every shard carries."""
        found: set[str] = set()
        for layer in self.columns:
            named = [{*shard.per_candidate, *shard.per_token} for shard in layer.shards]
            found |= set.intersection(*named) if named else set()
        return frozenset(found)

    @property
    def token_columns(self) -> frozenset[str]:
        """Columns that have one number per predicted token in some shard."""
        return frozenset(chain.from_iterable(shard.per_token for shard in self.column_shards))

    @property
    def column_shards(self) -> list[ShardInfo]:
        """Those of all layers."""
        return list(chain.from_iterable(layer.shards for layer in self.columns))

    def nbytes(self, groups: Sequence[int]) -> int:
        """Bytes that reading these groups touches."""
        total = 0
        for group in groups:
            entry = self.index.entry(group)
            total += sum(layer.nbytes(group, entry) for layer in (self.tokens, *self.columns))
        return total

    @property
    def bytes_read(self) -> int:
        """Bytes of the records that this process has read."""
        return sum(layer.bytes_read for layer in (self.tokens, *self.columns))


def commit_store(
    directory: Place, shards: Sequence[ShardInfo], *, meta: Mapping[str, Any], shard_bytes: int = SHARD_BYTES
) -> TokenStore:
    """Make the shards one store, in the order given; the manifest is the commit.

    Shards far below ``shard_bytes`` are joined. ``meta`` is plain JSON about how the store was made; it is no part of
    the digest. Raises TornDirectory where a shard is not complete in ``directory``.
    """
    _check_complete(directory, shards)
    with gathered(directory, (f"{shard.name}{INDEX}" for shard in shards)) as local:
        sources = write_index(local, shards)
        index = {NAME: file_facts(local / NAME)}
    firsts = accumulate((shard.groups for shard in shards), initial=0)
    placed = [replace(shard, first=first) for shard, first in zip(shards, firsts, strict=False)]
    _commit(directory, placed, index, shard_bytes=shard_bytes, meta=meta, sources=sources)
    return TokenStore.open(directory)


def commit_columns(
    directory: Place,
    store: TokenStore,
    shards: Iterable[ShardInfo],
    *,
    meta: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
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
    column_layer(directory, ordered, store.index, store.files)
    _commit(directory, ordered, {}, shard_bytes=shard_bytes, meta=meta, store=store.digest)
    return store.with_columns(directory)


def _check_complete(directory: Place, shards: Sequence[ShardInfo]) -> None:
    sizes = sizes_below(directory)
    for shard in shards:
        if not is_complete(shard, sizes):
            raise TornDirectory(f"{directory}: shard {shard.name!r} is not complete")


def _commit(
    directory: Place, shards: Sequence[ShardInfo], index: Mapping[str, Any], *, shard_bytes: int, **facts: Any
) -> None:
    final = []
    for number, run in enumerate(neighbouring_runs(shards, shard_bytes)):
        with gathered(directory, records_of(run)) as local:
            final.append(joined(local, f"shard-{number:06d}", run))
    kept, passing = dict(index), set(chain.from_iterable(map(files_of, shards)))
    content = []
    for shard in final:
        kept |= shard.files
        digests = [own["sha256"] for own in shard.files.values()]
        content.append([shard.groups, shard.per_candidate, shard.per_token, digests])
    passing -= kept.keys()
    whole = [content, [own["sha256"] for own in index.values()], facts.get("store")]
    digest = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    manifest = {"digest": digest, "shards": [asdict(shard) for shard in final], **facts}
    commit(directory, manifest, known=kept, passing=passing)
    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(lambda name: (directory / name).unlink(missing_ok=True), passing))


def _manifest(directory: Place, *, verify: bool = False) -> dict[str, Any]:
    manifest = verify_files(directory) if verify else read_manifest(directory)
    if manifest is None:
        raise TornDirectory(f"{directory} was never committed")
    return manifest


def _shards(manifest: Mapping[str, Any]) -> tuple[ShardInfo, ...]:
    return tuple(ShardInfo.from_json(shard) for shard in manifest["shards"])


def _open(directory: Place, manifest: Mapping[str, Any]) -> TokenStore:
    shards = _shards(manifest)
    index = open_index(File(directory / NAME, manifest["files"][NAME]), manifest["sources"])
    files = OpenFiles()
    return TokenStore(
        digest=manifest["digest"],
        meta=manifest["meta"],
        index=index,
        tokens=make_layer(directory, TOKENS, shards, index, files),
        columns=(column_layer(directory, shards, index, files),),
        files=files,
    )


def _named(names: Sequence[str], values: Column) -> dict[str, Column]:
    return dict(zip(names, values.reshape(len(names), -1), strict=True)) if names else {}
