"""Rounds: what training asks for is drawn by a pool of actors, chunk by chunk, and committed before it is used."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rayalign.data.shard import finished_shards, write_whole
from rayalign.data.store import TokenStore, commit_store
from rayalign.engine.source import Weights
from rayalign.errors import UserError
from rayalign.manifest import MANIFEST
from rayalign.runtime.placement import Share
from rayalign.runtime.pool import MAX_ATTEMPTS, ItemKilled, Pool
from rayalign.runtime.weights import ObjectStore
from rayalign.sources.chunk import REST, Chunk, ChunkMaker, ChunkReport, ChunkSpec
from rayalign.sources.prepared import Preparation, prepare_columns
from rayalign.sources.rounds import Request, RoundFolder, RoundPlan
from rayalign.sources.weights import WeightsGone

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
GONE_SECONDS = 600.0
SAMPLES_PER_CHUNK = 128
"""A chunk is large enough to be sampled at once and small enough to be done again."""
PROBES = 2
"""Attempts at a part of a chunk that is known to kill: one may be a node lost by chance."""
MOST_FATAL = 4
"""Prompts of one chunk; where more of them kill, it is not the prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutJob:
    """How a run's rounds are drawn."""

    spec: ChunkSpec
    plan: RoundPlan
    folder: Path
    most: int
    least: int
    """Actors; those above ``least`` are there only while there is something to draw."""
    share: Share
    takes_turns: bool
    """The actors are on the devices of the training workers, which wait while they draw."""
    python: str | None
    """Interpreter of the actors, where it is not the driver's."""
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
    """Of all actors together, as the others."""
    seconds_starting: float
    refreshes: int
    seconds_refreshing: float

    @classmethod
    def of(cls, reports: Sequence[dict[str, Any]]) -> Ledger:
        sums = {name: sum(report[name] for report in reports) for name in cls.__slots__ if name != "quarantined"}
        return cls(**sums, quarantined=sum(len(report["quarantined"]) for report in reports))

    def facts(self, weights: Weights | None = None) -> dict[str, float]:
        """Means over the round, for the rows of metrics; ``weights`` are those that it was drawn with."""
        drawn = max(1, self.completions)
        facts = {
            "rollout/reward": self.reward_sum / max(1, self.completions or self.scorer_calls),
            "rollout/length": self.tokens_generated / drawn,
            "rollout/finished": self.finished / drawn,
            "rollout/labelled": self.labels / max(1, self.prompts),
            "rollout/tokens": self.tokens_generated,
            "rollout/seconds_generating": self.seconds_generating,
        }
        if weights is not None and self.refreshes:
            seconds = weights.seconds_sending + self.seconds_refreshing / self.refreshes
            facts |= {
                "refresh/seconds": seconds,
                "refresh/bytes": weights.num_bytes,
                "refresh/bytes_per_second": weights.num_bytes / seconds,
            }
        return facts


class Workers(Protocol):
    """Whoever makes chunks: a :class:`rayalign.runtime.pool.Pool`, or one process that does it alone."""

    def call(self, item: Any, attempts: int = MAX_ATTEMPTS) -> Any:
        """The :class:`ChunkReport` of a (spec, chunk)."""
        ...

    def map(self, items: Iterable[Any], rescue: Callable[[Any, ItemKilled], Any] | None = None) -> Iterator[Any]:
        """The :class:`ChunkReport` of every (spec, chunk), in order; ``rescue`` answers for one that killed all."""
        ...

    def tell(self, item: Any) -> None:
        """Let every idle process work on ``item``."""
        ...

    def release(self) -> None:
        """End processes that have had nothing to do for long."""
        ...


def make_pool(job: RolloutJob) -> Pool:
    return Pool(
        "rollouts",
        ChunkMaker,
        ObjectStore(),
        share=job.share,
        most=job.most,
        least=job.least,
        python=job.python,
    )


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
        gone: dict[str, float] = {}
        try:
            while not stop.wait(POLL_SECONDS):
                pool.release()
                for request in folder.requests()[:1]:
                    try:
                        draw_round(request, job, folder, pool, note)
                    except WeightsGone as error:
                        await_another_attempt(error, gone)
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


def await_another_attempt(error: WeightsGone, gone: dict[str, float]) -> None:
    """The attempt that asked has died; the next one asks again, with weights of its own.

    Raises UserError when it does not: ``gone`` remembers since when each version is missing.
    """
    since = gone.setdefault(error.weights.version, time.monotonic())
    if time.monotonic() - since > GONE_SECONDS:
        raise UserError(
            f"{error}, and for {GONE_SECONDS:.0f} s no other process has asked for the round: look for what ended "
            "the training workers"
        )
    time.sleep(10 * POLL_SECONDS)


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
        if job.takes_turns:
            pool.tell(REST)
        commit_drawn(
            directory,
            reports,
            max_bad_fraction=job.max_bad_fraction,
            weights=request.weights,
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
    made = pool.map([(spec, chunk) for chunk in missing], rescue=partial(without_fatal_prompts, pool))
    for number, (chunk, report) in enumerate(zip(missing, made, strict=True), start=1):
        write_whole(report_path(chunk), json.dumps(plain(report)).encode())
        if time.monotonic() - told > 5:
            done(f"{len(chunks) - len(missing) + number}/{len(chunks)} chunks")
            told = time.monotonic()
    return [json.loads(report_path(chunk).read_text(encoding="utf-8")) for chunk in chunks]


def without_fatal_prompts(pool: Workers, item: tuple[ChunkSpec, Chunk], error: ItemKilled) -> ChunkReport:
    """The chunk that killed all who worked on it, without the prompts that did so: they are found by halving it.

    Raises ``error`` where no single prompt is to blame, or too many are.
    """
    spec, chunk = item
    log.warning("%s; looking for the prompt that does it", error)
    found: list[int] = []
    suspects = halves(chunk.positions)
    with tempfile.TemporaryDirectory(dir=chunk.directory.parent) as scratch:
        while suspects:
            positions = suspects.pop(0)
            probe = replace(chunk, name=f"{positions.start:010d}", positions=positions, directory=Path(scratch))
            try:
                pool.call((spec, probe), attempts=PROBES)
            except ItemKilled:
                suspects[:0] = halves(positions)
                found += positions if len(positions) == 1 else ()
            if len(found) > MOST_FATAL:
                raise error
    if not found:
        raise error
    report: ChunkReport = pool.call((spec, replace(chunk, fatal=tuple(found))))
    return report


def halves(positions: range) -> list[range]:
    """Two parts of at least one position each; none of a single position."""
    middle = len(positions) // 2
    return [positions[:middle], positions[middle:]] if middle else []


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


def commit_drawn(
    directory: Path,
    reports: Sequence[dict[str, Any]],
    *,
    max_bad_fraction: float,
    weights: Weights | None = None,
    **meta: Any,
) -> Ledger:
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
            f"{len(failures)} of {ledger.prompts} prompts have no scored completions, more than data.max_bad_fraction "
            f"{max_bad_fraction:g} allows; first {failures[0]['file']}:{failures[0]['line']}: {failures[0]['reason']}"
        )
    finished = finished_shards(directory)
    shards = [finished[report["shard"]] for report in reports]
    commit_store(directory, shards, meta={**meta, "ledger": asdict(ledger), "facts": ledger.facts(weights)})
    return ledger


def report_path(chunk: Chunk) -> Path:
    return chunk.directory / f"{chunk.name}.report.json"


def plain(report: ChunkReport) -> dict[str, Any]:
    return {**asdict(report), "shard": report.shard.name}
