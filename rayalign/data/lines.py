"""Lines of JSON, read byte for byte: local, remote or compressed, in bounded memory, whole or by ranges.

A line ends at ``\\n`` and nowhere else: U+2028, U+0085 and form feeds are data. Every line that is not blank
becomes one row or one bad row: accepted + bad = lines. A file that breaks off keeps the lines before the break. A file
that is one JSON array gives its items as rows.
"""

from __future__ import annotations

import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import IO, Any

from rayalign.data.arrays import array_rows
from rayalign.data.files import is_web, open_raw, open_rows, suffix_of
from rayalign.data.json_rows import JSON_WHITESPACE, parse_json_row
from rayalign.data.records import BadRow, EmptyFile, Row, excerpt_of
from rayalign.errors import UserError, first_line

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 8 << 20
_BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
"""What the ends of compressed files raise that were cut or damaged."""
_ARRAY = re.compile(rb"\s*\[\s*\{")
"""How a file begins that is one array of objects; in a file of lines a list of something else is a bad row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Whole lines of one file: bytes [start, end); ``end`` None is the whole of a file that cannot be cut."""

    source: str
    start: int = 0
    end: int | None = None
    first_line: int = 1


def read_lines(path: str, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row]:
    """Every row of a file of lines, such as ``.jsonl`` or ``.jsonl.gz``, in order.

    Raises :class:`EmptyFile` when there is no row at all and :class:`UserError` when the file cannot be opened.
    """
    rows = read_range(ByteRange(source=path), max_line_bytes=max_line_bytes)
    first = next(rows, None)
    if first is None:
        raise EmptyFile(path)
    yield first
    yield from rows


def plan_ranges(path: str, num_ranges: int) -> tuple[ByteRange, ...]:
    """At most ``num_ranges`` ranges of about equal size that together are the file.

    A file that is compressed, one array, or behind ``http(s)://`` is not cut.

    Only the bytes around the cuts are read, so line numbers are not known yet: see :func:`number_ranges`.
    """
    if is_whole(path):
        return (ByteRange(source=path),)
    with open_raw(path) as stream:
        size = stream.seek(0, 2)
        if size == 0:
            raise EmptyFile(path)
        starts = sorted({0} | {_line_start(stream, size * i // num_ranges) for i in range(1, num_ranges)})
    ends = [*starts[1:], size]
    return tuple(
        ByteRange(source=path, start=start, end=end) for start, end in zip(starts, ends, strict=True) if start < end
    )


def is_whole(path: str) -> bool:
    """Whether a file of lines is read from its beginning only."""
    if suffix_of(path).compression or is_web(path):
        return True
    with open_raw(path) as stream:
        return _is_array(stream.read(CHUNK_BYTES), path)


def size_of(path: str) -> int:
    """Bytes of a file that is not compressed."""
    with open_raw(path) as stream:
        return stream.seek(0, 2)


def count_lines(byte_range: ByteRange) -> int:
    """Number of line ends in a range: the cheap first pass that gives :func:`number_ranges` its counts.

    Of a file that is not cut nothing is counted: no range follows it.
    """
    if byte_range.end is None:
        return 0
    with open_raw(byte_range.source) as stream:
        return sum(chunk.count(b"\n") for chunk in _range_chunks(stream, byte_range))


def number_ranges(ranges: Sequence[ByteRange], counts: Sequence[int]) -> tuple[ByteRange, ...]:
    """The same ranges of one file with ``first_line`` filled in from the line counts of the ranges before."""
    numbered, line = [], 1
    for byte_range, count in zip(ranges, counts, strict=True):
        numbered.append(replace(byte_range, first_line=line))
        line += count
    return tuple(numbered)


def read_range(byte_range: ByteRange, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row]:
    """The rows of one range. Reading the ranges of a file one after the other is reading the file.

    Raises :class:`UserError` for a compressed file whose bytes are damaged, and for an array that is no valid JSON.
    """
    source = byte_range.source
    if byte_range.end is not None:
        with open_raw(source) as stream:
            yield from _rows(_range_chunks(stream, byte_range), byte_range, max_line_bytes)
        return
    with open_rows(source) as stream:
        yield from _whole(stream, byte_range, max_line_bytes)


def _whole(stream: Any, byte_range: ByteRange, max_line_bytes: int) -> Iterator[Row]:
    chunks = _chunks(stream, byte_range.source)
    try:
        first = next(chunks, b"")
    except _BROKEN as error:
        yield _broken(byte_range.source, 1, error)
        return
    together = chain([first], chunks)
    if _is_array(first, byte_range.source):
        yield from array_rows(together, byte_range.source, max_row_bytes=max_line_bytes)
    else:
        yield from _rows(together, byte_range, max_line_bytes)


def _is_array(beginning: bytes, path: str) -> bool:
    plain = beginning.removeprefix(codecs.BOM_UTF8).lstrip(JSON_WHITESPACE)
    return plain.startswith(b"[") and (suffix_of(path).kind == ".json" or _ARRAY.match(plain) is not None)


def _rows(chunks: Iterator[bytes], byte_range: ByteRange, max_line_bytes: int) -> Iterator[Row]:
    source, number = byte_range.source, byte_range.first_line
    try:
        for data, size, ended in _split(chunks, max_line_bytes):
            if number == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
                _refuse_one_object(source, data)
            if size > max_line_bytes:
                reason = f"the line has {size:,} bytes, more than the {max_line_bytes:,} that one row may have"
                yield BadRow(source=source, line=number, reason=reason, excerpt=excerpt_of(data))
            elif data.strip(JSON_WHITESPACE):
                yield parse_json_row(data, source=source, line=number, ended=ended)
            number += 1
    except _BROKEN as error:
        yield _broken(source, number, error)


def _broken(source: str, line: int, error: Exception) -> BadRow:
    kind = suffix_of(source).compression.removeprefix(".").replace("gz", "gzip")
    return BadRow(source=source, line=line, reason=f"the {kind} stream breaks off in this line: {error}")


def _range_chunks(stream: IO[bytes], byte_range: ByteRange) -> Iterator[bytes]:
    assert byte_range.end is not None
    stream.seek(byte_range.start)
    left = byte_range.end - byte_range.start
    while left and (chunk := stream.read(min(left, CHUNK_BYTES))):
        left -= len(chunk)
        yield chunk


def _chunks(stream: Any, source: str) -> Iterator[bytes]:
    read = getattr(stream, "read1", stream.read)  # of a compressed file, `read` would lose what came before a break
    try:
        while chunk := read(CHUNK_BYTES):
            yield chunk
    except _BROKEN:
        raise
    except OSError as error:
        raise UserError(f"{source}: cannot be read to its end: {first_line(error)}") from error


def _split(chunks: Iterator[bytes], max_line_bytes: int) -> Iterator[tuple[bytes, int, bool]]:
    """(the line, cut to ``max_line_bytes``; its size; whether a line end follows) of every line."""
    head, size = b"", 0
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for piece in complete:
            yield head + piece[: max_line_bytes - len(head)], size + len(piece), True
            head, size = b"", 0
        head += rest[: max_line_bytes - len(head)]
        size += len(rest)
    if size:
        yield head, size, False


def _refuse_one_object(source: str, first_line: bytes) -> None:
    if suffix_of(source).kind == ".json" and first_line.strip(JSON_WHITESPACE) == b"{":
        raise UserError(
            f"{source}: is one JSON object over several lines; write one object per line, or an array of objects"
        )


def _line_start(stream: IO[bytes], offset: int) -> int:
    """The first line start at or after ``offset`` (> 0), or the file's size."""
    position = stream.seek(max(offset - 1, 0))
    while chunk := stream.read(CHUNK_BYTES):
        found = chunk.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(chunk)
    return position
