"""Preparation as Ray Data stages: units of input → chunks of rows → shards of token ids, and their log-probs.

Ray Data moves the work, not the truth: what a run trains on is the committed store, and rows are counted at the end.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.data

from rayalign.data.chat import make_chat
from rayalign.data.lines import ByteRange, count_lines, number_ranges, open_binary, plan_ranges
from rayalign.data.prepare import Shape, ShardReport, Unit, prepare_chunk, read_chunks
from rayalign.data.records import BadRow
from rayalign.data.tables import LINE_SUFFIXES
from rayalign.data.tokenize import TokenizeSettings
from rayalign.engine.model import load_tokenizer, model_directory

RANGE_BYTES = 64 << 20


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


class ChunkWriter:
    """One worker of the tokenization stage; loads the tokenizer once."""

    def __init__(self, tokenizer: TokenizerSpec, shape: Shape, directory: str) -> None:
        loaded = load_tokenizer(
            model_directory(tokenizer.name, tokenizer.revision), trust_remote_code=tokenizer.trust_remote_code
        )
        self.chat = make_chat(loaded, template=tokenizer.template, stop=tokenizer.stop)
        self.settings = tokenizer.settings
        self.shape: Shape = shape
        self.directory = Path(directory)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit, rows = pickle.loads(row["chunk"])
        report = prepare_chunk(
            rows,
            self.chat,
            self.settings,
            unit=unit,
            shape=self.shape,
            directory=self.directory,
            name=row["name"],
        )
        node = ray.get_runtime_context().get_node_id()
        return {"name": row["name"], "report": pickle.dumps(report), "node": node, "bytes": len(row["chunk"])}


def prepare(
    units: Sequence[Unit], tokenizer: TokenizerSpec, shape: Shape, directory: Path, *, writers: int
) -> Preparation:
    """Write the shards of every unit below ``directory``, in ``writers`` actors; the caller commits them."""
    items = [{"unit": pickle.dumps(unit), "ordinal": ordinal} for ordinal, unit in enumerate(units)]
    rows = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .flat_map(chunk_rows)
        .repartition(target_num_rows_per_block=1)
        .map(
            ChunkWriter,
            fn_constructor_args=(tokenizer, shape, str(directory)),
            compute=ray.data.ActorPoolStrategy(size=writers),
            num_cpus=0.5,
        )
        .take_all()
    )
    bytes_by_node: Counter[str] = Counter()
    for row in rows:
        bytes_by_node[row["node"]] += row["bytes"]
    ordered = sorted(rows, key=lambda row: row["name"])
    return Preparation(reports=tuple(pickle.loads(row["report"]) for row in ordered), bytes_by_node=dict(bytes_by_node))


def chunk_rows(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A unit → its chunks, named so that their order is the input's."""
    unit = pickle.loads(row["unit"])
    for number, chunk in enumerate(read_chunks(unit)):
        yield {"name": f"{row['ordinal']:05d}-{number:06d}", "chunk": pickle.dumps((unit, chunk))}


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
    items = [{"range": pickle.dumps(byte_range), "ordinal": ordinal} for ordinal, byte_range in enumerate(ranges)]
    counted = ray.data.from_items(items, override_num_blocks=len(items)).map(count_range).take_all()
    return number_ranges(ranges, [row["lines"] for row in sorted(counted, key=lambda row: row["ordinal"])])


def count_range(row: dict[str, Any]) -> dict[str, Any]:
    return {"ordinal": row["ordinal"], "lines": count_lines(pickle.loads(row["range"]))}
