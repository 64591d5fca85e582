"""Which pieces of their input preparing processes take: large files in parts, each of which is repeated alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import ray

from rayalign.config.suffixes import LINES, PARQUET
from rayalign.data.files import suffix_of
from rayalign.data.lines import ByteRange, count_lines, is_whole, number_ranges, plan_ranges, size_of
from rayalign.data.tables import row_ranges
from rayalign.data.tokenize_rows import Unit
from rayalign.storage.place import Place, write_whole

LEAST_BYTES = 1 << 20
MOST_BYTES = 128 << 20
MOST_UNITS = 64
"""Into so many parts the input is cut where that makes parts between these sizes."""
UNITS = ".units.json"
CPUS = 1.0
"""Cores of each preparing process."""


def planned(units: Iterable[Unit], directory: Place) -> list[Unit]:
    """The parts of ``units``, as they were cut when an interrupted preparation of ``directory`` began."""
    path = directory / UNITS
    if path.is_file():
        return [restored(value) for value in json.loads(path.read_text(encoding="utf-8"))]
    cut = split_units(list(units))
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps([asdict(unit) for unit in cut]).encode())
    return cut


def restored(value: dict[str, Any]) -> Unit:
    """The unit that ``asdict`` made ``value`` of."""
    own = value["byte_range"]
    return Unit(**value | {"byte_range": None if own is None else ByteRange(**own)})


def split_units(units: list[Unit], *, range_bytes: int | None = None) -> list[Unit]:
    """Files that can be cut, in parts; each part of a file of lines knows its first line's number.

    The parts depend on the input alone, not on the machine: so do the shards that are made of them.
    """
    if range_bytes is None:
        total = sum(bytes_of_unit(unit) for unit in units)
        range_bytes = min(max(total // MOST_UNITS, LEAST_BYTES), MOST_BYTES)
    split: list[Unit] = []
    for unit in units:
        split.extend(parts_of_unit(unit, range_bytes))
    return split


def bytes_of_unit(unit: Unit) -> int:
    """Bytes of a unit that can be cut; 0 of another."""
    return size_of(unit.path) if is_cut(unit) else 0


def is_cut(unit: Unit) -> bool:
    """Whether parts of the file can be read alone; one of which only some rows are meant is left whole."""
    kind = suffix_of(unit.path).kind
    some = unit.first > 0 or unit.last is not None
    return not some and (kind in PARQUET or (kind in LINES and not is_whole(unit.path)))


def parts_of_unit(unit: Unit, range_bytes: int) -> Iterator[Unit]:
    if not is_cut(unit):
        yield unit
    elif suffix_of(unit.path).kind in PARQUET:
        ranges = row_ranges(unit.path, range_bytes)
        yield from (replace(unit, first=first, last=last) for first, last in ranges)
        if not ranges:  # its reader says that it is empty
            yield unit
    else:
        yield from (replace(unit, byte_range=own) for own in file_ranges(unit.path, range_bytes))


def file_ranges(path: str, range_bytes: int) -> tuple[ByteRange, ...]:
    ranges = plan_ranges(path, max(1, math.ceil(size_of(path) / range_bytes)))
    if len(ranges) == 1:
        return ranges
    count = ray.remote(num_cpus=CPUS)(count_lines)
    return number_ranges(ranges, ray.get([count.remote(byte_range) for byte_range in ranges]))
