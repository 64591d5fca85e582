"""Small shards that independent tasks wrote, one after the other → shards of a bounded size.

A task writes a shard of its own, so that it can be repeated alone. A small input on many cores makes many small shards.
They are joined when the store is committed: a store has few files, whatever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from rayalign.data.shard import COLUMNS, INDEX, SAID, SHARD_BYTES, TOKENS, FileWriter, ShardInfo

COPY_BYTES = 8 << 20


def neighbouring_runs(shards: Iterable[ShardInfo], shard_bytes: int = SHARD_BYTES) -> list[list[ShardInfo]]:
    """Consecutive shards that become one: alike in their columns, and together not above ``shard_bytes``.

    A shard that is half full stays as it is: of a large store nothing is copied.
    """
    found: list[list[ShardInfo]] = []
    size = 0
    for shard in shards:
        small = shard.num_bytes < shard_bytes // 2
        if small and found and size + shard.num_bytes <= shard_bytes and _alike(found[-1][-1], shard):
            found[-1].append(shard)
            size += shard.num_bytes
        else:
            found.append([shard])
            size = shard.num_bytes if small else shard_bytes
    return found


def records_of(run: Sequence[ShardInfo]) -> list[str]:
    """The files that :func:`joined` reads."""
    if len(run) == 1:
        return []
    names = chain.from_iterable(shard.files for shard in run)
    return [name for name in names if not name.endswith(INDEX)]


def joined(directory: Path, name: str, shards: Sequence[ShardInfo]) -> ShardInfo:
    """Write one shard with the records of several, which stay where they are; one alone is not copied.

    Its index is no file of the shard any more: that of the store has it.
    """
    if len(shards) == 1:
        index = f"{shards[0].name}{INDEX}"
        return replace(shards[0], files={name: own for name, own in shards[0].files.items() if name != index})
    endings = [ending for ending in (TOKENS, COLUMNS, SAID) if shards[0].has(ending)]
    files: dict[str, Any] = {}
    for ending in endings:
        target = FileWriter(directory / f"{name}{ending}")
        for shard in shards:
            with (directory / f"{shard.name}{ending}").open("rb") as source:
                while data := source.read(COPY_BYTES):
                    target.write(data)
        files[f"{name}{ending}"] = target.finish()
    sources = dict.fromkeys(chain.from_iterable(shard.sources for shard in shards))
    return replace(
        shards[0],
        name=name,
        groups=sum(shard.groups for shard in shards),
        candidates=sum(shard.candidates for shard in shards),
        sources=tuple(sources),
        files=files,
    )


def _alike(one: ShardInfo, other: ShardInfo) -> bool:
    return (one.per_candidate, one.per_token, one.has(SAID)) == (
        other.per_candidate,
        other.per_token,
        other.has(SAID),
    )
