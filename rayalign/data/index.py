"""What is known of every group of a store without reading it: one file, which all processes of a machine share.

The file is mapped into memory, 35 bytes a pair, so that a process has none of it for itself. It is a safetensors file
with one array per fact; ``blocks`` says what comes before every 64th group, from which any other place follows.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from rayalign.data.group import GroupLengths
from rayalign.data.open_files import File
from rayalign.data.shard import FINISHED, INDEX, ShardInfo
from rayalign.storage.cache import local_file
from rayalign.storage.manifest import TornDirectory

Counts = NDArray[np.int64]
NAME = "index.safetensors"
BLOCK = 64
PIECE = 1 << 18
"""Groups that a walk over an index holds in memory at a time."""
OF_GROUPS = {"prompt_tokens": "<u4", "source": "<u4", "line": "<u4", "said_bytes": "<u4", "num_candidates": "<u2"}
OF_CANDIDATES = {"candidate_tokens": "<u4", "candidate_predicted": "<u4"}
_SAFETENSORS = {"<u8": "U64", "<u4": "U32", "<u2": "U16"}


class Before(NamedTuple):
    """What all groups before one hold together."""

    candidates: int
    tokens: int
    """Prompts once, and candidates."""
    predicted: int
    said: int
    """Bytes of what rows say."""


class Entry(NamedTuple):
    """What the index says of one group."""

    before: Before
    lengths: GroupLengths
    finished: tuple[bool, ...]
    said_bytes: int


@dataclass(frozen=True)
class Piece:
    """Consecutive groups of an index as arrays; those named ``candidate_*`` run over their candidates."""

    first: int
    prompt_tokens: Counts
    num_candidates: Counts
    candidate_tokens: Counts
    candidate_predicted: Counts
    line: Counts

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @cached_property
    def first_candidate(self) -> Counts:
        """[groups + 1] where the candidates of a group begin."""
        return offsets(self.num_candidates)

    @cached_property
    def owner(self) -> Counts:
        """[candidates] the group of each, counted from the first of the piece."""
        return np.repeat(np.arange(len(self)), self.num_candidates)

    @cached_property
    def place(self) -> Counts:
        """[candidates] the place of each in its group."""
        return np.arange(len(self.owner)) - self.first_candidate[self.owner]

    @cached_property
    def packed_tokens(self) -> Counts:
        """Tokens of the prompt, once, and of every candidate."""
        return self.prompt_tokens + np.diff(offsets(self.candidate_tokens)[self.first_candidate])

    @cached_property
    def num_predicted(self) -> Counts:
        return np.diff(offsets(self.candidate_predicted)[self.first_candidate])

    @cached_property
    def longest(self) -> Counts:
        """Tokens of each group's longest sequence: the prompt with one of its candidates."""
        most = np.zeros(len(self), np.int64)
        np.maximum.at(most, self.owner, self.candidate_tokens)
        return self.prompt_tokens + most


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Arrays over groups, and over the candidates of all groups, in a mapped file."""

    sources: tuple[str, ...]
    arrays: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.arrays["prompt_tokens"])

    def entry(self, group: int) -> Entry:
        """The position and the lengths of a group."""
        begin = group - group % BLOCK
        base: list[int] = self.arrays["blocks"][group // BLOCK].tolist()
        counts = self.arrays["num_candidates"][begin : group + 1].tolist()
        first = base[0] + sum(counts[:-1])
        within = self.arrays["candidate_tokens"][base[0] : first + counts[-1]]
        predicted = self.arrays["candidate_predicted"][base[0] : first + counts[-1]]
        prompts, said = self.arrays["prompt_tokens"], self.arrays["said_bytes"]
        earlier, own = within[: first - base[0]], within[first - base[0] :]
        return Entry(
            before=Before(
                candidates=first,
                tokens=base[1]
                + int(prompts[begin:group].sum(dtype=np.int64))
                + int((earlier & (FINISHED - 1)).sum(dtype=np.int64)),
                predicted=base[2] + int(predicted[: first - base[0]].sum(dtype=np.int64)),
                said=base[3] + int(said[begin:group].sum(dtype=np.int64)),
            ),
            lengths=GroupLengths(
                prompt=int(prompts[group]),
                candidates=tuple((own & (FINISHED - 1)).tolist()),
                predicted=tuple(predicted[first - base[0] :].tolist()),
            ),
            finished=tuple((own >= FINISHED).tolist()),
            said_bytes=int(said[group]),
        )

    def before(self, group: int) -> Before:
        """The same of the groups before ``group``, which may be one past the last."""
        if group % BLOCK == 0 or group == len(self):
            return Before(*self.arrays["blocks"][-(-group // BLOCK)].tolist())
        return self.entry(group).before

    def piece(self, groups: range) -> Piece:
        own = slice(groups.start, groups.stop)
        candidates = slice(self.before(groups.start).candidates, self.before(groups.stop).candidates)
        return Piece(
            first=groups.start,
            prompt_tokens=self.arrays["prompt_tokens"][own].astype(np.int64),
            num_candidates=self.arrays["num_candidates"][own].astype(np.int64),
            candidate_tokens=(self.arrays["candidate_tokens"][candidates] & (FINISHED - 1)).astype(np.int64),
            candidate_predicted=self.arrays["candidate_predicted"][candidates].astype(np.int64),
            line=self.arrays["line"][own].astype(np.int64),
        )

    def pieces(self, size: int = PIECE) -> Iterator[Piece]:
        """All groups, some at a time: a walk takes the memory of one piece however large the store is."""
        for first in range(0, len(self), size):
            yield self.piece(range(first, min(first + size, len(self))))

    @property
    def most_candidates(self) -> int:
        """Candidates of the group that has most."""
        return int(self.arrays["num_candidates"].max(initial=0))

    def longest_prompt(self) -> int:
        """The group whose prompt has most tokens."""
        return int(self.arrays["prompt_tokens"].argmax())

    def whole(self) -> Piece:
        """All groups at once, for a store that is known to be small, such as a round."""
        return self.piece(range(len(self)))

    def name(self, group: int) -> str:
        """Source and line of a group, for messages."""
        return f"{self.source(group)}:{self.arrays['line'][group]}"

    def source(self, group: int) -> str:
        number: int = self.arrays["source"][group].item()
        return self.sources[number]


def write_index(directory: Path, shards: Sequence[ShardInfo]) -> tuple[str, ...]:
    """Merge the shards' indexes into that of their store; the sources that it numbers."""
    groups = sum(shard.groups for shard in shards)
    candidates = sum(shard.candidates for shard in shards)
    sizes = {"blocks": ("<u8", (groups - 1) // BLOCK + 2 if groups else 1, len(Before._fields))}
    sizes |= {name: (kind, groups, 1) for name, kind in OF_GROUPS.items()}
    sizes |= {name: (kind, candidates, 1) for name, kind in OF_CANDIDATES.items()}
    named = dict.fromkeys(chain.from_iterable(shard.sources for shard in shards))
    sources = {name: place for place, name in enumerate(named)}
    path = directory / NAME
    arrays, mapped = _created(path, sizes)
    before = np.zeros(len(Before._fields), np.int64)
    first = 0
    for shard in shards:
        part = load_file(directory / f"{shard.name}{INDEX}")
        part["source"] = np.array([sources[name] for name in shard.sources], np.uint32)[part["source"]]
        for name in OF_GROUPS:
            arrays[name][first : first + shard.groups] = part[name]
        for name in OF_CANDIDATES:
            arrays[name][before[0] : before[0] + shard.candidates] = part[name]
        sums = _sums(part) + before
        places = np.arange(-(-first // BLOCK) * BLOCK, first + shard.groups, BLOCK)
        arrays["blocks"][places // BLOCK] = sums[places - first]
        before, first = sums[-1], first + shard.groups
    arrays["blocks"][-1] = before
    mapped.flush()
    return tuple(sources)


def open_index(file: File, sources: Sequence[str]) -> Index:
    """The index of a committed store; raises TornDirectory where it does not have the size that its manifest says."""
    with local_file(file.place, size=file.facts["bytes"], sha256=file.facts["sha256"]) as path:
        if not path.is_file():
            raise TornDirectory(f"{path} is missing")
        if path.stat().st_size != file.facts["bytes"]:
            raise TornDirectory(f"{path} has {path.stat().st_size} bytes, its manifest says {file.facts['bytes']}")
        return Index(sources=tuple(sources), arrays=_mapped(path))


def offsets(sizes: Counts) -> Counts:
    """[n + 1] where each of n runs begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _sums(part: Mapping[str, NDArray[Any]]) -> Counts:
    """[groups + 1, 4] what the groups of a shard before each hold."""
    first = offsets(part["num_candidates"].astype(np.int64))
    tokens = offsets((part["candidate_tokens"] & (FINISHED - 1)).astype(np.int64))[first]
    return np.stack(
        [
            first,
            offsets(part["prompt_tokens"].astype(np.int64)) + tokens,
            offsets(part["candidate_predicted"].astype(np.int64))[first],
            offsets(part["said_bytes"].astype(np.int64)),
        ],
        axis=1,
    )


def _created(path: Path, sizes: Mapping[str, tuple[str, int, int]]) -> tuple[dict[str, NDArray[Any]], mmap.mmap]:
    """A safetensors file of the given arrays, mapped to be filled in."""
    header: dict[str, Any] = {}
    end = 0
    for name, (kind, rows, width) in sizes.items():
        begin, end = end, end + np.dtype(kind).itemsize * rows * width
        shape = [rows] if width == 1 else [rows, width]
        header[name] = {"dtype": _SAFETENSORS[kind], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 8)
    with path.open("wb+") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0)
    return _views(mapped), mapped


def _mapped(path: Path) -> dict[str, NDArray[Any]]:
    with path.open("rb") as file:
        return _views(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _views(mapped: mmap.mmap) -> dict[str, NDArray[Any]]:
    """The arrays of a mapped safetensors file, which copy nothing."""
    kinds = {name: kind for kind, name in _SAFETENSORS.items()}
    begin = 8 + int.from_bytes(mapped[:8], "little")
    found = {}
    for name, own in json.loads(mapped[8:begin]).items():
        start, stop = (begin + offset for offset in own["data_offsets"])
        flat = np.frombuffer(memoryview(mapped)[start:stop], kinds[own["dtype"]])
        found[name] = flat.reshape(own["shape"])
    return found
