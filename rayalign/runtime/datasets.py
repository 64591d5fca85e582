"""Preparation as a stage of Ray Data: units of input → shards of token ids.

Ray Data moves the work, not the truth: what a run trains on is the committed store, and rows are counted at the end.
A unit whose report is written is not prepared again, so that a lost process costs the units that it had begun.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rayalign.config.data import DataConfig
from rayalign.config.model import ModelConfig
from rayalign.data.budget import Completed
from rayalign.data.shard import is_complete, sizes_below
from rayalign.data.tokenize_rows import Shape, Unit, UnitReport
from rayalign.runtime.failures import retry_lost_actors
from rayalign.runtime.preparer import Preparer, unit_report
from rayalign.runtime.reading import CPUS
from rayalign.runtime.stage import apply_to_items, dataset_of_items
from rayalign.storage.place import Place

TELL_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePreparation:
    """What preparation found: rows = groups' rows + bad + dropped."""

    reports: tuple[UnitReport, ...]
    rows_by_node: dict[str, int]
    """Rows that each node has read in this attempt."""

    @property
    def rows(self) -> int:
        return sum(report.rows for report in self.reports)

    @property
    def bad(self) -> int:
        return sum(report.bad for report in self.reports)


def prepare(
    units: Sequence[Unit],
    model: ModelConfig,
    data: DataConfig,
    *,
    completed: Completed,
    shape: Shape,
    directory: Place,
    writers: int,
    note: Callable[[str], None],
) -> StorePreparation:
    """Write the shards of every unit below ``directory``, in ``writers`` processes; the caller commits them.

    Raises:
        UserError: a unit cannot be read, or the tokenizer cannot be used.
        ItemKilled: processes died again and again, and no unit was finished meanwhile.
    """
    names = {f"{number:06d}": unit for number, unit in enumerate(units)}
    rows_by_node: Counter[str] = Counter()

    def finished() -> int:
        there = sizes_below(directory)
        return sum(unit_report(directory, name).name in there for name in names)

    def write() -> None:
        sizes = sizes_below(directory)
        missing = [(name, unit) for name, unit in names.items() if not is_finished_unit(directory, name, sizes)]
        if not missing:
            return
        said = time.monotonic()
        for told in apply_to_items(
            "tokens",
            dataset_of_items(missing),
            Preparer,
            model,
            data,
            completed,
            shape,
            directory,
            actors=writers,
            cpus=CPUS,
        ):
            rows_by_node[told.node] += told.rows
            if time.monotonic() - said >= TELL_SECONDS:
                note(f"tokens: {rows_by_node.total():,} rows so far")
                said = time.monotonic()

    retry_lost_actors("tokens", write, what="tokenization", progress=finished)
    reports = [UnitReport.from_json(unit_report(directory, name).read_text(encoding="utf-8")) for name in names]
    return StorePreparation(reports=tuple(reports), rows_by_node=dict(rows_by_node))


def is_finished_unit(directory: Place, name: str, sizes: Mapping[str, int]) -> bool:
    """Whether a unit has its report, and all shards that it names."""
    path = unit_report(directory, name)
    if path.name not in sizes:
        return False
    report = UnitReport.from_json(path.read_text(encoding="utf-8"))
    return all(is_complete(shard, sizes) for shard in report.shards)
