"""What a check found of one source, as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from rayalign.data.analysis import FINDINGS, FileFindings
from rayalign.report.formatting import printable
from rayalign.run.reads import COLUMN_FIELDS

MOST_REASONS = 10


def findings_table(found: FileFindings) -> Table:
    rows = Table(show_header=False, min_width=60)
    rows.add_row("rows", f"{found.good + found.bad:,}")
    rows.add_row("good", f"{found.good:,}")
    rows.add_row("bad", f"{found.bad:,}", style="red" if found.bad else None)
    for reason, count in found.reasons.most_common(MOST_REASONS):
        rows.add_row("", Text(printable(f"{count:,} × {reason}"), style="red"))
    for name, count in found.lacking.items():
        if count:
            needed = COLUMN_FIELDS.get(name, f"`{name}`")
            rows.add_row("", Text(printable(f"{count:,} × the method needs {needed}"), style="red"))
    for name, count in found.formats.most_common():
        rows.add_row("format", f"{name}: {count:,}")
    if found.unread:
        rows.add_row("not read", Text(printable(_counted(found.unread, found.good)), style="yellow"))
    if found.metadata:
        rows.add_row("metadata", Text(printable(_counted(found.metadata, found.good)), style="dim"))
    if found.labels:
        rows.add_row("labels", ", ".join(f"{name} {count:,}" for name, count in sorted(found.labels.items())))
    for name in found.lengths:
        low, middle, high, top = found.quantiles(name) or (0, 0, 0, 0)
        rows.add_row(name.replace("_", " "), f"min {low:,}   median {middle:,}   p95 {high:,}   max {top:,}")
    for name, meaning in FINDINGS.items():
        if found.counts[name]:
            rows.add_row(name.replace("_", " "), Text(f"{found.counts[name]:,}  {meaning}", style="yellow"))
    return rows


def _counted(columns: Mapping[str, int], rows: int) -> str:
    """Names of columns; of those that not every row has, in how many they stand."""
    names = []
    for name, count in columns.items():
        names.append(name if count == rows else f"{name} ({count:,})")
    return ", ".join(names)
