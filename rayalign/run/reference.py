"""The reference stage: a pool of actors that scores a token store shard by shard."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from rayalign.data.group import Column
from rayalign.data.layer import WORD_BYTES
from rayalign.data.shard import finished_shards, shard_ranges, write_column_shard
from rayalign.data.store import TokenStore, commit_columns
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.placement import even_share
from rayalign.runtime.pool import Pool
from rayalign.runtime.session import Session
from rayalign.storage.cache import working
from rayalign.storage.manifest import committed
from rayalign.storage.place import Place

LOG_PROBS = "ref_token_logp"
"""The column that is written, whichever model scores."""
MADE = "computed_with"
"""A manifest's key for what log-probs depend on besides model and data."""
LEAST_GROUPS = 256
"""A shard has so many groups at least."""
PIECE = 2048
"""Groups of a shard that are in memory at a time."""
SHARDS_PER_SCORER = 4
"""Below this a further scorer costs more to start than it saves."""
START_SECONDS = 3600.0
"""That the stage waits for room where others use the cluster."""
TELL_SECONDS = 5.0


class ShardScorer:
    """One actor of the pool: a frozen model and the store that it scores."""

    def __init__(self, store: Place, directory: Place, spec: ScoringSpec) -> None:
        self.store = TokenStore.open(store)
        self.directory = directory
        self.model = FrozenModel(spec, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __call__(self, groups: range) -> dict[str, str]:
        """Score them; returns with what that was computed."""
        columns: list[Column] = []
        for first in range(0, len(groups), PIECE):
            columns += self.model.token_logps([self.store[index] for index in groups[first:][:PIECE]])
        with working(self.directory) as folder:
            write_column_shard(folder, shard_name(groups), first=groups.start, per_token={LOG_PROBS: columns})
        return self.model.facts()


def shard_name(groups: range) -> str:
    return f"{groups.start:010d}"


def score_store(
    store: Place,
    directory: Place,
    spec: ScoringSpec,
    *,
    session: Session,
    facts: Mapping[str, Any],
    note: Callable[[str], None],
) -> None:
    """Commit the log-probs of every predicted token of ``store`` to ``directory``.

    Shards that an interrupted run finished are kept.
    """
    opened = TokenStore.open(store)
    predicted = opened.index.before(len(opened)).predicted
    shards = shard_ranges(len(opened), WORD_BYTES * (predicted + len(opened)), least=LEAST_GROUPS)
    finished = finished_shards(directory)
    missing = [shard for shard in shards if shard_name(shard) not in finished]
    made: list[dict[str, str]] = []
    told = time.monotonic()
    for found in score_shards(missing, store, directory, spec, session):
        made.append(found)
        if time.monotonic() - told >= TELL_SECONDS:
            note(f"reference: {len(finished) + len(made)}/{len(shards)} shards")
            told = time.monotonic()
    meta = {**facts, MADE: made[0]} if made else facts
    commit_columns(directory, opened, finished_shards(directory).values(), meta=meta)


def score_shards(
    shards: Sequence[range], store: Place, directory: Place, spec: ScoringSpec, session: Session
) -> Iterator[dict[str, str]]:
    """Score ``shards`` in a pool of actors; with what each was computed, in their order."""
    if not shards:
        return
    actors = min(math.ceil(len(shards) / SHARDS_PER_SCORER), pool_size(session))
    each = even_share(session, actors)
    with Pool(
        "reference", ShardScorer, store, directory, spec, share=each, most=actors, start_seconds=START_SECONDS
    ) as pool:
        yield from pool.map(shards)


def scoring_environment(columns: Place) -> dict[str, str]:
    """With what committed log-probs were computed; empty where that was not recorded."""
    found: dict[str, str] = committed(columns)["meta"].get(MADE, {})
    return found


def pool_size(session: Session) -> int:
    """One scorer per GPU, or per CPU core."""
    return max(1, int(session.num_gpus or session.num_cpus))
