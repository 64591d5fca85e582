"""Parquet files and Hugging Face datasets as the same rows that a JSONL file gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from rayalign.data.lines import open_binary, read_lines
from rayalign.data.records import EmptyFile, RawRow, Row
from rayalign.data.schema import from_arrow
from rayalign.errors import MissingExtra, UserError

LINE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".gz")


def read_rows(path: str, *, split: str = "train", revision: str | None = None) -> Iterator[Row]:
    """Every row of a file (by its suffix JSONL, gzipped JSONL or Parquet) or else of a Hugging Face dataset.

    ``split`` and ``revision`` concern datasets only. Raises :class:`UserError` for what cannot be opened.
    """
    if path.endswith(LINE_SUFFIXES):
        return read_lines(path)
    if path.endswith(".parquet"):
        return read_parquet(path)
    if Path(path).is_file():
        raise UserError(f"{path}: rows are read from JSON lines (also .gz), Parquet or a dataset; convert this file")
    return read_dataset(path, split=split, revision=revision)


def read_parquet(path: str) -> Iterator[Row]:
    """The rows of a Parquet file, one record batch in memory at a time."""
    with open_binary(path) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a Parquet file: {error}") from error
        line = 0
        for batch in table.iter_batches():
            for value in batch.to_pylist():
                line += 1
                yield RawRow(source=path, line=line, value=from_arrow(value))
    if line == 0:
        raise EmptyFile(path)


def read_dataset(path: str, *, split: str = "train", revision: str | None = None) -> Iterator[Row]:
    """The rows of one split of a Hub dataset, a dataset folder, or a folder that ``save_to_disk`` wrote."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "hub") from error
    saved = Path(path)
    try:
        if (saved / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(path)[split]
        elif (saved / "state.json").exists():
            dataset = datasets.load_from_disk(path)
        else:
            dataset = datasets.load_dataset(path, split=split, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: neither a file nor a dataset with a split {split!r}: {error}") from error
    source = f"{path}[{split}]"
    if len(dataset) == 0:
        raise EmptyFile(source)
    for index, value in enumerate(dataset):
        yield RawRow(source=source, line=index + 1, value=from_arrow(value))
