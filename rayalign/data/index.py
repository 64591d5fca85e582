"""What is known of every group of a store without reading it: held in memory by every reader, some 40 bytes a pair."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from rayalign.data.group import GroupLengths
from rayalign.data.shard import ShardInfo
from rayalign.storage.manifest import TornDirectory

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Arrays over groups; those named ``candidate_*`` run over the candidates of all groups."""

    prompt_tokens: Counts
    num_candidates: Counts
    packed_tokens: Counts
    """Tokens of the prompt, once, and of every candidate."""
    num_predicted: Counts
    line: Counts
    source: Counts
    """Indices into ``sources``."""
    sources: tuple[str, ...]
    candidate_tokens: Counts
    candidate_predicted: Counts
    candidate_finished: NDArray[np.bool_]
    first_candidate: Counts
    """[groups + 1] where the candidates of a group begin."""

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def candidates(self, group: int) -> slice:
        """The candidates of a group in the arrays over candidates."""
        return slice(int(self.first_candidate[group]), int(self.first_candidate[group + 1]))

    def lengths(self, group: int) -> GroupLengths:
        own = self.candidates(group)
        return GroupLengths(
            prompt=int(self.prompt_tokens[group]),
            candidates=tuple(self.candidate_tokens[own].tolist()),
            predicted=tuple(self.candidate_predicted[own].tolist()),
        )

    def name(self, group: int) -> str:
        """Source and line of a group, for messages."""
        return f"{self.sources[self.source[group]]}:{self.line[group]}"


def read_index(directory: Path, shards: Sequence[ShardInfo]) -> Index:
    """The shards' indexes, one after the other; raises TornDirectory where one is missing or altered."""
    parts = [_load(directory, shard) for shard in shards]
    sources = tuple(dict.fromkeys(name for shard in shards for name in shard.sources))
    for part, shard in zip(parts, shards, strict=True):
        part["source"] = np.array([sources.index(name) for name in shard.sources], np.int64)[part["source"]]

    def whole(name: str) -> Counts:
        return np.concatenate([np.empty(0, np.int64), *(part[name] for part in parts)])

    first_candidate = offsets(whole("num_candidates"))
    prompt, tokens, predicted = whole("prompt_tokens"), whole("candidate_tokens"), whole("candidate_predicted")
    return Index(
        prompt_tokens=prompt,
        num_candidates=np.diff(first_candidate),
        packed_tokens=prompt + np.diff(offsets(tokens)[first_candidate]),
        num_predicted=np.diff(offsets(predicted)[first_candidate]),
        line=whole("line"),
        source=whole("source"),
        sources=sources,
        candidate_tokens=tokens,
        candidate_predicted=predicted,
        candidate_finished=whole("candidate_finished").astype(np.bool_),
        first_candidate=first_candidate,
    )


def _load(directory: Path, shard: ShardInfo) -> dict[str, NDArray[Any]]:
    file = f"{shard.name}.index"
    path = directory / file
    if not path.is_file():
        raise TornDirectory(f"{path} is missing")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.files[file]:
        raise TornDirectory(f"{path} does not have the digest in the manifest")
    return load(data)


def offsets(sizes: Counts) -> Counts:
    """[n + 1] where each of n runs begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
