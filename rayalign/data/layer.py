"""Reading records: one per group, in files that together cover a store, memory-mapped or fetched by byte ranges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayalign.data.remote import read_ranges
from rayalign.data.shard import ShardInfo, Words, has_checksum
from rayalign.storage.manifest import TornDirectory

WORD_BYTES = 4


@dataclass(slots=True, kw_only=True)
class Layer:
    """The records of every group of one kind: tokens, or a set of columns.

    With an ``origin`` the files are a sparse local copy of remote ones: a record that is not here yet does not have its
    checksum, and is fetched. Several processes may fill one copy, since equal bytes go to equal places.
    """

    shards: tuple[ShardInfo, ...]
    paths: tuple[Path, ...]
    """One file of records per shard."""
    offsets: NDArray[np.int64]
    """[groups + 1] first word of every record, counted through all files."""
    origin: str | None
    bytes_read: int = 0
    """Bytes of records asked of the disk, or of the origin where there is one."""
    _files: tuple[Words, ...] = field(init=False, repr=False)
    _first: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._first = np.array([shard.first for shard in self.shards], np.int64)
        ends = self._first + [shard.groups for shard in self.shards]
        sizes = (self.offsets[ends] - self.offsets[self._first]) * WORD_BYTES
        mode = "r" if self.origin is None else "r+"
        self._files = tuple(_map(path, size, mode) for path, size in zip(self.paths, sizes.tolist(), strict=True))

    def shard_of(self, group: int) -> int:
        return int(np.searchsorted(self._first, group, side="right")) - 1

    def read(self, group: int) -> Words:
        """The words of a record; raises TornDirectory where they do not have their checksum."""
        file, start, stop = self._span(group)
        if self.origin is None:
            self.bytes_read += (stop - start) * WORD_BYTES
        else:
            self.fetch([group])
        record = self._files[file][start:stop]
        if not has_checksum(record):
            raise TornDirectory(f"{self.paths[file]}: the record of group {group} does not have its checksum")
        return record[:-1]

    def nbytes(self, groups: Iterable[int]) -> int:
        """Bytes of the records of ``groups``."""
        chosen = np.fromiter(groups, np.int64)
        return int((self.offsets[chosen + 1] - self.offsets[chosen]).sum()) * WORD_BYTES

    def fetch(self, groups: Iterable[int]) -> None:
        """Copy those records that are not here yet from the origin, all in one batch of requests."""
        if self.origin is None:
            return
        spans = [self._span(group) for group in groups]
        absent = [(file, start, stop) for file, start, stop in spans if not has_checksum(self._files[file][start:stop])]
        ranges = [(self.paths[file].name, start * WORD_BYTES, stop * WORD_BYTES) for file, start, stop in absent]
        for (file, start, stop), data in zip(absent, read_ranges(self.origin, ranges), strict=True):
            self._files[file][start:stop] = np.frombuffer(data, "<i4")
            self.bytes_read += len(data)

    def _span(self, group: int) -> tuple[int, int, int]:
        """(file, first word, one past the checksum) of a record."""
        file = self.shard_of(group)
        base = self.offsets[self._first[file]]
        return file, int(self.offsets[group] - base), int(self.offsets[group + 1] - base)


def _map(path: Path, size: int, mode: str) -> Words:
    if not path.is_file():
        raise TornDirectory(f"{path} is missing")
    if path.stat().st_size != size:
        raise TornDirectory(f"{path} has {path.stat().st_size} bytes, its index says {size}")
    if size == 0:
        return np.empty(0, np.int32)
    return np.asarray(np.memmap(path, dtype="<i4", mode=mode))  # type: ignore[call-overload]
