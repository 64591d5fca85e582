"""Prompts are cut into fixed chunks, which any process makes, and committed as one store."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from rayalign.data.shard import finished_shards
from rayalign.data.store import commit_store
from rayalign.engine.batches import Weights
from rayalign.errors import UserError
from rayalign.remarks import Remarks
from rayalign.rounds.chunk import ChunkReport, ChunkSpec, PromptChunk
from rayalign.rounds.ledger import Ledger, bad_prompts, bad_prompts_sentence
from rayalign.rounds.workers import ItemKilled, Workers
from rayalign.storage.place import Place, remove, write_whole

log = logging.getLogger(__name__)

SAMPLES_PER_CHUNK = 256
"""A chunk is large enough to be sampled at once and small enough to be done again."""
PROBES = 2
"""Attempts at a part of a chunk that is known to kill: one may be a node lost by chance."""
MOST_FATAL = 4
"""Prompts of one chunk; where more of them kill, it is not the prompts."""


def draw_chunks(
    spec: ChunkSpec,
    positions: range,
    directory: Place,
    *,
    weights: Weights | None,
    pool: Workers,
    max_bad_fraction: float,
    told: Remarks,
    done: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The reports of all chunks of ``positions``, in order; those that an interrupted run finished are kept.

    ``done`` hears of progress, and of whatever chunks remark that ``told`` has not heard before.
    """
    most_bad = int(max_bad_fraction * len(positions))
    chunks = plan_chunks(spec, positions, directory, weights, most_bad=most_bad)
    finished = finished_shards(directory)
    missing = [chunk for chunk in chunks if chunk.name not in finished or not drawing_report(chunk).exists()]
    last = time.monotonic()
    made = pool.map([(spec, chunk) for chunk in missing], rescue=partial(without_fatal_prompts, pool))
    for number, (chunk, report) in enumerate(zip(missing, made, strict=True), start=1):
        write_whole(drawing_report(chunk), json.dumps(report_facts(report)).encode())
        for remark in report.remarks:
            told.add(remark)
        for remark in told.take():
            done(remark)
        if time.monotonic() - last > 5:
            done(f"{len(chunks) - len(missing) + number}/{len(chunks)} chunks")
            last = time.monotonic()
    reports = [json.loads(drawing_report(chunk).read_text(encoding="utf-8")) for chunk in chunks]
    if 0 < len(bad_prompts(reports)) <= most_bad:
        done(f"{bad_prompts_sentence(reports)}; see quarantine.jsonl in {directory}")
    return reports


def without_fatal_prompts(pool: Workers, item: tuple[ChunkSpec, PromptChunk], error: ItemKilled) -> ChunkReport:
    """The chunk that killed all who worked on it, without the prompts that did so: they are found by halving it.

    Raises ``error`` where no single prompt is to blame, or too many are.
    """
    spec, chunk = item
    log.warning("%s; looking for the prompt that does it", error)
    found: list[int] = []
    suspects = halves(chunk.positions)
    scratch = chunk.directory.parent / f".probe-{uuid.uuid4().hex}"
    try:
        while suspects:
            positions = suspects.pop(0)
            probe = replace(chunk, name=f"{positions.start:010d}", positions=positions, directory=scratch)
            try:
                pool.call((spec, probe), attempts=PROBES)
            except ItemKilled:
                suspects[:0] = halves(positions)
                found += positions if len(positions) == 1 else ()
            if len(found) > MOST_FATAL:
                raise error
    finally:
        remove(scratch)
    if not found:
        raise error
    report: ChunkReport = pool.call((spec, replace(chunk, fatal=tuple(found))))
    return report


def halves(positions: range) -> list[range]:
    """Two parts of at least one position each; none of a single position."""
    middle = len(positions) // 2
    return [positions[:middle], positions[middle:]] if middle else []


def plan_chunks(
    spec: ChunkSpec, positions: range, directory: Place, weights: Weights | None, *, most_bad: int
) -> list[PromptChunk]:
    """Fixed chunks: the same for any process and any number of actors."""
    samples = spec.sampling.num_samples if spec.sampling else 4
    size = max(2, SAMPLES_PER_CHUNK // samples)
    count = max(1, math.ceil(len(positions) / size))
    bounds = [positions.start + number * len(positions) // count for number in range(count + 1)]
    return [
        PromptChunk(
            name=f"{start:010d}",
            positions=range(start, stop),
            directory=directory,
            weights=weights,
            most_bad=most_bad,
        )
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def commit_drawn(
    directory: Place,
    reports: Sequence[dict[str, Any]],
    *,
    max_bad_fraction: float,
    weights: Weights | None = None,
    look: Callable[[Ledger], None] = lambda ledger: None,
    **meta: Any,
) -> Ledger:
    """Make the chunks one store, beside a list of the prompts that the scorer failed on; ``look`` may still refuse.

    Raises UserError when those are too many; the first is named.
    """
    ledger = Ledger.of(reports)
    failures = bad_prompts(reports)
    if failures:
        lines = "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
        write_whole(directory / "quarantine.jsonl", lines.encode("utf-8", errors="backslashreplace"))  # as JSON has it
    if len(failures) > max_bad_fraction * ledger.prompts:
        raise UserError(bad_prompts_sentence(reports, f", more than data.max_bad_fraction {max_bad_fraction:g} allows"))
    look(ledger)
    finished = finished_shards(directory)
    shards = [finished[report["shard"]] for report in reports]
    commit_store(directory, shards, meta={**meta, "ledger": asdict(ledger), "facts": ledger.facts(weights)})
    return ledger


def drawing_report(chunk: PromptChunk) -> Place:
    return chunk.directory / f"{chunk.name}.report.json"


def report_facts(report: ChunkReport) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(report).items() if name != "remarks"}
    return {**kept, "shard": report.shard.name}
