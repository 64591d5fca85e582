from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayalign.data.formats import parse_row
from rayalign.data.records import EmptyFile, RawRow
from rayalign.data.schema import Example
from rayalign.data.tables import read_rows
from rayalign.errors import MissingExtra, UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": "Why?", "completion": "So.", "label": True},
    {"prompt": "Who?", "completion": "He.", "label": False},
    {"prompt": None, "completion": "It.", "label": True},
]


def values(path: str, **options: str) -> list[Mapping[str, Any]]:
    rows = list(read_rows(path, **options))
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    return [row.value for row in rows if isinstance(row, RawRow)]


def test_parquet(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    assert values(path) == ROWS


def test_parquet_turns_parse_like_json(tmp_path: Path) -> None:
    """Arrow fills fields that some turns lack with nulls."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "name": "a"}]
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), path)
    (row,) = read_rows(path)
    assert isinstance(row, RawRow)
    example = parse_row(row)
    assert isinstance(example, Example) and (example.prompt, *example.candidates) == ((turns[0],), (turns[1],))


def test_parquet_that_is_empty_or_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), path)
    with pytest.raises(EmptyFile):
        values(str(path))
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="rows.parquet: not a Parquet file"):
        values(str(path))


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    assert values(str(tmp_path / "one")) == ROWS
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "two")
    assert values(str(tmp_path / "two"), split="test") == ROWS[1:2]
    (row,) = read_rows(str(tmp_path / "two"), split="test")
    assert row.source == f"{tmp_path / 'two'}[test]"
    with pytest.raises(UserError, match="with a split 'absent'"):
        values(str(tmp_path / "two"), split="absent")


def test_dataset_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the hub extra is not installed")
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert values(str(folder)) == ROWS


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_datasets(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(MissingExtra, match=r"pip install 'rayalign\[hub\]'"):
        values("org/dataset")


def test_files_of_other_kinds_say_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\n")
    with pytest.raises(UserError, match=r"pairs.csv: rows are read from JSON lines"):
        next(read_rows(str(path)))


@pytest.mark.parametrize("indent", [None, 2])
def test_one_json_array_is_no_file_of_lines(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"prompt": "a", "completion": "b"}], indent=indent))
    with pytest.raises(UserError, match=r"pairs.json: is one JSON array; write one object per line: jq"):
        list(read_rows(str(path)))
