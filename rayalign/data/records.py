"""What a reader yields for every row of a file: the row, or the reason why it cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign.errors import UserError

EXCERPT_CHARACTERS = 200
QUARANTINE = "quarantine.jsonl"
"""What files of bad rows are called; no pattern and no folder reads one as data."""


class EmptyFile(UserError):
    """A file without a single row."""

    def __init__(self, source: str) -> None:
        super().__init__(f"{source}: the file is empty; take it out of the list or write rows to it")


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row as it was written, before its meaning is looked for."""

    source: str
    """The file or dataset, as the user named it."""
    line: int
    """1-based line of the file; 1-based row of a Parquet file or dataset."""
    value: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be used, and why."""

    source: str
    line: int
    reason: str
    field: str = ""
    """The column at fault; empty when the whole row is."""
    excerpt: str = ""
    """The beginning of the row as text."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


Row = RawRow | BadRow


def excerpt_of(value: object) -> str:
    """The beginning of a row as one line of text, for a person to recognise it by."""
    if isinstance(value, bytes):
        text = value[: 4 * EXCERPT_CHARACTERS].decode("utf-8", errors="replace")
    else:
        text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 1] + "…"


def append_quarantine(path: str | Path, rows: Iterable[BadRow]) -> None:
    """Append bad rows to a JSONL file of ``{file, line, reason, field, excerpt}``; no row, no file."""
    lines = [
        json.dumps(
            {"file": row.source, "line": row.line, "reason": row.reason, "field": row.field, "excerpt": row.excerpt},
            ensure_ascii=False,
        )
        for row in rows
    ]
    if not lines:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"{path}: bad rows cannot be written there: {error.strerror}") from error
