"""Reading records: one per group, in files that together cover a store and are mapped when they are first read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayalign.data.index import Before, Entry, Index, Piece, offsets
from rayalign.data.open_files import File, OpenFiles
from rayalign.data.shard import COLUMNS, TOKENS, ShardInfo, Words, has_checksum
from rayalign.storage.manifest import TornDirectory
from rayalign.storage.place import Place

WORD_BYTES = 4


@dataclass(slots=True, kw_only=True)
class Layer:
    """The records of every group of one kind: tokens, or a set of columns."""

    directory: Place
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
                _check_size(self.file(number), WORD_BYTES * self._word(number, stop, self.starts[number + 1]))

    def shard_of(self, group: int) -> int:
        return int(np.searchsorted(self._first, group, side="right")) - 1

    def exists(self, number: int) -> bool:
        return self.shards[number].has(self.ending)

    def file(self, number: int) -> File:
        """The file of a shard, which has one."""
        name = f"{self.shards[number].name}{self.ending}"
        return File(self.directory / name, self.shards[number].files[name])

    def files_of(self, groups: range) -> list[File]:
        """The files that have a record of these groups, of which there is one at least."""
        numbers = range(self.shard_of(groups[0]), self.shard_of(groups[-1]) + 1)
        return [self.file(number) for number in numbers if self.exists(number)]

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
            raise self._damaged(number, group)
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
                raise TornDirectory(
                    f"{self.file(number).place}: the record of group {group} does not have its checksum"
                )

    def _damaged(self, number: int, group: int) -> TornDirectory:
        return TornDirectory(f"{self.file(number).place}: the record of group {group} does not have its checksum")

    def _words(self, number: int) -> Words:
        return self.files.bytes_of(self.file(number)).view("<i4")

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


def make_layer(directory: Place, ending: str, shards: Sequence[ShardInfo], index: Index, files: OpenFiles) -> Layer:
    """Raises TornDirectory where a file is missing or has another size than the index says."""
    ends = [shard.first for shard in shards] + [len(index)]
    return Layer(
        directory=directory,
        ending=ending,
        shards=tuple(shards),
        starts=tuple(index.before(group) for group in ends),
        files=files,
    )


def column_layer(directory: Place, shards: Sequence[ShardInfo], index: Index, files: OpenFiles) -> Layer:
    return make_layer(directory, COLUMNS, shards, index, files)


def _check_size(file: File, size: int) -> None:
    """Raises TornDirectory. Until a file of an object store is fetched, its manifest is believed."""
    there = file.facts["bytes"]
    if isinstance(file.place, Path):
        if not file.place.is_file():
            raise TornDirectory(f"{file.place} is missing")
        there = file.place.stat().st_size
    if there != size:
        raise TornDirectory(f"{file.place} has {there} bytes, its index says {size}")
