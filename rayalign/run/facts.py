"""What a preparation found, as ``run.json`` records it, and the line that warns of columns that were not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rayalign.config.data import DataSource
from rayalign.errors import UserError
from rayalign.runtime.datasets import StorePreparation


def preparation_counts(found: StorePreparation) -> dict[str, Any]:
    """The numbers of a preparation: rows = groups' rows + bad + dropped."""
    reports = found.reports
    return {
        "rows": found.rows,
        "bad": found.bad,
        "dropped": sum(report.dropped for report in reports),
        "undecided": sum(report.undecided for report in reports),
        "truncated_prompts": sum(report.truncated_prompts for report in reports),
        "truncated_responses": sum(report.truncated_responses for report in reports),
        "rules": plain_counts(sum((Counter(report.rules) for report in reports), Counter())),
        "formats": plain_counts(sum((report.formats for report in reports), Counter())),
        "not_read": plain_counts(sum((report.unread for report in reports), Counter())),
        "metadata_not_read": plain_counts(sum((report.metadata for report in reports), Counter())),
        "units": len(reports),
        "rows_by_node": found.rows_by_node,
    }


def plain_counts(counts: Counter[str]) -> dict[str, int]:
    """The most frequent first."""
    return dict(counts.most_common())


def warning(label: str, facts: Mapping[str, Any]) -> str:
    """One line that names the columns which hold something and were not read; empty where there is none."""
    unread: Mapping[str, int] = facts.get("not_read", {})
    if not unread:
        return ""
    rows = facts["rows"]
    named = ", ".join(f"{name} ({count:,} of {rows:,} rows)" for name, count in unread.items())
    return f"warning: {label}: not read: {named}; name what is meant with `columns`"


def refuse_absent_columns(source: DataSource, found: StorePreparation) -> None:
    """Raise UserError for a name in ``columns`` that no row has: a slip in an optional one would be silent."""
    held = frozenset().union(*(report.named for report in found.reports))
    for ours, theirs in source.columns.items():
        if theirs not in held:
            raise UserError(f"{source.label}: columns names {theirs} as {ours}, and no row has it; check the spelling")
