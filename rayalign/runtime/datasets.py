"""Preparation as Ray Data stages: units of input → chunks of rows → shards of token ids.

Ray Data moves the work, not the truth: what a run trains on is the committed store, and rows are counted at the end.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray

from rayalign.data.chat import make_chat
from rayalign.data.lines import ByteRange, count_lines, number_ranges, open_binary, plan_ranges
from rayalign.data.prepare import Shape, ShardReport, Unit, prepare_chunk, read_chunks
from rayalign.data.records import BadRow, Row
from rayalign.data.tables import LINE_SUFFIXES
from rayalign.data.tokenize import TokenizeSettings
from rayalign.engine.model import load_tokenizer, model_directory
from rayalign.errors import UserError
from rayalign.runtime.stage import Pool, dataset, packed, repeated, results

RANGE_BYTES = 64 << 20
CPUS = 0.5
"""Of each preparing process, so that readers and writers fit on one core together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """A tokenizer and how conversations become its tokens."""

    name: str
    revision: str | None
    trust_remote_code: bool
    template: str
    stop: str
    settings: TokenizeSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What preparation found: rows = groups' rows + bad + dropped."""

    reports: tuple[ShardReport, ...]
    bytes_by_node: dict[str, int]
    """Bytes of input that the tasks on each node were given."""

    @property
    def rows(self) -> int:
        return sum(report.rows for report in self.reports)

    @property
    def bad(self) -> tuple[BadRow, ...]:
        return tuple(row for report in self.reports for row in report.bad)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive rows of one unit."""

    name: str
    """Sorts as the input is ordered."""
    unit: Unit
    rows: list[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What one worker made of a chunk."""

    name: str
    report: ShardReport
    node: str
    num_bytes: int


class ChunkWriter:
    """One worker of the tokenization stage; loads the tokenizer once."""

    def __init__(self, tokenizer: TokenizerSpec, shape: Shape, directory: Path) -> None:
        loaded = load_tokenizer(
            model_directory(tokenizer.name, tokenizer.revision), trust_remote_code=tokenizer.trust_remote_code
        )
        self.chat = make_chat(loaded, template=tokenizer.template, stop=tokenizer.stop)
        self.settings = tokenizer.settings
        self.shape: Shape = shape
        self.directory = directory

    def __call__(self, chunk: Chunk | UserError) -> Written:
        if isinstance(chunk, UserError):
            raise chunk
        report = prepare_chunk(
            chunk.rows,
            self.chat,
            self.settings,
            unit=chunk.unit,
            shape=self.shape,
            directory=self.directory,
            name=chunk.name,
        )
        return Written(
            name=chunk.name,
            report=report,
            node=ray.get_runtime_context().get_node_id(),
            num_bytes=len(pickle.dumps(chunk.rows)),
        )


def prepare(
    units: Sequence[Unit],
    tokenizer: TokenizerSpec,
    shape: Shape,
    directory: Path,
    *,
    writers: int,
    note: Callable[[str], None],
) -> Preparation:
    """Write the shards of every unit below ``directory``, in ``writers`` actors; the caller commits them.

    Raises UserError where a unit cannot be read or the tokenizer cannot be used.
    """

    def write() -> list[Written]:
        chunks = dataset(list(enumerate(units))).flat_map(read_unit, num_cpus=CPUS)
        chunks.context.target_max_block_size = 1  # every chunk is a block of its own, which any worker may take
        return results(
            "tokens",
            chunks,
            ChunkWriter,
            tokenizer,
            shape,
            directory,
            pool=Pool(actors=writers, cpus=CPUS),
            done=lambda count: note(f"tokens: {count} shards so far"),
        )

    written = repeated("tokens", write)
    bytes_by_node: Counter[str] = Counter()
    for shard in written:
        bytes_by_node[shard.node] += shard.num_bytes
    ordered = sorted(written, key=lambda shard: shard.name)
    return Preparation(reports=tuple(shard.report for shard in ordered), bytes_by_node=dict(bytes_by_node))


def read_unit(row: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
    """A unit → its chunks, or the error that ends them."""
    ordinal, unit = pickle.loads(row["item"])
    try:
        for number, rows in enumerate(read_chunks(unit)):
            yield packed(Chunk(name=f"{ordinal:05d}-{number:06d}", unit=unit, rows=rows))
    except UserError as error:
        yield packed(error)


def split_units(units: Iterable[Unit], *, range_bytes: int = RANGE_BYTES) -> list[Unit]:
    """Large files of lines cut into ranges that different workers read, each knowing its first line's number."""
    split: list[Unit] = []
    for unit in units:
        ranges = file_ranges(unit.path, range_bytes) if unit.path.endswith(LINE_SUFFIXES) else (None,)
        split.extend(replace(unit, byte_range=byte_range) for byte_range in ranges)
    return split


def file_ranges(path: str, range_bytes: int) -> tuple[ByteRange, ...]:
    with open_binary(path) as stream:
        size = stream.seek(0, 2)
    ranges = plan_ranges(path, max(1, math.ceil(size / range_bytes)))
    if len(ranges) == 1:
        return ranges
    count = ray.remote(num_cpus=CPUS)(count_lines)
    return number_ranges(ranges, ray.get([count.remote(byte_range) for byte_range in ranges]))
