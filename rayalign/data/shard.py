"""Shards of a token store: one record per group, written by independent processes.

A record is a run of little-endian 32-bit words. The last one is the CRC-32 of the others: so every read is checked.

    tokens    prompt, then every candidate, as int32; a token that is not predicted is stored as ~id (negative)
    columns   float32: the per-candidate columns [K], then the per-token columns over predicted tokens; NaN = missing

Records have no header: their lengths follow from the index of the store. What rows say, the third kind of record, is
JSON. A file of columns, or of what rows say, exists where there is any.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from rayalign.data.group import Candidate, Column, Group, GroupLengths, TokenIds, check_group
from rayalign.data.schema import Turns
from rayalign.storage.place import ObjectPath, Place

Words = NDArray[np.int32]
TOKENS, COLUMNS, SAID, INDEX = ".tokens", ".columns", ".said", ".index"
"""Endings of a shard's files. Its index is merged into that of the store when the store is committed."""
_SIDECAR = ".shard.json"
SHARD_BYTES = 128 << 20
"""A shard that has so many bytes of tokens and columns is full."""
UNBOUNDED = 1 << 62
MOST_SHARDS = 256
"""Into so many shards a stage cuts a store, unless they are too large."""
READERS = 8
"""Small files that are read at a time."""
FINISHED = 1 << 31
"""Set in the number of a candidate's tokens: it ends in its end token."""
Said = str | Turns | Mapping[str, Any]
"""A prompt; or an object of it and what a row says besides: ``tools``, ``chat_template_kwargs``, ``answers``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """A complete shard; written last, as ``<name>.shard.json``, it says that the shard's files are whole."""

    name: str
    groups: int
    candidates: int = 0
    first: int = 0
    """The shard's first group in the store; set by the commit for shards of tokens."""
    sources: tuple[str, ...] = ()
    per_candidate: tuple[str, ...] = ()
    per_token: tuple[str, ...] = ()
    files: Mapping[str, Mapping[str, Any]]
    """``bytes`` and ``sha256`` of every file."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ShardInfo:
        lists = ("sources", "per_candidate", "per_token")
        return cls(**value | {name: tuple(value[name]) for name in lists})

    def has(self, ending: str) -> bool:
        return f"{self.name}{ending}" in self.files

    @property
    def num_bytes(self) -> int:
        """The bytes of its records; its index is not counted."""
        return sum(own["bytes"] for name, own in self.files.items() if not name.endswith(INDEX))


class FileWriter:
    """A file that appears whole or not at all, and whose digest is known without reading it again.

    Several processes may write one path (a retried task): each renames a whole file of its own into place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        self.stream: IO[bytes] = self.temporary.open("wb")
        self.sha = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self.sha.update(data)
        self.bytes += len(data)

    def finish(self) -> dict[str, Any]:
        """Put the file into its place; its size and digest."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        os.replace(self.temporary, self.path)
        return {"bytes": self.bytes, "sha256": self.sha.hexdigest()}


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """A file with ``data``, which replaces what was there at once; its size and digest."""
    file = FileWriter(path)
    file.write(data)
    return file.finish()


class ShardWriter:
    """Groups, appended as they come, as the shards ``name``, ``name-1``, … of an uncommitted directory.

    A full shard is closed, and so is one whose columns are not all that the next groups have. Equal groups, appended in
    equal portions, make equal bytes. Writing a shard again replaces it.
    """

    def __init__(self, directory: Path, name: str, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = directory
        self.name = name
        self.shard_bytes = shard_bytes
        self.finished: list[ShardInfo] = []
        self._open: _OpenShard | None = None

    def append(self, groups: Sequence[Group], said: Sequence[Said] = ()) -> None:
        """Add groups, in order; ``said`` is what their rows say, one per group.

        Raises ValueError for a malformed group.
        """
        for group in groups:
            check_group(group)
        per_candidate = _names(group.per_candidate for group in groups)
        per_token = _names(group.per_token for group in groups)
        if self._open is not None and not self._open.takes(per_candidate, per_token, says=bool(said)):
            self.close()
        if self._open is None:
            name = f"{self.name}-{len(self.finished)}" if self.finished else self.name
            self._open = _OpenShard(self.directory, name, per_candidate, per_token, says=bool(said))
        self._open.append(groups, said)
        if self._open.num_bytes >= self.shard_bytes:
            self.close()

    def close(self) -> tuple[ShardInfo, ...]:
        """All shards, the last one finished."""
        if self._open is not None:
            self.finished.append(self._open.finish())
            self._open = None
        return tuple(self.finished)


class _OpenShard:
    """A shard that is being written: its index is in memory, its records are in files."""

    def __init__(
        self, directory: Path, name: str, per_candidate: Sequence[str], per_token: Sequence[str], *, says: bool
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.name = name
        self.per_candidate = tuple(per_candidate)
        self.per_token = tuple(per_token)
        endings = [TOKENS] + [COLUMNS] * bool(self.per_candidate or self.per_token) + [SAID] * says
        self.files = {ending: FileWriter(directory / f"{name}{ending}") for ending in endings}
        self.sources: dict[str, int] = {}
        self.parts: list[dict[str, NDArray[Any]]] = []

    @property
    def num_bytes(self) -> int:
        return self.files[TOKENS].bytes + (self.files[COLUMNS].bytes if COLUMNS in self.files else 0)

    def takes(self, per_candidate: Sequence[str], per_token: Sequence[str], *, says: bool) -> bool:
        known = set(self.per_candidate) >= set(per_candidate) and set(self.per_token) >= set(per_token)
        return known and says == (SAID in self.files)

    def append(self, groups: Sequence[Group], said: Sequence[Said]) -> None:
        for group in groups:
            self.files[TOKENS].write(_record(_token_words(group)))
            if COLUMNS in self.files:
                self.files[COLUMNS].write(_record(_column_words(_complete(group, self.per_candidate, self.per_token))))
        texts = [json.dumps(own, ensure_ascii=False, default=str).encode() for own in said]
        for text, _ in zip(texts, groups if said else (), strict=True):
            self.files[SAID].write(text)
        places = [self.sources.setdefault(group.source, len(self.sources)) for group in groups]
        self.parts.append(_index_of(groups, places, [len(text) for text in texts] or [0] * len(groups)))

    def finish(self) -> ShardInfo:
        index: dict[str, NDArray[Any]] = {}
        for name in self.parts[0]:
            index[name] = np.concatenate([part[name] for part in self.parts])
        files = {f"{self.name}{ending}": file.finish() for ending, file in self.files.items()}
        files[f"{self.name}{INDEX}"] = write_file(self.directory / f"{self.name}{INDEX}", save(index))
        info = ShardInfo(
            name=self.name,
            groups=len(index["num_candidates"]),
            candidates=len(index["candidate_tokens"]),
            sources=tuple(self.sources),
            per_candidate=self.per_candidate,
            per_token=self.per_token,
            files=files,
        )
        _write_sidecar(self.directory, info)
        return info


def write_shard(directory: Path, name: str, groups: Sequence[Group], *, prompts: Sequence[Said] = ()) -> ShardInfo:
    """Store groups as one shard, however large: see :class:`ShardWriter`.

    ``prompts`` are the prompts as rows have them, one per group, for scorers and for people, with what else is said.
    """
    writer = ShardWriter(directory, name, shard_bytes=UNBOUNDED)
    writer.append(groups, prompts)
    (info,) = writer.close()
    return info


def write_column_shard(
    directory: Path,
    name: str,
    *,
    first: int,
    per_candidate: Mapping[str, Sequence[Column]] | None = None,
    per_token: Mapping[str, Sequence[Column]] | None = None,
) -> ShardInfo:
    """Store new columns of the groups ``first``, ``first + 1``, … of an existing store: one array per group."""
    given = [*sorted((per_candidate or {}).items()), *sorted((per_token or {}).items())]
    columns = [arrays for _, arrays in given]
    records = [_record(_column_words(values)) for values in zip(*columns, strict=True)]
    directory.mkdir(parents=True, exist_ok=True)
    info = ShardInfo(
        name=name,
        groups=len(records),
        first=first,
        per_candidate=tuple(sorted(per_candidate or {})),
        per_token=tuple(sorted(per_token or {})),
        files={f"{name}{COLUMNS}": write_file(directory / f"{name}{COLUMNS}", b"".join(records))},
    )
    _write_sidecar(directory, info)
    return info


def shard_ranges(groups: int, num_bytes: int, *, least: int) -> list[range]:
    """The groups of each shard that a stage writes for a store, of ``num_bytes`` in all and ``least`` groups each.

    Shards of a large store are large: so committing them copies nothing.
    """
    most = SHARD_BYTES * groups // max(1, num_bytes)
    size = max(least, min(groups // MOST_SHARDS, most))
    return [range(first, min(first + size, groups)) for first in range(0, groups, size)]


def finished_shards(directory: Place) -> dict[str, ShardInfo]:
    """Name → shard, for those that are complete: what an interrupted writer need not write again.

    A shard's files are flushed before they are renamed, and it is listed last: no byte of them is read here.
    """
    sizes = sizes_below(directory)
    names = sorted(name for name in sizes if name.endswith(_SIDECAR))
    with ThreadPoolExecutor(READERS) as pool:
        texts = list(pool.map(lambda name: (directory / name).read_bytes(), names))
    found = [ShardInfo.from_json(json.loads(text)) for text in texts]
    return {info.name: info for info in found if is_complete(info, sizes)}


def sizes_below(directory: Place) -> dict[str, int]:
    """Name → bytes of every file of a directory of shards, in one request."""
    if isinstance(directory, ObjectPath):
        return {name: facts.st_size for name, facts in directory.objects().items()}
    if not directory.is_dir():
        return {}
    sizes = {}
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # an unfinished file of another process was renamed
            sizes[path.name] = path.stat().st_size
    return sizes


def is_complete(info: ShardInfo, sizes: Mapping[str, int]) -> bool:
    """Whether every file of a shard is there with its size, by :func:`sizes_below`."""
    return all(sizes.get(name) == own["bytes"] for name, own in info.files.items())


def files_of(info: ShardInfo) -> set[str]:
    """The files that a shard has while its store is not committed."""
    return {*info.files, f"{info.name}{_SIDECAR}"}


def has_checksum(record: Words) -> bool:
    """Whether a record ends in the CRC-32 of its other words."""
    return zlib.crc32(record[:-1].data) == int(record[-1]) & 0xFFFF_FFFF


def decode_tokens(
    words: Words, lengths: GroupLengths, finished: Sequence[bool]
) -> tuple[TokenIds, tuple[Candidate, ...]]:
    """(prompt ids, candidates) of a record of tokens."""
    mask = words >= 0
    ids = np.where(mask, words, ~words)
    ends = list(accumulate(lengths.candidates, initial=lengths.prompt))
    return ids[: lengths.prompt], tuple(
        Candidate(ids=ids[start:stop], mask=mask[start:stop], finished=done)
        for (start, stop), done in zip(pairwise(ends), finished, strict=True)
    )


def _index_of(groups: Sequence[Group], places: Sequence[int], said_bytes: Sequence[int]) -> dict[str, NDArray[Any]]:
    """What the index says of groups; ``places`` number their sources."""
    candidates = list(chain.from_iterable(group.candidates for group in groups))
    return {
        "prompt_tokens": np.array([len(group.prompt_ids) for group in groups], np.uint32),
        "num_candidates": np.array([len(group.candidates) for group in groups], np.uint16),
        "source": np.array(places, np.uint32),
        "line": np.array([group.line for group in groups], np.uint32),
        "said_bytes": np.array(said_bytes, np.uint32),
        "candidate_tokens": np.array([len(own.ids) + FINISHED * own.finished for own in candidates], np.uint32),
        "candidate_predicted": np.array([own.num_predicted for own in candidates], np.uint32),
    }


def _token_words(group: Group) -> Words:
    parts = [~group.prompt_ids]
    parts += [np.where(candidate.mask, candidate.ids, ~candidate.ids) for candidate in group.candidates]
    return np.concatenate(parts).astype("<i4")


def _complete(group: Group, per_candidate: Sequence[str], per_token: Sequence[str]) -> list[Column]:
    """The group's columns in the shard's order; NaN where it lacks one that others have."""
    no_candidate = np.full(len(group.candidates), np.nan, np.float32)
    no_token = np.full(sum(candidate.num_predicted for candidate in group.candidates), np.nan, np.float32)
    return [
        *(group.per_candidate.get(name, no_candidate) for name in per_candidate),
        *(group.per_token.get(name, no_token) for name in per_token),
    ]


def _column_words(columns: Sequence[Column]) -> Words:
    return np.concatenate([np.empty(0), *columns]).astype("<f4").view(np.int32)


def _record(words: Words) -> bytes:
    data = words.tobytes()
    return data + zlib.crc32(data).to_bytes(4, "little")


def _names(columns: Iterable[Mapping[str, Column]]) -> tuple[str, ...]:
    return tuple(sorted(set(chain.from_iterable(columns))))


def _write_sidecar(directory: Path, info: ShardInfo) -> None:
    write_file(directory / f"{info.name}{_SIDECAR}", json.dumps(asdict(info)).encode())
