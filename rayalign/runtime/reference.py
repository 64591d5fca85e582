"""The reference stage: a Ray Data actor pool that scores a token store shard by shard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.data
import torch

from rayalign.data.shard import finished_shards, write_column_shard
from rayalign.data.store import TokenStore, commit_columns
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.runtime.placement import share
from rayalign.runtime.session import Session

GROUPS_PER_SHARD = 256
SHARDS_PER_SCORER = 4
"""Below this a further scorer costs more to start than it saves."""


class ShardScorer:
    """One actor of the pool: a frozen model and the store that it scores."""

    def __init__(self, store: str, directory: str, spec: ScoringSpec, threads: int) -> None:
        torch.set_num_threads(threads)
        self.store = TokenStore.open(Path(store))
        self.directory = Path(directory)
        self.model = FrozenModel(spec, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        first, stop = row["first"], row["stop"]
        columns = self.model.token_logps([self.store[index] for index in range(first, stop)])
        write_column_shard(self.directory, row["name"], first=first, per_token={"ref_token_logp": columns})
        return {"name": row["name"]}


def score_store(store: Path, directory: Path, spec: ScoringSpec, *, session: Session, facts: Mapping[str, Any]) -> None:
    """Commit ``ref_token_logp`` of every predicted token of ``store`` to ``directory``.

    Shards that an interrupted run finished are kept.
    """
    opened = TokenStore.open(store)
    bounds = [(first, min(first + GROUPS_PER_SHARD, len(opened))) for first in range(0, len(opened), GROUPS_PER_SHARD)]
    done = finished_shards(directory)
    items = [
        {"name": f"{first:010d}", "first": first, "stop": stop} for first, stop in bounds if f"{first:010d}" not in done
    ]
    if items:
        actors = min(math.ceil(len(items) / SHARDS_PER_SCORER), pool_size(session))
        each = share(session, actors)
        ray.data.from_items(items, override_num_blocks=len(items)).map(
            ShardScorer,
            fn_constructor_args=(str(store), str(directory), spec, each.threads),
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=each.cpus,
            num_gpus=each.gpus,
        ).take_all()
    commit_columns(directory, opened, finished_shards(directory).values(), meta=facts)


def pool_size(session: Session) -> int:
    """One scorer per GPU, or per CPU core."""
    return max(1, int(session.num_gpus or session.num_cpus))
