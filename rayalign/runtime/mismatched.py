"""KTO's stage as Ray Data runs it: every answer with another prompt's completion beside it, in shards of their own."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayalign.data.layer import WORD_BYTES
from rayalign.data.shard import UNBOUNDED, ShardWriter, finished_shards, shard_ranges
from rayalign.data.store import TokenStore
from rayalign.data.unpair import Mismatched, partners_in
from rayalign.runtime.failures import retry_lost_actors
from rayalign.runtime.stage import apply_to_items, dataset_of_items
from rayalign.storage.cache import working
from rayalign.storage.place import ObjectPath, Place

PARTNERS = ".partners.npy"
"""Whose completion each answer gets; needed while the stage is made."""
LEAST_GROUPS = 8192
"""A shard has so many groups at least."""
PIECE = 2048
"""Groups of a shard that are in memory at a time."""
CPUS = 1.0
TELL_SECONDS = 5.0


class MismatchedWriter:
    """One process of the stage."""

    def __init__(self, store: Place, directory: Place) -> None:
        partners = read_partners(directory)
        self.examples = Mismatched(TokenStore.open(store), partners)
        self.directory = directory

    def __call__(self, groups: range) -> Iterator[int]:
        """Write a shard; how many groups it has."""
        with working(self.directory) as folder:
            writer = ShardWriter(folder, partner_shard(groups), shard_bytes=UNBOUNDED)
            for first in range(0, len(groups), PIECE):
                writer.append([self.examples[group] for group in groups[first:][:PIECE]])
            writer.close()
        yield len(groups)


def read_partners(directory: Place) -> NDArray[Any]:
    """Mapped from a disk; read from an object store."""
    path = directory / PARTNERS
    found: NDArray[Any] = np.load(io.BytesIO(path.read_bytes())) if isinstance(path, ObjectPath) else mapped(path)
    return found


def mapped(path: Path) -> NDArray[Any]:
    found: NDArray[Any] = np.load(path, mmap_mode="r")
    return found


def write_mismatched(store: Place, directory: Place, *, actors: int, note: Callable[[str], None]) -> None:
    """Write the shards of the stage below ``directory``; those that an interrupted stage finished are kept.

    A small store is written by this process, which is faster than the start of others.

    Raises:
        UserError: a group of the store is no labelled answer.
        ItemKilled: processes died again and again, and no shard was finished meanwhile.
    """
    opened = TokenStore.open(store)
    with working(directory) as folder:
        np.save(folder / PARTNERS, partners_in(opened))
    tokens = opened.index.before(len(opened)).tokens
    # Each answer's tokens, about as many of another, and a checksum.
    shards = shard_ranges(len(opened), WORD_BYTES * (2 * tokens + len(opened)), least=LEAST_GROUPS)

    def write() -> None:
        finished = finished_shards(directory)
        missing = [groups for groups in shards if partner_shard(groups) not in finished]
        if len(missing) <= 1:
            writer = MismatchedWriter(store, directory)
            for groups in missing:
                list(writer(groups))
            return
        written, told = 0, time.monotonic()
        items = dataset_of_items(missing)
        for count in apply_to_items("mismatched", items, MismatchedWriter, store, directory, actors=actors, cpus=CPUS):
            written += count
            if time.monotonic() - told >= TELL_SECONDS:
                note(f"mismatched: {written:,} rows so far")
                told = time.monotonic()

    retry_lost_actors("mismatched", write, what="writing", progress=lambda: len(finished_shards(directory)))


def partner_shard(groups: range) -> str:
    return f"{groups.start:010d}"
