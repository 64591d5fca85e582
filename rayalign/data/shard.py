"""Shards of a token store: one record per group, written by independent processes.

A record is a run of little-endian 32-bit words that ends in the CRC-32 of the others, so that every read is checked,
wherever the bytes came from:

    tokens    prompt, then every candidate, as int32; a token that is not predicted is stored as ~id (negative)
    columns   float32: the per-candidate columns [K], then the per-token columns over predicted tokens; NaN = missing

Records have no header: their lengths follow from the shard's index, which every reader holds in memory.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from rayalign.data.group import Candidate, Column, Group, GroupLengths, TokenIds, check_group
from rayalign.data.schema import Turns
from rayalign.storage.manifest import file_digest
from rayalign.storage.place import Place, listed, write_whole

Words = NDArray[np.int32]
_SIDECAR = ".shard.json"
PROMPTS = ".prompts"
"""Ending of the file with what rows say, a JSON list of :data:`Said`."""
Said = str | Turns | Mapping[str, Any]
"""A prompt; or an object of it and what a row says besides: ``tools``, ``chat_template_kwargs``, ``answers``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """A complete shard; written last, as ``<name>.shard.json``, it says that the shard's files are whole."""

    name: str
    groups: int
    first: int = 0
    """The shard's first group in the store; set by the commit for shards of tokens."""
    sources: tuple[str, ...] = ()
    per_candidate: tuple[str, ...] = ()
    per_token: tuple[str, ...] = ()
    files: Mapping[str, str]
    """SHA-256 of every file."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardInfo:
        fields: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        return cls(**fields)


def write_shard(directory: Place, name: str, groups: Sequence[Group], *, prompts: Sequence[Said] = ()) -> ShardInfo:
    """Store groups, in order, as the shard ``name`` of an uncommitted directory.

    ``prompts`` are the prompts as rows have them, one per group, for scorers and for people, with what else is said.
    Equal groups make equal bytes. Writing a shard again replaces it. Raises ValueError for a malformed group.
    """
    for group in groups:
        check_group(group)
    sources = tuple(dict.fromkeys(group.source for group in groups))
    per_candidate = _names(group.per_candidate for group in groups)
    per_token = _names(group.per_token for group in groups)
    candidates = [candidate for group in groups for candidate in group.candidates]
    index: dict[str, NDArray[Any]] = {
        "prompt_tokens": np.array([len(group.prompt_ids) for group in groups], np.int32),
        "num_candidates": np.array([len(group.candidates) for group in groups], np.int32),
        "source": np.array([sources.index(group.source) for group in groups], np.int32),
        "line": np.array([group.line for group in groups], np.int64),
        "candidate_tokens": np.array([len(candidate.ids) for candidate in candidates], np.int32),
        "candidate_predicted": np.array([candidate.num_predicted for candidate in candidates], np.int32),
        "candidate_finished": np.array([candidate.finished for candidate in candidates], np.bool_),
    }
    files = {
        f"{name}.index": save(index),
        f"{name}.tokens": b"".join(_record(_token_words(group)) for group in groups),
        f"{name}.columns": b"".join(
            _record(_column_words(_complete(group, per_candidate, per_token))) for group in groups
        ),
    }
    if prompts:
        texts = [prompt for prompt, _ in zip(prompts, groups, strict=True)]
        files[f"{name}{PROMPTS}"] = json.dumps(texts, ensure_ascii=False, default=str).encode()
    facts = {"sources": sources, "per_candidate": per_candidate, "per_token": per_token}
    return _commit_shard(directory, name, files, groups=len(groups), **facts)


def write_column_shard(
    directory: Place,
    name: str,
    *,
    first: int,
    per_candidate: Mapping[str, Sequence[Column]] | None = None,
    per_token: Mapping[str, Sequence[Column]] | None = None,
) -> ShardInfo:
    """Store new columns of the groups ``first``, ``first + 1``, … of an existing store: one array per group."""
    given = [*sorted((per_candidate or {}).items()), *sorted((per_token or {}).items())]
    records = [_record(_column_words(values)) for values in zip(*(arrays for _, arrays in given), strict=True)]
    return _commit_shard(
        directory,
        name,
        {f"{name}.columns": b"".join(records)},
        groups=len(records),
        first=first,
        per_candidate=tuple(sorted(per_candidate or {})),
        per_token=tuple(sorted(per_token or {})),
    )


def finished_shards(directory: Place) -> dict[str, ShardInfo]:
    """Name → shard, for those that are complete and unaltered: what an interrupted writer need not write again."""
    finished = {}
    for sidecar in listed(directory, f"*{_SIDECAR}"):
        info = ShardInfo.from_json(json.loads(sidecar.read_bytes()))
        paths = {directory / name: digest for name, digest in info.files.items()}
        if all(path.is_file() and file_digest(path) == digest for path, digest in paths.items()):
            finished[info.name] = info
    return finished


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
    return tuple(sorted({name for mapping in columns for name in mapping}))


def _commit_shard(directory: Place, name: str, files: Mapping[str, bytes], **facts: Any) -> ShardInfo:
    directory.mkdir(parents=True, exist_ok=True)
    digests = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
    info = ShardInfo(name=name, files=digests, **facts)
    for file, data in files.items():
        write_whole(directory / file, data)
    write_whole(directory / f"{name}{_SIDECAR}", json.dumps(asdict(info), indent=1).encode())
    return info
