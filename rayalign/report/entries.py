"""Rows of the tables: one per configuration, whatever the number of training seeds that it was run with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rayalign.report.points import CellRecord, Filter
from rayalign.report.trials import Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportEntry:
    """Cells that differ in their seed only. One of a single cell has that cell's id and label."""

    id: str
    label: str
    cells: tuple[CellRecord, ...]

    @property
    def num_seeds(self) -> int:
        return len(self.cells)

    @property
    def display_name(self) -> str:
        return self.cells[0].display_name

    @property
    def data_policy(self) -> str:
        return self.cells[0].data_policy

    @property
    def failed(self) -> str:
        """``failed``, ``1 of 3 seeds failed``, ``stopped``, or nothing."""
        if any(cell.status == "stopped" for cell in self.cells):
            return "stopped"  # such a cell is alone in its entry
        failed = sum(cell.status == "failed" for cell in self.cells)
        if not failed:
            return ""
        return "failed" if self.num_seeds == 1 else f"{failed} of {self.num_seeds} seeds failed"

    @property
    def measured(self) -> bool:
        return any(cell.points for cell in self.cells)

    @property
    def cell_ids(self) -> tuple[str, ...]:
        return tuple(cell.id for cell in self.cells)

    @property
    def filter(self) -> Filter | None:
        return self.cells[0].filter

    @property
    def cost(self) -> Cost:
        """Cost of one run: the mean over the seeds that were trained to their end, or over all where none was."""
        done = [cell.cost for cell in self.cells if cell.status == "done"] or [cell.cost for cell in self.cells]
        if len(done) == 1:
            return done[0]
        seconds = [cost.device_seconds for cost in done if cost.device_seconds is not None]
        return Cost(
            device_seconds=fmean(seconds) if seconds else None,
            tokens_trained=round(fmean(cost.tokens_trained for cost in done)),
            tokens_generated=round(fmean(cost.tokens_generated for cost in done)),
            labels_used=round(fmean(cost.labels_used for cost in done)),
            scorer_calls=round(fmean(cost.scorer_calls for cost in done)),
        )


def entries_of(cells: Sequence[CellRecord]) -> tuple[ReportEntry, ...]:
    """In the order of their first cells."""
    groups: dict[str, list[CellRecord]] = {}
    for cell in cells:
        groups.setdefault(f"entry {cell.entry}" if cell.entry else f"cell {cell.id}", []).append(cell)
    return tuple(_entry(group) for group in groups.values())


def _entry(cells: Sequence[CellRecord]) -> ReportEntry:
    """One cell keeps its own id and label."""
    first = cells[0]
    if len(cells) == 1:
        return ReportEntry(id=first.id, label=first.label, cells=(first,))
    return ReportEntry(id=first.entry, label=first.entry, cells=tuple(cells))


def runs_of(cells: Sequence[CellRecord]) -> tuple[ReportEntry, ...]:
    """Every cell by itself."""
    return tuple(ReportEntry(id=cell.id, label=cell.label, cells=(cell,)) for cell in cells)


def replicated_anywhere(entries: Sequence[ReportEntry]) -> bool:
    return any(entry.num_seeds > 1 for entry in entries)
