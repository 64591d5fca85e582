"""How a file's name says what is in it."""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import urlsplit

COMPRESSIONS: Final = (".gz", ".bz2", ".xz", ".zst")
LINES: Final = (".jsonl", ".json", ".ndjson", ".jsonlines")
SEPARATED: Final = (".csv", ".tsv")
PARQUET: Final = (".parquet", ".pq")
ARROW: Final = (".arrow", ".feather")
_COMPRESSED = (*LINES, *SEPARATED)
_NEVER_COMPRESSED = (".tar", ".zip", *PARQUET, *ARROW)
READ: Final = "JSON (.jsonl, .json, .ndjson), CSV (.csv, .tsv), both also .gz, .bz2, .xz or .zst, Parquet and Arrow"
"""What a message says of the files that are read."""


class Suffix(NamedTuple):
    """``pairs.CSV.gz`` → (``.csv``, ``.gz``)."""

    kind: str
    compression: str = ""


def data_suffix(path: str) -> Suffix | None:
    """What the name of a path or URL says; None where it is no name of a file of rows."""
    name = file_name(path).lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    inner = name.removesuffix(compression)
    known = _COMPRESSED if compression else (*_COMPRESSED, *PARQUET, *ARROW)
    kind = next((ending for ending in known if inner.endswith(ending)), "")
    if kind:
        return Suffix(kind, compression)
    return Suffix(LINES[0], compression) if compression and not inner.endswith(_NEVER_COMPRESSED) else None


def file_name(path: str) -> str:
    """The last part of a path or URL, without a query."""
    first = path.split("::", 1)[0]
    plain = urlsplit(first).path if first.startswith(("http://", "https://")) else first
    return plain.rstrip("/").rpartition("/")[2]
