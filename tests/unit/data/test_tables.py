"""Files of every kind give the same rows; what is no such file is refused in a sentence."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from rayalign.data.formats import parse_row
from rayalign.data.records import BadRow, EmptyFile, RawRow
from rayalign.data.schema import Example
from rayalign.data.tables import BATCH_ROWS, count_rows, read_rows
from rayalign.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": "Why?", "completion": 'So, "yes".\nOr no.', "label": True},
    {"prompt": "Who?", "completion": "12", "label": False},
    {"prompt": None, "completion": "It.", "label": None},
]
NUMBERS = frozenset({"label"})


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return packed


def separated(delimiter: str) -> Callable[[], bytes]:
    def write() -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
        return text.getvalue().encode()

    return write


def lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def arrow(make: Callable[[Any, pa.Schema], Any]) -> Callable[[], bytes]:
    def write() -> bytes:
        table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
        with make(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return sink.getvalue()

    return write


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=2)
    return sink.getvalue()


PLAIN: dict[str, Callable[[], bytes]] = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".jsonlines": lines,
    ".JSONL": lines,
    ".json": lambda: json.dumps(ROWS).encode(),
    "-pretty.json": lambda: b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(),
    "-of-lines.json": lines,
    "-array.jsonl": lambda: json.dumps(ROWS).encode(),
    ".csv": separated(","),
    ".CSV": separated(","),
    ".tsv": separated("\t"),
    ".parquet": parquet,
    ".pq": parquet,
    ".arrow": arrow(pa.ipc.new_stream),
    "-file.arrow": arrow(pa.ipc.new_file),
    ".feather": arrow(pa.ipc.new_file),
}
PACKED: dict[str, Callable[[], bytes]] = {
    ".jsonl.gz": lambda: gzip.compress(lines()),
    ".jsonl.bz2": lambda: bz2.compress(lines()),
    ".jsonl.xz": lambda: lzma.compress(lines()),
    ".jsonl.zst": lambda: zstd(lines()),
    ".json.zst": lambda: zstd(json.dumps(ROWS).encode()),
    ".csv.gz": lambda: gzip.compress(separated(",")()),
    ".gz": lambda: gzip.compress(lines()),
}


def values(path: str, **options: Any) -> list[Mapping[str, Any]]:
    rows = list(read_rows(path, **options))
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    return [row.value for row in rows if isinstance(row, RawRow)]


@pytest.mark.parametrize("suffix", [*PLAIN, *PACKED])
def test_every_kind_of_file_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes((PLAIN | PACKED)[suffix]())
    assert values(str(path), numbers=NUMBERS) == ROWS
    assert count_rows(str(path)) == 3 and count_rows(str(path), most=2) == 2


def test_cells_of_a_csv_file_are_texts_but_where_numbers_belong(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected,margin,label,kto_tag,id\n1,02,"",1.5,1,TRUE,007\n,"null",x,,no,,\n')
    numbers = frozenset({"margin", "label", "kto_tag"})
    assert values(str(path), numbers=numbers) == [
        {"prompt": "1", "chosen": "02", "rejected": "", "margin": 1.5, "label": 1, "kto_tag": True, "id": "007"},
        {"prompt": None, "chosen": "null", "rejected": "x", "margin": None, "label": "no", "kto_tag": None, "id": None},
    ]


def test_a_row_of_a_csv_file_with_too_many_cells_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\nQ,A\nR,B,C\nS,D\n")
    rows = list(read_rows(str(path)))
    (bad,) = (row for row in rows if isinstance(row, BadRow))
    assert bad.reason == "the row has 3 cells, and the first line names 2 columns" and bad.excerpt == "R,B,C"
    assert [row.value["prompt"] for row in rows if isinstance(row, RawRow)] == ["Q", "S"]


def test_tables_are_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the row group that they were written in."""
    count = 3 * BATCH_ROWS + 1
    table = pa.table({"prompt": [str(number) for number in range(count)]})
    pq.write_table(table, tmp_path / "rows.parquet")
    pa.feather.write_feather(table, tmp_path / "rows.arrow", compression="uncompressed")
    most = []
    real = pa.RecordBatch.to_pylist

    class Batch:
        def __init__(self, batch: pa.RecordBatch) -> None:
            most.append(batch.num_rows)
            self.rows = real(batch)

    monkeypatch.setattr("rayalign.data.tables.batch_rows", lambda batch: Batch(batch).rows)
    for name in ("rows.parquet", "rows.arrow"):
        assert [row["prompt"] for row in values(str(tmp_path / name))] == [str(number) for number in range(count)]
    assert max(most) == BATCH_ROWS and len(most) == 8


def test_parquet_turns_parse_like_json(tmp_path: Path) -> None:
    """Arrow fills fields that some turns lack with nulls."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "name": "a"}]
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), path)
    (row,) = read_rows(path)
    assert isinstance(row, RawRow)
    example = parse_row(row)
    assert isinstance(example, Example) and (example.prompt, *example.candidates) == ((turns[0],), (turns[1],))


def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"é {number} ⏎ \U0001f426"} for number in range(50)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    for size in (1, 7, 64):
        monkeypatch.setattr("rayalign.data.lines.CHUNK_BYTES", size)
        assert values(str(path)) == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json", ".parquet", ".arrow", ".jsonl.gz"])
def test_empty_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    table = pa.Table.from_pylist(ROWS).slice(0, 0)
    if suffix == ".parquet":
        pq.write_table(table, path)
    elif suffix == ".arrow":
        pa.feather.write_feather(table, path)
    else:
        path.write_bytes({".json": b"[]", ".jsonl.gz": gzip.compress(b"")}.get(suffix, b""))
    with pytest.raises(EmptyFile):
        values(str(path))


def test_a_csv_file_of_names_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\n")
    with pytest.raises(EmptyFile):
        values(str(tmp_path / "rows.csv"))


LEADING_OUTSIDE = PLAIN["-file.arrow"]().replace(b"\4\0\0\0\x08\0\0\0", b"\4\0\0\0\xff\xff\0\0")
"""The second text of a column ends where no text is."""
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "a workbook": ("rows.xlsx", b"PK", "rows are read from JSON"),
    "an archive": ("rows.tar.gz", b"", "rows are read from JSON"),
    "a pointer": ("rows.jsonl", POINTER, "is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull"),
    "a pointer to a table": ("rows.parquet", POINTER, "is a pointer of Git LFS"),
    "a page": ("rows.jsonl", b"\n<!DOCTYPE html><html></html>", "is a web page, not rows"),
    "a broken table": ("rows.parquet", b"PAR1 no more", "not a Parquet file, or a damaged one"),
    "a broken arrow": ("rows.arrow", b"no more", "not an Arrow file, or a damaged one"),
    "one object": ("rows.json", b'{\n "prompt": "Q"\n}\n', "is one JSON object over several lines"),
    "an array that breaks off": ("rows.json", b'[{"a": 1}, {"a"', "item 2 of the JSON array"),
    "an array without commas": ("rows.json", b'[{"a": 1} {"a": 2}]', "before item 2, not ','"),
    "an array and more": ("rows.json", b'[{"a": 1}] {}', "text follows the end"),
    "twice the same name": ("rows.csv", b"prompt,prompt\n1,2\n", "names 'prompt' twice"),
    "damaged bytes": ("rows.jsonl.zst", zstd(b"{}\n")[:-3], "cannot be read to its end"),
    "no zst": ("rows.jsonl.zst", b"no more", "cannot be read to its end"),
    "a cut table": ("rows.csv.gz", gzip.compress(b"prompt\n" + b"a\n" * 99)[:-9], "not a CSV file, or a damaged one"),
    "memory that leads outside": ("rows.arrow", LEADING_OUTSIDE, "not an Arrow file, or a damaged one"),
    "latin": ("rows.csv", "prompt\ncafé\n".encode("latin-1"), "not a CSV file, or a damaged one"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_such_file_is_said(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        values(str(path))
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl.bz2", ".jsonl.xz"])
def test_a_compressed_file_that_breaks_off_keeps_the_rows_before(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    pack = bz2.compress if suffix.endswith("bz2") else lzma.compress
    whole = pack(lines()) + pack(lines())  # two streams, the second cut
    path.write_bytes(whole[:-4])
    rows = list(read_rows(str(path)))
    assert [row.value for row in rows[:3] if isinstance(row, RawRow)] == ROWS
    assert isinstance(rows[-1], BadRow) and "stream breaks off in this line" in rows[-1].reason
