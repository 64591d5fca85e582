"""How far the runs below a folder are, from the files that they keep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from rayalign.errors import UserError

TAIL_BYTES = 1 << 16


def table(directory: Path) -> Table:
    """One line per run; raises UserError where there is none."""
    found = Table(title=str(directory))
    for column in ("run", "status", "step", "loss", "updated"):
        found.add_column(column)
    for run in runs(directory):
        facts = facts_of(run / "run.json")
        row = last_row(run / "metrics.jsonl")
        step = f"{row.get('step', 0)}/{facts.get('steps', '?')}"
        loss = f"{row['loss']:.4f}" if "loss" in row else "–"
        name, status = str(run.relative_to(directory.parent)), facts.get("status", "unreadable")
        found.add_row(name, status, step, loss, facts.get("updated", ""))
    if not found.row_count:
        raise UserError(f"{directory} holds no run: name a folder below which `rayalign train` wrote a run.json")
    return found


def runs(directory: Path) -> Iterator[Path]:
    """Folders at or below ``directory`` that hold a run, in the order of their names."""
    return (path.parent for path in sorted(directory.rglob("run.json")))


def facts_of(path: Path) -> dict[str, Any]:
    """What a ``run.json`` says; empty where it is damaged, so that one such run does not hide the others."""
    try:
        facts = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def last_row(path: Path) -> dict[str, Any]:
    """The newest whole row of a ``metrics.jsonl``; empty where there is none yet."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        *whole, _ = file.read().split(b"\n")
    return dict(json.loads(whole[-1])) if whole else {}
