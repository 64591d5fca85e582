"""Reading records: one per group, in files that together cover a store and are mapped when they are first read."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayalign.data.index import Before, Entry, Index, Piece, offsets
from rayalign.data.shard import COLUMNS, TOKENS, ShardInfo, Words, has_checksum
from rayalign.storage.manifest import TornDirectory

WORD_BYTES = 4
MOST_FILES = 32
"""Files that a store holds open; that of the group which was asked for longest ago is closed first."""


class OpenFiles:
    """The files of a store, mapped as they are needed."""

    def __init__(self) -> None:
        self._mapped: OrderedDict[Path, NDArray[np.uint8]] = OrderedDict()

    def __getitem__(self, path: Path) -> NDArray[np.uint8]:
        if path in self._mapped:
            self._mapped.move_to_end(path)
            return self._mapped[path]
        if len(self._mapped) >= MOST_FILES:
            self._mapped.popitem(last=False)
        self._mapped[path] = found = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        return found


@dataclass(slots=True, kw_only=True)
class Layer:
    """The records of every group of one kind: tokens, or a set of columns."""

    directory: Path
    ending: str
    shards: tuple[ShardInfo, ...]
    """Those of a store in order; of them, some may have no file of this kind."""
    starts: tuple[Before, ...]
    """[shards + 1] what the store holds before each shard, and in all."""
    files: OpenFiles
    bytes_read: int = 0
    """Bytes of the records that this process has read."""
    _first: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._first = np.array([shard.first for shard in self.shards], np.int64)
        for number, shard in enumerate(self.shards):
            if self.exists(number):
                stop = shard.first + shard.groups
                _check_size(self.path(number), WORD_BYTES * self._word(number, stop, self.starts[number + 1]))

    def shard_of(self, group: int) -> int:
        return int(np.searchsorted(self._first, group, side="right")) - 1

    def exists(self, number: int) -> bool:
        return self.shards[number].has(self.ending)

    def path(self, number: int) -> Path:
        return self.directory / f"{self.shards[number].name}{self.ending}"

    def read(self, group: int, entry: Entry) -> tuple[ShardInfo, Words] | None:
        """The shard of a group, and the words of its record; None where the shard has no record of this kind.

        Raises TornDirectory where they do not have their checksum.
        """
        number = self.shard_of(group)
        if not self.exists(number):
            return None
        start = self._word(number, group, entry.before)
        stop = start + self._size(number, entry)
        self.bytes_read += (stop - start) * WORD_BYTES
        record = self._words(number)[start:stop]
        if not has_checksum(record):
            raise TornDirectory(f"{self.path(number)}: the record of group {group} does not have its checksum")
        return self.shards[number], record[:-1]

    def column(self, name: str, number: int, piece: Piece, before: Before) -> NDArray[np.float32] | None:
        """One column of groups of one shard, over their candidates or tokens; None where the shard has none.

        Raises TornDirectory where a record does not have its checksum.
        """
        shard = self.shards[number]
        if name not in shard.per_candidate + shard.per_token:
            return None
        per_candidate, per_token = len(shard.per_candidate), len(shard.per_token)
        first = self._word(number, piece.first, before)
        sizes = per_candidate * piece.num_candidates + per_token * piece.num_predicted + 1
        records = first + offsets(sizes)
        words = self._words(number)[records[0] : records[-1]]
        self._check(number, words, records - records[0], piece.first)
        if name in shard.per_candidate:
            widths, begin = piece.num_candidates, shard.per_candidate.index(name) * piece.num_candidates
        else:
            widths = piece.num_predicted
            begin = per_candidate * piece.num_candidates + shard.per_token.index(name) * widths
        places = np.repeat(records[:-1] - records[0] + begin - offsets(widths)[:-1], widths)
        return words[places + np.arange(len(places))].view(np.float32)

    def prompts(self, piece: Piece, before: Before) -> Iterator[bytes]:
        """The words of the prompts of groups of one shard of tokens.

        Raises TornDirectory where a record does not have its checksum.
        """
        number = self.shard_of(piece.first)
        first = self._word(number, piece.first, before)
        records = offsets(piece.packed_tokens + 1)
        words = self._words(number)[first : first + records[-1]]
        self._check(number, words, records, piece.first)
        for start, tokens in zip(records.tolist(), piece.prompt_tokens.tolist(), strict=False):
            yield words[start : start + tokens].tobytes()

    def nbytes(self, group: int, entry: Entry) -> int:
        """Bytes of the record of a group."""
        number = self.shard_of(group)
        return self._size(number, entry) * WORD_BYTES if self.exists(number) else 0

    def _check(self, number: int, words: Words, records: NDArray[np.int64], first: int) -> None:
        data, bounds = words.data.cast("B"), (records * WORD_BYTES).tolist()
        sums = words[records[1:] - 1].view(np.uint32).tolist()
        for place, expected in enumerate(sums):
            if zlib.crc32(data[bounds[place] : bounds[place + 1] - WORD_BYTES]) != expected:
                group = first + place
                raise TornDirectory(f"{self.path(number)}: the record of group {group} does not have its checksum")

    def _words(self, number: int) -> Words:
        return self.files[self.path(number)].view("<i4")

    def _size(self, number: int, entry: Entry) -> int:
        """Words of a record, its checksum among them."""
        if self.ending == TOKENS:
            return entry.lengths.packed + 1
        shard, lengths = self.shards[number], entry.lengths
        return len(shard.per_candidate) * len(lengths.candidates) + len(shard.per_token) * sum(lengths.predicted) + 1

    def _word(self, number: int, group: int, before: Before) -> int:
        """Words of the shard's file before the record of ``group``."""
        shard, start = self.shards[number], self.starts[number]
        checksums = group - shard.first
        if self.ending == TOKENS:
            return before.tokens - start.tokens + checksums
        of_candidates = len(shard.per_candidate) * (before.candidates - start.candidates)
        return of_candidates + len(shard.per_token) * (before.predicted - start.predicted) + checksums


def make_layer(directory: Path, ending: str, shards: Sequence[ShardInfo], index: Index, files: OpenFiles) -> Layer:
    """Raises TornDirectory where a file is missing or has another size than the index says."""
    ends = [shard.first for shard in shards] + [len(index)]
    return Layer(
        directory=directory,
        ending=ending,
        shards=tuple(shards),
        starts=tuple(index.before(group) for group in ends),
        files=files,
    )


def column_layer(directory: Path, shards: Sequence[ShardInfo], index: Index, files: OpenFiles) -> Layer:
    return make_layer(directory, COLUMNS, shards, index, files)


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise TornDirectory(f"{path} is missing")
    if path.stat().st_size != size:
        raise TornDirectory(f"{path} has {path.stat().st_size} bytes, its index says {size}")
