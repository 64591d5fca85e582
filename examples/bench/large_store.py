"""A store of many short pairs: files, open files, memory and seconds, from the rows to the first steps.

    python -m examples.bench.large_store [--rows 100000] [--readers 4] [--steps 100]

The rows are written to a JSONL file, tokenized by the stage that ``rayalign train`` runs, and committed. Then readers
of their own process open the store and plan and read their share of the steps. Memory is what a process has written
(``private``), and all that it has mapped (``RSS``): files' pages go when memory is needed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rayalign.config.data import DataConfig
from rayalign.config.model import ModelConfig
from rayalign.data.store import commit_store
from rayalign.data.tokenize_rows import Unit
from rayalign.rounds.source import StreamSource
from rayalign.rounds.streams import SourceSpec, StoredStream
from rayalign.runtime.datasets import prepare
from rayalign.runtime.reading import planned
from rayalign.runtime.session import connect

from .common import arguments, machine, pairs_file, table, train_tokenizer, write_model

WORDS = ("the", "a", "of", "to", "and", "in", "is", "it", "for", "on", "with", "as", "you", "are", "at", "be", "this")
VOCABULARY = 8192
GROUPS_PER_STEP = 64


class Reader(NamedTuple):
    """What one reader measured of itself."""

    seconds: float
    opened: float
    rss: float
    private: float
    handles: int


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--template", default="auto", help="none: raw texts, which are tokenized sooner")
    parser.add_argument("--handles", type=int, default=0, help="limit of open files of a process; 0 leaves it")
    parser.add_argument("--folder", default=None, help="where files are written; default: a temporary folder")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.readers, options.steps = 10_000, 2, 10
    print(machine())
    with tempfile.TemporaryDirectory(prefix="rayalign-bench-", dir=options.folder) as folder:
        root = Path(folder)
        lines = root / "rows.jsonl"
        with lines.open("w") as file:
            file.writelines(rows(options.rows))
        write_model(root / "model", train_tokenizer(pairs_file(), VOCABULARY), VOCABULARY)
        prepared, committed = make(lines, root, template=options.template)
        if options.handles:
            resource.setrlimit(resource.RLIMIT_NOFILE, (options.handles, options.handles))
        found = readers(root / "store", options.readers, options.steps)
        sizes = [path.stat().st_size for path in (root / "store").iterdir()]
        driver = memory()
    print(f"{options.rows} pairs, {lines.name}: {sum(sizes) / 2**20:.0f} MiB in {len(sizes)} files")
    print(f"prepared in {prepared:.1f} s ({options.rows / prepared:.0f} rows/s), committed in {committed:.1f} s")
    print(f"driver: RSS {driver[0]:.0f} MiB, private {driver[1]:.0f} MiB, {handles()} handles")
    print(
        table(
            ("reader", "open s", f"{options.steps} steps s", "RSS MiB", "private MiB", "handles"),
            [
                [str(n), f"{r.opened:.2f}", f"{r.seconds:.2f}", f"{r.rss:.0f}", f"{r.private:.0f}", str(r.handles)]
                for n, r in enumerate(found)
            ],
        )
    )


def rows(count: int) -> Iterator[str]:
    draw = random.Random(0)
    for number in range(count):
        words = [" ".join(draw.choices(WORDS, k=6)) for _ in range(3)]
        yield json.dumps({"prompt": f"{number} {words[0]}", "chosen": words[1], "rejected": words[2]}) + "\n"


def make(lines: Path, root: Path, *, template: str) -> tuple[float, float]:
    """Seconds of the preparation and of the commit."""
    model, data = ModelConfig(name=str(root / "model")), DataConfig(train=(str(lines),), template=template)
    with connect() as session:
        began = time.perf_counter()
        found = prepare(
            planned([Unit(path=str(lines))], root / "store"),
            model,
            data,
            completed="no",
            shape="pair",
            directory=root / "store",
            writers=max(1, int(session.num_cpus)),
            note=print,
        )
        prepared = time.perf_counter() - began
        shards = [shard for report in found.reports for shard in report.shards]
        began = time.perf_counter()
        commit_store(root / "store", shards, meta={})
        for path in (root / "store").glob(".*.json"):
            path.unlink()
        return prepared, time.perf_counter() - began


def readers(store: Path, count: int, steps: int) -> list[Reader]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(count) as pool:
        return pool.starmap(read, [(store, rank, count, steps) for rank in range(count)], chunksize=1)


def read(store: Path, rank: int, count: int, steps: int) -> Reader:
    """Open the store as a training worker does, and read its share of every step."""
    began = time.perf_counter()
    stream = StoredStream(
        name="train",
        stores=(store,),
        columns=((),),
        weights=(1.0,),
        groups_per_step=GROUPS_PER_STEP,
        num_candidates=2,
        window=DataConfig.model_fields["shuffle_shards"].default,
    )
    spec = SourceSpec(streams=(stream,), seed=0, tokens_per_micro_batch=4096, row_tokens=2048)
    source = StreamSource(spec, layout="packed", pad_id=0, rank=rank, world_size=count)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    for step in range(steps):
        source.get(step)
    return Reader(time.perf_counter() - began, opened, *memory(), handles())


def memory() -> tuple[float, float]:
    """MiB that this process has in memory, and that it has written and shares with no other."""
    values = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        values[name] = int(value.split()[0]) / 1024
    return values["Rss"], values["Private_Dirty"]


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    main()
