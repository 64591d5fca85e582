"""JSONL, read byte for byte: local, object store or gzip, in bounded memory, whole or by ranges.

A line ends at ``\\n`` and nowhere else (U+2028, U+0085 and form feeds are data), and every line that is not blank
becomes one row or one bad row: accepted + bad = lines. A file that breaks off keeps the lines before the break.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import fsspec

from rayalign.data.records import BadRow, EmptyFile, RawRow, Row, excerpt_of
from rayalign.errors import UserError

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 8 << 20
JSON_WHITESPACE = b" \t\r\n"
_decode_json = json.JSONDecoder(strict=False).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Whole lines of one file: bytes [start, end); ``end`` None is the whole of a file that cannot be cut."""

    source: str
    start: int = 0
    end: int | None = None
    first_line: int = 1


def read_lines(path: str, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row]:
    """Every row of a ``.jsonl`` or ``.jsonl.gz`` file in order.

    Raises :class:`EmptyFile` when there is no row at all and :class:`UserError` when the file cannot be opened.
    """
    rows = read_range(ByteRange(source=path), max_line_bytes=max_line_bytes)
    first = next(rows, None)
    if first is None:
        raise EmptyFile(path)
    yield first
    yield from rows


def plan_ranges(path: str, num_ranges: int) -> tuple[ByteRange, ...]:
    """At most ``num_ranges`` ranges of about equal size that together are the file; a gzip file is one.

    Only the bytes around the cuts are read, so line numbers are not known yet: see :func:`number_ranges`.
    """
    if path.endswith(".gz"):
        return (ByteRange(source=path),)
    with open_binary(path) as stream:
        size = stream.seek(0, 2)
        if size == 0:
            raise EmptyFile(path)
        starts = sorted({0} | {_line_start(stream, size * i // num_ranges) for i in range(1, num_ranges)})
    ends = [*starts[1:], size]
    return tuple(
        ByteRange(source=path, start=start, end=end) for start, end in zip(starts, ends, strict=True) if start < end
    )


def count_lines(byte_range: ByteRange) -> int:
    """Number of line ends in a range: the cheap first pass that gives :func:`number_ranges` its counts."""
    with open_binary(byte_range.source) as stream:
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

    Raises :class:`UserError` for a ``.json`` file that is one array.
    """
    source, number = byte_range.source, byte_range.first_line
    with open_binary(source) as stream:
        chunks = _gzip_chunks(stream) if source.endswith(".gz") else _range_chunks(stream, byte_range)
        try:
            for data, size, ended in _split(chunks, max_line_bytes):
                if number == 1:
                    data = data.removeprefix(codecs.BOM_UTF8)
                    _refuse_array(source, data)
                if size > max_line_bytes:
                    reason = f"the line has {size:,} bytes, more than the {max_line_bytes:,} that one row may have"
                    yield BadRow(source=source, line=number, reason=reason, excerpt=excerpt_of(data))
                elif data.strip(JSON_WHITESPACE):
                    yield _parse(source, number, data, ended)
                number += 1
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield BadRow(source=source, line=number, reason=f"the gzip stream breaks off in this line: {error}")


@contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """Open a local path or a URL that fsspec knows (``s3://``, ``gs://`` …) for reading bytes."""
    try:
        stream = fsspec.open(path, "rb").open()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: {error.strerror or 'no such file'}") from error
    except (ImportError, ValueError) as error:  # no driver for this kind of URL; the message names the package
        raise UserError(f"{path}: {error}") from error
    with stream:
        yield cast(IO[bytes], stream)


def _range_chunks(stream: IO[bytes], byte_range: ByteRange) -> Iterator[bytes]:
    stream.seek(byte_range.start)
    left = byte_range.end - byte_range.start if byte_range.end is not None else None
    while chunk := stream.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES)):
        if left is not None:
            left -= len(chunk)
        yield chunk


def _gzip_chunks(stream: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stream) as unzipped:
        while chunk := unzipped.read1(CHUNK_BYTES):  # `read` would lose what came before a break
            yield chunk


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


def _parse(source: str, number: int, data: bytes, ended: bool) -> Row:
    """One line that is not blank as a row, or why it is none."""
    try:
        text = data.decode("utf-8")
        value: Any = _decode_json(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 at byte {error.start + 1} of the line"
    except UnicodeEncodeError:
        reason = "half of a surrogate pair (\\ud800 … \\udfff) is not a character"
    except RecursionError:
        reason = "the JSON is nested too deeply"
    except ValueError as error:
        reason = f"not valid JSON: {error}" if ended else f"the file ends inside this line: {error}"
    else:
        if isinstance(value, dict):
            return RawRow(source=source, line=number, value=value)
        reason = f"a line must be one JSON object, not a {type(value).__name__}"
    return BadRow(source=source, line=number, reason=reason, excerpt=excerpt_of(data))


def _refuse_array(source: str, first_line: bytes) -> None:
    if source.endswith((".json", ".json.gz")) and first_line.lstrip(JSON_WHITESPACE).startswith(b"["):
        raise UserError(f"{source}: is one JSON array; write one object per line: jq -c '.[]' {source} > rows.jsonl")


def _line_start(stream: IO[bytes], offset: int) -> int:
    """The first line start at or after ``offset`` (> 0), or the file's size."""
    position = stream.seek(max(offset - 1, 0))
    while chunk := stream.read(CHUNK_BYTES):
        found = chunk.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(chunk)
    return position
