"""Reading as a Ray Data task: units of input → chunks of rows. No tensors here: such a task starts in a second."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import ray

from rayalign.config.suffixes import LINES
from rayalign.data.files import suffix_of
from rayalign.data.lines import ByteRange, count_lines, is_whole, number_ranges, plan_ranges, size_of
from rayalign.data.records import Row
from rayalign.data.tokenize_rows import Unit, read_chunks
from rayalign.errors import UserError
from rayalign.runtime.stage import pickle_item

RANGE_BYTES = 64 << 20
CPUS = 0.5
"""Cores of each preparing process, so that readers and writers fit on one core together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChunk:
    """Consecutive rows of one unit."""

    name: str
    """Sorts as the input is ordered."""
    unit: Unit
    rows: list[Row]


def read_unit(row: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
    """A unit → its chunks, or the error that ends them."""
    ordinal, unit = pickle.loads(row["item"])
    try:
        for number, rows in enumerate(read_chunks(unit)):
            yield pickle_item(RowChunk(name=f"{ordinal:05d}-{number:06d}", unit=unit, rows=rows))
    except UserError as error:
        yield pickle_item(error)


def split_units(units: Iterable[Unit], *, range_bytes: int = RANGE_BYTES) -> list[Unit]:
    """Large files of lines cut into ranges that different workers read, each knowing its first line's number."""
    split: list[Unit] = []
    for unit in units:
        split.extend(replace(unit, byte_range=byte_range) for byte_range in unit_ranges(unit, range_bytes))
    return split


def unit_ranges(unit: Unit, range_bytes: int) -> tuple[ByteRange | None, ...]:
    """The ranges of a unit's file; None alone where it is read as a whole."""
    counted = unit.first > 0 or unit.last is not None
    if counted or suffix_of(unit.path).kind not in LINES or is_whole(unit.path):
        return (None,)
    return file_ranges(unit.path, range_bytes)


def file_ranges(path: str, range_bytes: int) -> tuple[ByteRange, ...]:
    ranges = plan_ranges(path, max(1, math.ceil(size_of(path) / range_bytes)))
    if len(ranges) == 1:
        return ranges
    count = ray.remote(num_cpus=CPUS)(count_lines)
    return number_ranges(ranges, ray.get([count.remote(byte_range) for byte_range in ranges]))
