"""Reading records: one per group, in memory-mapped files that together cover a store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayalign.data.shard import ShardInfo, Words, has_checksum
from rayalign.storage.manifest import TornDirectory

WORD_BYTES = 4


@dataclass(slots=True, kw_only=True)
class Layer:
    """The records of every group of one kind: tokens, or a set of columns."""

    shards: tuple[ShardInfo, ...]
    paths: tuple[Path, ...]
    """One file of records per shard."""
    offsets: NDArray[np.int64]
    """[groups + 1] first word of every record, counted through all files."""
    bytes_read: int = 0
    """Bytes of the records that this process has read."""
    _files: tuple[Words, ...] = field(init=False, repr=False)
    _first: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._first = np.array([shard.first for shard in self.shards], np.int64)
        ends = self._first + [shard.groups for shard in self.shards]
        sizes = (self.offsets[ends] - self.offsets[self._first]) * WORD_BYTES
        self._files = tuple(_map(path, size) for path, size in zip(self.paths, sizes.tolist(), strict=True))

    def shard_of(self, group: int) -> int:
        return int(np.searchsorted(self._first, group, side="right")) - 1

    def read(self, group: int) -> Words:
        """The words of a record; raises TornDirectory where they do not have their checksum."""
        file, start, stop = self._span(group)
        self.bytes_read += (stop - start) * WORD_BYTES
        record = self._files[file][start:stop]
        if not has_checksum(record):
            raise TornDirectory(f"{self.paths[file]}: the record of group {group} does not have its checksum")
        return record[:-1]

    def nbytes(self, groups: Iterable[int]) -> int:
        """Bytes of the records of ``groups``."""
        chosen = np.fromiter(groups, np.int64)
        return int((self.offsets[chosen + 1] - self.offsets[chosen]).sum()) * WORD_BYTES

    def _span(self, group: int) -> tuple[int, int, int]:
        """(file, first word, one past the checksum) of a record."""
        file = self.shard_of(group)
        base = self.offsets[self._first[file]]
        return file, int(self.offsets[group] - base), int(self.offsets[group + 1] - base)


def _map(path: Path, size: int) -> Words:
    if not path.is_file():
        raise TornDirectory(f"{path} is missing")
    if path.stat().st_size != size:
        raise TornDirectory(f"{path} has {path.stat().st_size} bytes, its index says {size}")
    if size == 0:
        return np.empty(0, np.int32)
    return np.asarray(np.memmap(path, dtype="<i4", mode="r"))
