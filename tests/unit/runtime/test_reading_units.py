"""How files are cut for several readers; no Ray, since a file that is one range is not counted."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from rayalign.data.lines import ByteRange
from rayalign.data.tokenize_rows import Unit
from rayalign.runtime.reading import split_units, unit_ranges

LINES = b'{"prompt": "a"}\n' * 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("rows.json", json.dumps([{"prompt": "a"}]).encode()),
        ("array.jsonl", json.dumps([{"prompt": "a"}]).encode()),
        ("rows.csv", b"prompt\na\n"),
        ("rows.parquet", b""),
    ],
)
def test_what_cannot_be_cut_is_read_as_a_whole(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert unit_ranges(Unit(path=str(path)), 8) == (None,)


def test_lines_are_cut_unless_some_rows_are_counted_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)
    unit = Unit(path=str(path))
    assert unit_ranges(unit, len(LINES)) == (ByteRange(source=str(path), start=0, end=len(LINES)),)
    assert unit_ranges(replace(unit, last=2), 8) == (None,)
    assert unit_ranges(replace(unit, first=1), 8) == (None,)
    [split] = split_units([unit])
    assert split.byte_range is not None and split.path == unit.path
