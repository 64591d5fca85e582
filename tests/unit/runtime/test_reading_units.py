"""How files are cut for several readers; no Ray, since a file that is one range is not counted."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rayalign.data.lines import ByteRange
from rayalign.data.records import EmptyFile, RawRow
from rayalign.data.tokenize_rows import Unit, read_chunks
from rayalign.runtime.reading import planned, split_units

LINES = b'{"prompt": "a"}\n' * 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("rows.json", json.dumps([{"prompt": "a"}]).encode()),
        ("array.jsonl", json.dumps([{"prompt": "a"}]).encode()),
        ("rows.csv", b"prompt\na\n"),
    ],
)
def test_what_cannot_be_cut_is_read_as_a_whole(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    unit = Unit(path=str(path))
    assert split_units([unit], range_bytes=8) == [unit]


def test_lines_are_cut_unless_some_rows_are_counted_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)
    unit = Unit(path=str(path))
    whole = ByteRange(source=str(path), start=0, end=len(LINES))
    assert split_units([unit], range_bytes=len(LINES)) == split_units([unit]) == [replace(unit, byte_range=whole)]
    for some in (replace(unit, last=2), replace(unit, first=1)):
        assert split_units([some], range_bytes=8) == [some]


def parquet(path: Path, *, rows: int, row_group_size: int) -> Unit:
    table = pyarrow.table({"prompt": [f"prompt {row}" for row in range(rows)]})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return Unit(path=str(path))


@pytest.mark.parametrize("range_bytes", [1, 150, 1 << 20])
def test_a_parquet_file_is_cut_at_its_row_groups(range_bytes: int, tmp_path: Path) -> None:
    unit = parquet(tmp_path / "rows.parquet", rows=25, row_group_size=4)
    parts = split_units([unit], range_bytes=range_bytes)
    assert [part.first for part in parts] == [0, *(part.last for part in parts[:-1])] and parts[-1].last == 25
    assert all(part.first % 4 == 0 for part in parts)
    assert len(parts) == {1: 7, 1 << 20: 1}.get(range_bytes, len(parts))
    read = [row for part in parts for chunk in read_chunks(part) for row in chunk]
    assert read == [RawRow(source=unit.path, line=row + 1, value={"prompt": f"prompt {row}"}) for row in range(25)]


@pytest.mark.parametrize(("first", "last"), [(0, None), (3, 9), (4, 8), (11, 12), (24, 99), (30, None)])
def test_some_rows_of_a_parquet_file(first: int, last: int | None, tmp_path: Path) -> None:
    unit = replace(parquet(tmp_path / "rows.parquet", rows=25, row_group_size=4), first=first, last=last)
    lines = [row.line for chunk in read_chunks(unit) for row in chunk]
    assert lines == list(range(1, 26))[first:last]


def test_an_empty_parquet_file_is_refused_by_its_reader(tmp_path: Path) -> None:
    unit = parquet(tmp_path / "rows.parquet", rows=0, row_group_size=4)
    assert split_units([unit]) == [unit]
    with pytest.raises(EmptyFile):
        list(read_chunks(unit))


def test_a_preparation_that_continues_has_the_parts_that_it_began_with(tmp_path: Path) -> None:
    unit = parquet(tmp_path / "rows.parquet", rows=25, row_group_size=4)
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    units = [replace(unit, columns={"prompt": "question"}), Unit(path=str(tmp_path / "rows.jsonl"))]
    parts = planned(units, tmp_path / "store")
    assert planned([], tmp_path / "store") == parts == split_units(units)
