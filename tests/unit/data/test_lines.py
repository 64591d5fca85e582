from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import fsspec
import pytest
from bad_inputs import BAD_INPUTS, BadInput, line
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rayalign.data.lines import count_lines, number_ranges, plan_ranges, read_lines, read_range
from rayalign.data.records import BadRow, EmptyFile, RawRow, Row, append_quarantine
from rayalign.errors import UserError

SOUP = st.lists(
    st.sampled_from(
        [b"\n", b"\r\n", b"\n\n", b" ", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x85", b"\x0c", b"{", b'"', b"NaN",
         b'{"a": 1}', b'{"a": "\\ud800"}', b"[1]", b"null", b"\x00"]
    )
    | st.binary(max_size=8),
    max_size=30,
).map(b"".join)  # fmt: skip


def write(folder: Path, content: bytes, suffix: str = ".jsonl") -> str:
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    return str(path)


def ranged(path: str, num_ranges: int) -> list[Row]:
    ranges = plan_ranges(path, num_ranges)
    numbered = number_ranges(ranges, [count_lines(part) for part in ranges])
    return [row for part in numbered for row in read_range(part)]


@pytest.mark.parametrize("case", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_every_line_is_accounted_for(case: BadInput, tmp_path: Path) -> None:
    path = write(tmp_path, case.content, case.suffix)
    rows = list(read_lines(path))
    assert [row.line for row in rows] == sorted([*case.good, *(number for number, _, _ in case.bad)])
    assert {row.source for row in rows} == {path}


NO_LINES = re.compile(rb"(\xef\xbb\xbf)?\s*(\[\s*\{|<html|<!doctype|version )", re.IGNORECASE)
"""Begins a file that is read as one array, or that is no file of rows at all."""


@given(content=SOUP)
@settings(max_examples=300, deadline=None)
def test_accepted_and_bad_are_the_lines_that_are_not_blank(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assume(not NO_LINES.match(content))
    path = write(tmp_path_factory.mktemp("soup"), content)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [number for number, data in enumerate(lines, start=1) if data.strip(b" \t\r\n")]
    if not expected:
        with pytest.raises(EmptyFile, match="the file is empty"):
            list(read_lines(path))
        return
    rows = list(read_lines(path))
    assert [row.line for row in rows] == expected
    for row in rows:
        try:
            value = json.loads(lines[row.line - 1].decode("utf-8"), strict=False)
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except ValueError:
            value = None
        assert isinstance(row, RawRow) == isinstance(value, dict)


@given(content=SOUP, num_ranges=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_ranges_together_are_the_file(
    content: bytes, num_ranges: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assume(not NO_LINES.match(content + b"\n{}"))
    path = write(tmp_path_factory.mktemp("soup"), content + b"\n{}")
    ranges = plan_ranges(path, num_ranges)
    assert len(ranges) <= num_ranges
    assert [part.start for part in ranges[1:]] == [part.end for part in ranges[:-1]]
    assert repr(ranged(path, num_ranges)) == repr(list(read_lines(path)))


def test_values_keep_their_characters(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\u2029\x1cd\x0c"
    path = write(tmp_path, json.dumps({"text": text}, ensure_ascii=False).replace("\\f", "\x0c").encode() + b"\n")
    (row,) = read_lines(path)
    assert isinstance(row, RawRow) and row.value == {"text": text}


def test_line_split_over_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, b"".join(b'{"i": %d}\n' % number for number in range(50)))
    whole = list(read_lines(path))
    monkeypatch.setattr("rayalign.data.lines.CHUNK_BYTES", 3)
    assert list(read_lines(path)) == whole
    assert ranged(path, 4) == whole
    assert [row.value for row in whole if isinstance(row, RawRow)] == [{"i": number} for number in range(50)]


def test_gzip_members_one_after_the_other(tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(b'{"i": 1}\n{"i"') + gzip.compress(b": 2}\n"), ".jsonl.gz")
    assert [row.value for row in read_lines(path) if isinstance(row, RawRow)] == [{"i": 1}, {"i": 2}]
    assert [row.line for row in ranged(path, 5)] == [1, 2]


def test_gzip_with_damaged_checksum_keeps_its_rows(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(line() + b"\n"))
    packed[-8] ^= 1
    first, second = read_lines(write(tmp_path, bytes(packed), ".jsonl.gz"))
    assert isinstance(first, RawRow)
    assert isinstance(second, BadRow) and second.line == 2 and "CRC" in second.reason


def test_remote_file() -> None:
    with fsspec.open("memory://pairs.jsonl", "wb") as stream:
        stream.write(line() + b"\nnonsense\n")
    assert [type(row) for row in read_lines("memory://pairs.jsonl")] == [RawRow, BadRow]


@pytest.mark.parametrize(
    ("path", "reason"),
    [("absent.jsonl", "absent.jsonl: No such file"), ("nowhere://x.jsonl", "nowhere://x.jsonl: Protocol not known")],
)
def test_what_cannot_be_opened(path: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        list(read_lines(path))


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_empty_file(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(EmptyFile, match="rows.jsonl: the file is empty"):
        list(read_lines(write(tmp_path, content)))


def test_empty_file_has_no_ranges(tmp_path: Path) -> None:
    with pytest.raises(EmptyFile):
        plan_ranges(write(tmp_path, b""), 2)


def test_quarantine_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    append_quarantine(path, [])
    assert not path.exists()
    (bad,) = read_lines(write(tmp_path, b"[" + b"1," * 200 + b"2]"))
    assert isinstance(bad, BadRow)
    append_quarantine(path, [bad])
    append_quarantine(path, [BadRow(source="b.jsonl", line=7, reason="chosen is empty", field="chosen", excerpt="{}")])
    first, second = (json.loads(text) for text in path.read_text().splitlines())
    assert first["excerpt"] == "[" + "1," * 99 + "…" and len(first["excerpt"]) == 200
    assert second == {"file": "b.jsonl", "line": 7, "reason": "chosen is empty", "field": "chosen", "excerpt": "{}"}
