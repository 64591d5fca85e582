"""Parquet, Arrow and CSV files as the same rows that a file of JSON lines gives, a few hundred in memory at a time."""

from __future__ import annotations

import codecs
import csv
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, islice
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from rayalign.config.suffixes import ARROW, LINES, PARQUET
from rayalign.data.files import open_raw, open_rows, suffix_of
from rayalign.data.lines import read_lines
from rayalign.data.nulls import from_arrow
from rayalign.data.records import BadRow, EmptyFile, RawRow, Row, excerpt_of
from rayalign.data.schema import Fields
from rayalign.errors import UserError, first_line

BATCH_ROWS = 512
CSV_BLOCK_BYTES = 16 << 20
"""A row of a CSV file fits in it."""
_ARROW_FILE = b"ARROW1"
_DAMAGED = (pyarrow.ArrowException, OSError, UnicodeDecodeError, EOFError, zlib.error, lzma.LZMAError, csv.Error)
_TRUTHS = {"true": True, "false": False}


def read_rows(
    path: str, *, numbers: frozenset[str] = frozenset(), first: int = 0, last: int | None = None
) -> Iterator[Row]:
    """The rows [first, last) of a file, by its suffix; ``last`` None is its end.

    Args:
        numbers: columns of a CSV file that hold numbers or truth values; every other cell is a text.

    Raises:
        UserError: the file cannot be opened, or is none of the kinds that are read.
    """
    kind = suffix_of(path).kind
    if kind in PARQUET:
        return read_parquet(path, first=first, last=last)
    if kind in LINES:
        return islice(read_lines(path), first, last)
    return islice(read_arrow(path) if kind in ARROW else read_csv(path, numbers=numbers), first, last)


def count_rows(path: str, *, most: int | None = None) -> int:
    """The rows of a file, bad ones too; with ``most`` no more of it is read than that many take."""
    if suffix_of(path).kind in PARQUET:
        with open_raw(path) as stream, _saying(path, "a Parquet"):
            count = int(pyarrow.parquet.ParquetFile(stream).metadata.num_rows)
        return count if most is None else min(count, most)
    return sum(1 for _ in islice(read_rows(path), most))


def read_parquet(path: str, *, first: int = 0, last: int | None = None) -> Iterator[Row]:
    """The rows [first, last) of a Parquet file; row groups outside are not read."""
    with open_raw(path) as stream, _saying(path, "a Parquet"):
        file = pyarrow.parquet.ParquetFile(stream)
        ends = row_group_ends(file.metadata)
        if not ends or not ends[-1]:
            raise EmptyFile(path)
        stop = ends[-1] if last is None else last
        groups = [number for number, end in enumerate(ends) if end > first and ([0, *ends][number]) < stop]
        if not groups:
            return
        begin = [0, *ends][groups[0]]

        def batches() -> Iterator[pyarrow.RecordBatch]:
            return iter(file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, use_threads=False))

        yield from islice(_batched(path, "a Parquet", batches, begin=begin), first - begin, stop - begin)


def row_group_ends(metadata: Any) -> list[int]:
    """Where the row groups of a Parquet file end, in rows."""
    return list(accumulate(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)))


def row_ranges(path: str, range_bytes: int) -> list[tuple[int, int]]:
    """Rows [first, last) of a Parquet file: whole row groups of about ``range_bytes`` together, as they are in memory.

    Raises UserError where it is no Parquet file.
    """
    with open_raw(path) as stream, _saying(path, "a Parquet"):
        metadata = pyarrow.parquet.ParquetFile(stream).metadata
        ends = row_group_ends(metadata)
        sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    found: list[tuple[int, int]] = []
    size = range_bytes
    for first, last, own in zip([0, *ends], ends, sizes, strict=False):
        if first == last:
            continue
        if size + own > range_bytes:
            found.append((first, last))
            size = own
        else:
            found[-1] = (found[-1][0], last)
            size += own
    return found


def read_arrow(path: str) -> Iterator[Row]:
    """The rows of an Arrow file: IPC file (Feather) or stream, as the ``datasets`` library writes."""

    def batches(stream: Any) -> Iterator[pyarrow.RecordBatch]:
        if stream.read(len(_ARROW_FILE)) == _ARROW_FILE:
            stream.seek(0)
            table = pyarrow.ipc.open_file(stream)
            return (table.get_batch(index) for index in range(table.num_record_batches))
        stream.seek(0)
        return iter(pyarrow.ipc.open_stream(stream))

    with open_raw(path) as stream:
        yield from _batched(path, "an Arrow", lambda: map(_validated, batches(stream)))


def _validated(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Arrow files are memory as it was: offsets that lead outside would be followed."""
    batch.validate(full=True)
    return batch


def _batched(
    path: str, kind: str, batches: Callable[[], Iterator[pyarrow.RecordBatch]], *, begin: int = 0
) -> Iterator[Row]:
    line = begin
    with _saying(path, kind):
        for batch in batches():
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for value in batch_rows(batch.slice(start, BATCH_ROWS)):
                    line += 1
                    yield RawRow(source=path, line=line, value=value)
    if line == 0:
        raise EmptyFile(path)


def batch_rows(batch: pyarrow.RecordBatch) -> list[Fields]:
    """A batch as rows, without the nulls that Arrow fills objects with."""
    return [from_arrow(row) for row in batch.to_pylist()]


@contextmanager
def _saying(path: str, kind: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise UserError(f"{path}: not {kind} file, or a damaged one: {first_line(error)}") from error


def read_csv(path: str, *, numbers: frozenset[str] = frozenset()) -> Iterator[Row]:
    """The rows of a CSV or TSV file with a line of names; an empty cell that is not quoted is null."""
    bad: list[BadRow] = []
    line = 0

    def refuse(row: Any) -> str:
        """Called by pyarrow for a row of more or fewer cells than the first line names."""
        reason = f"the row has {row.actual_columns} cells, and the first line names {row.expected_columns} columns"
        bad.append(BadRow(source=path, line=line, reason=reason, excerpt=excerpt_of((row.text or "").encode())))
        return "skip"

    with _saying(path, "a CSV"):
        names = _names(path)
        with open_rows(path) as stream:
            for batch in _csv(stream, path, names=names, refuse=refuse):
                for value in batch.to_pylist():
                    line += 1
                    yield RawRow(source=path, line=line, value=_with_numbers(value, numbers))
                yield from bad
                bad.clear()
    if line == 0:
        raise EmptyFile(path)


def _names(path: str) -> list[str]:
    """The first line of a CSV file."""
    with open_rows(path) as stream:
        names = next(csv.reader(codecs.getreader("utf-8-sig")(stream), delimiter=_delimiter(path)), [])
    if not names:
        raise EmptyFile(path)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: the first line names {twice[0]!r} twice; rename one column")
    return names


def _delimiter(path: str) -> str:
    return "\t" if suffix_of(path).kind == ".tsv" else ","


def _csv(stream: Any, path: str, *, names: Iterable[str], refuse: Callable[[Any], str]) -> Any:
    return pyarrow.csv.open_csv(
        pyarrow.transcoding_input_stream(pyarrow.PythonFile(stream, mode="r"), "utf-8-sig", "utf-8"),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=_delimiter(path),
            newlines_in_values=True,
            invalid_row_handler=refuse,
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pyarrow.string() for name in names},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def _with_numbers(row: Mapping[str, Any], numbers: frozenset[str]) -> dict[str, Any]:
    return {**row, **{name: _number(value) for name, value in row.items() if name in numbers}}


def _number(text: Any) -> Any:
    """A truth value, whole number or number; any other text as it is."""
    if not isinstance(text, str):
        return text
    if text.strip().lower() in _TRUTHS:
        return _TRUTHS[text.strip().lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
