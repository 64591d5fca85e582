"""Rounds: what training asks for is drawn by a pool of actors, chunk by chunk, and committed before it is used."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rayalign.data.shard import finished_shards, write_whole
from rayalign.data.store import TokenStore, commit_store
from rayalign.engine.source import Weights
from rayalign.errors import UserError
from rayalign.manifest import MANIFEST
from rayalign.runtime.placement import Share
from rayalign.runtime.pool import Pool
from rayalign.sources.chunk import Chunk, ChunkMaker, ChunkReport, ChunkSpec
from rayalign.sources.prepared import Preparation, prepare_columns
from rayalign.sources.rounds import Request, RoundFolder, RoundPlan

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
SAMPLES_PER_CHUNK = 128
"""A chunk is large enough to be sampled at once and small enough to be done again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutJob:
    """How a run's rounds are drawn."""

    spec: ChunkSpec
    plan: RoundPlan
    folder: Path
    actors: int
    share: Share
    max_bad_fraction: float
    preparation: Preparation | None = None
    """What the method makes of every round, once and for all workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What drawing cost and gave; sums over chunks."""

    prompts: int
    completions: int
    tokens_generated: int
    finished: int
    scorer_calls: int
    labels: int
    quarantined: int
    reward_sum: float
    seconds_generating: float
    """Of all actors together."""
    seconds_loading: float

    @classmethod
    def of(cls, reports: Sequence[dict[str, Any]]) -> Ledger:
        sums = {name: sum(report[name] for report in reports) for name in cls.__slots__ if name != "quarantined"}
        return cls(**sums, quarantined=sum(len(report["quarantined"]) for report in reports))

    def facts(self) -> dict[str, float]:
        """Means over the round, for the rows of metrics."""
        drawn = max(1, self.completions)
        return {
            "rollout/reward": self.reward_sum / max(1, self.completions or self.scorer_calls),
            "rollout/length": self.tokens_generated / drawn,
            "rollout/finished": self.finished / drawn,
            "rollout/labelled": self.labels / max(1, self.prompts),
            "rollout/tokens": self.tokens_generated,
            "rollout/seconds_generating": self.seconds_generating,
            "rollout/seconds_loading": self.seconds_loading,
        }


class Workers(Protocol):
    """Whoever makes chunks: a :class:`rayalign.runtime.pool.Pool`, or one process that does it alone."""

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """The :class:`ChunkReport` of every (spec, chunk), in order."""
        ...


def make_pool(job: RolloutJob) -> Pool:
    return Pool("rollouts", ChunkMaker, share=job.share, count=job.actors)


@contextlib.contextmanager
def serving(job: RolloutJob, pool: Workers, note: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, draw every round that its training asks for.

    A failure to draw reaches the training workers, which wait for the round, as their own UserError.
    """
    folder = RoundFolder(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    folder.failure.unlink(missing_ok=True)
    stop = threading.Event()

    def serve() -> None:
        try:
            while not stop.wait(POLL_SECONDS):
                for request in folder.requests()[:1]:
                    draw_round(request, job, folder, pool, note)
        except UserError as error:
            write_whole(folder.failure, str(error).encode())
        except BaseException:
            write_whole(folder.failure, f"rollouts failed:\n{traceback.format_exc()}".encode())

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    try:
        yield
    finally:
        stop.set()
        server.join()


def draw_round(
    request: Request, job: RolloutJob, folder: RoundFolder, pool: Workers, note: Callable[[str], None]
) -> None:
    """Commit the round of a request, unless it was before, and forget the request and weights older than its own."""
    directory = folder.round(request)
    if not (directory / MANIFEST).exists():
        began = time.monotonic()
        positions = job.plan.round_positions(request.number)
        name = f"round {request.number + 1}/{job.plan.num_rounds}"
        reports = draw(
            job.spec,
            positions,
            directory,
            weights=request.weights,
            pool=pool,
            done=lambda text: note(f"{name}: {text}"),
        )
        commit_drawn(
            directory,
            reports,
            max_bad_fraction=job.max_bad_fraction,
            request=request.to_json(),
            seconds=time.monotonic() - began,
        )
    if job.preparation is not None:
        columns = folder.prepared(request, job.preparation.key)
        if not (columns / MANIFEST).exists():
            prepare_columns(TokenStore.open(directory), columns, job.preparation)
    for weights in folder.weights.glob("step_*"):
        if int(weights.name[5:].partition("-")[0]) < request.weights.step:
            shutil.rmtree(weights, ignore_errors=True)
    folder.answer(request)


def draw(
    spec: ChunkSpec,
    positions: range,
    directory: Path,
    *,
    weights: Weights | None,
    pool: Workers,
    done: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The reports of all chunks of ``positions``, in order; those that an interrupted run finished are kept."""
    chunks = plan_chunks(spec, positions, directory, weights)
    finished = finished_shards(directory)
    missing = [chunk for chunk in chunks if chunk.name not in finished or not report_path(chunk).exists()]
    told = time.monotonic()
    for number, (chunk, report) in enumerate(
        zip(missing, pool.map((spec, chunk) for chunk in missing), strict=True), start=1
    ):
        write_whole(report_path(chunk), json.dumps(plain(report)).encode())
        if time.monotonic() - told > 5:
            done(f"{len(chunks) - len(missing) + number}/{len(chunks)} chunks")
            told = time.monotonic()
    return [json.loads(report_path(chunk).read_text(encoding="utf-8")) for chunk in chunks]


def plan_chunks(spec: ChunkSpec, positions: range, directory: Path, weights: Weights | None) -> list[Chunk]:
    """Fixed chunks: the same whoever makes them, and however many actors there are."""
    samples = spec.sampling.num_samples if spec.sampling else 4
    size = max(2, SAMPLES_PER_CHUNK // samples)
    count = max(1, math.ceil(len(positions) / size))
    bounds = [positions.start + number * len(positions) // count for number in range(count + 1)]
    return [
        Chunk(name=f"{start:010d}", positions=range(start, stop), directory=directory, weights=weights)
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def commit_drawn(directory: Path, reports: Sequence[dict[str, Any]], *, max_bad_fraction: float, **meta: Any) -> Ledger:
    """Make the chunks one store, beside a list of the prompts that the scorer failed on.

    Raises UserError when those are too many; the first is named.
    """
    ledger = Ledger.of(reports)
    failures = [failure for report in reports for failure in report["quarantined"]]
    if failures:
        lines = "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
        write_whole(directory / "quarantine.jsonl", lines.encode())
    if len(failures) > max_bad_fraction * ledger.prompts:
        raise UserError(
            f"the scorer failed on {len(failures)} of {ledger.prompts} prompts, more than data.max_bad_fraction "
            f"{max_bad_fraction:g} allows; first {failures[0]['file']}:{failures[0]['line']}: {failures[0]['reason']}"
        )
    finished = finished_shards(directory)
    shards = [finished[report["shard"]] for report in reports]
    commit_store(directory, shards, meta={**meta, "ledger": asdict(ledger), "facts": ledger.facts()})
    return ledger


def report_path(chunk: Chunk) -> Path:
    return chunk.directory / f"{chunk.name}.report.json"


def plain(report: ChunkReport) -> dict[str, Any]:
    return {**asdict(report), "shard": report.shard.name}
