"""What a check of this machine says: its state, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

State = Literal["ok", "note", "warning", "broken"]
STYLES: dict[State, str] = {"ok": "green", "note": "dim", "warning": "yellow", "broken": "bold red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of ``rayalign doctor``. A warning or worse says in ``fix`` what to do; only ``broken`` fails."""

    name: str
    state: State
    found: str
    fix: str = ""


def num_broken(findings: Sequence[Finding]) -> int:
    return sum(finding.state == "broken" for finding in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    return {"broken": num_broken(findings), "findings": [asdict(finding) for finding in findings]}


def as_table(findings: Sequence[Finding]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for finding in findings:
        style = STYLES[finding.state]
        table.add_row(finding.name, Text(finding.state, style=style), Text(finding.found), Text(finding.fix))
    return table
