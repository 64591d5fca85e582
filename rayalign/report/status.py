"""How far the runs below a folder are, from the files that they keep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from rayalign.errors import UserError
from rayalign.report.formatting import MISSING, printable
from rayalign.report.tables import narrow_table
from rayalign.storage.lease import silent_seconds
from rayalign.storage.manifest import MANIFEST
from rayalign.storage.place import ObjectPath, Place, below

TAIL_BYTES = 1 << 16
SILENT_SECONDS = 120.0
"""A living process renews its lease far more often."""
SHOWN_TIME = slice(len("2026-"), len("2026-01-31 12:34"))
"""What a table shows of a time."""


COLUMNS = ("run", "status", "step", "loss", "tokens/s", "left", "saved", "attempts", "updated")


COLUMNS = ("run", "status", "step", "loss", "tokens/s", "left", "saved", "attempts", "updated")


def status_table(directory: Place) -> RenderableType:
    """One line per run, and below why attempts of unfinished ones failed; raises UserError where there is no run."""
    lines: list[list[str]] = []
    told: list[Text] = []
    for run in runs(directory):
        facts = read_run_json(run / "run.json")
        name = below(run, directory) if run != directory else name_of(directory)
        lines.append([name, *state_of(run, facts)])
        if lines[-1][1] != "finished":
            told += [Text(printable(f"{name}: {failure}")) for failure in facts.get("failures", [])]
    if not lines:
        raise UserError(f"{directory} holds no run: name a folder below which `rayalign train` wrote a run.json")
    return Group(narrow_table(COLUMNS, lines, title=str(directory)), *told)


def name_of(place: Place) -> str:
    """The last part of its whole address."""
    return (place.resolve() if isinstance(place, Path) else place).name


def state_of(run: Place, facts: Mapping[str, Any]) -> list[str]:
    """The cells of a run's line, but its name."""
    rows = last_rows(run / "metrics.jsonl")
    row = rows[-1] if rows else {}
    status = status_of(run, facts)
    step, steps, attempts = row.get("step", 0), facts.get("steps"), facts.get("attempts", 1)
    speed, pace = tokens_per_second(rows), seconds_per_step(rows)
    return [
        status,
        f"{step}/{steps if steps is not None else '?'}",
        f"{row['loss']:.4f}" if row.get("loss") is not None else MISSING,
        f"{speed:,.0f}" if speed else MISSING,
        clock_text((steps - step) * pace) if status == "running" and steps and pace else MISSING,
        newest_checkpoint(run),
        str(attempts) if attempts > 1 else MISSING,
        str(facts.get("updated", ""))[SHOWN_TIME],
    ]


def runs(directory: Place) -> Iterator[Place]:
    """Folders at or below ``directory`` that hold a run, in the order of their names."""
    found: list[Place] = [*directory.rglob("run.json")]
    return (path.parent for path in sorted(found, key=str))


def read_run_json(path: Place) -> dict[str, Any]:
    """What a ``run.json`` says; empty where it is damaged, so that one such run does not hide the others."""
    return record(path.read_bytes())


def record(text: bytes) -> dict[str, Any]:
    """What a JSON object says; empty where it is damaged or is something else."""
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def status_of(run: Place, facts: Mapping[str, Any]) -> str:
    """Status that the run has written; a *running* one whose lease is not renewed was lost."""
    status = str(facts.get("status", "unreadable"))
    if status != "running":
        return status
    silent = silent_seconds(run)
    return status if silent is not None and silent < SILENT_SECONDS else "lost"


def last_rows(path: Place) -> list[dict[str, Any]]:
    """The newest whole rows of a ``metrics.jsonl``; none where there is none yet."""
    if not path.exists():
        return []
    start = max(0, path.stat().st_size - TAIL_BYTES)
    if isinstance(path, ObjectPath):
        end = path.read_bytes()[start:]
    else:
        with path.open("rb") as file:
            file.seek(start)
            end = file.read()
    *whole, _ = end.split(b"\n")
    found = map(record, whole[1:] if start and len(whole) > 1 else whole)
    return [row for row in found if row]


def tokens_per_second(rows: Sequence[Mapping[str, Any]]) -> float:
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    return sum(row.get("step_tokens", 0) for row in rows) / seconds if seconds else 0.0


def seconds_per_step(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row.get("seconds", 0.0) for row in rows) / len(rows) if rows else 0.0


def newest_checkpoint(run: Place) -> str:
    """The step of the newest committed one."""
    steps = [path.parent.name[5:].partition("-")[0] for path in run.glob(f"checkpoints/step_*/{MANIFEST}")]
    return str(max(map(int, steps))) if steps else MISSING


def clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
