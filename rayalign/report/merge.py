"""Several comparisons → one, where they were measured the same way; of the others, why they were not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from rayalign.errors import UserError
from rayalign.report.points import (
    CellRecord,
    ComparisonRecord,
    MergedPart,
    Provenance,
    ReportText,
    load_comparison,
    save_comparison,
)
from rayalign.report.render import render_report
from rayalign.report.trials import TuningRecord, UntriedSetting
from rayalign.storage.place import Place

Alike = Callable[[ComparisonRecord], object]
MEASURED: Mapping[str, Alike] = {
    "the prompts": lambda comparison: [(prompts.name, prompts.prompts) for prompts in comparison.prompt_sets],
    "the scorers": lambda comparison: [scorer.name for scorer in comparison.scorers],
    "the diagnostics": lambda comparison: [diagnostic.name for diagnostic in comparison.diagnostics],
    "the judge": lambda comparison: comparison.judge.name if comparison.judge else None,
    "the KL estimators": lambda comparison: [estimator.name for estimator in comparison.kl_estimators],
    "the sampling": lambda comparison: comparison.sampling,
    "the samples of a prompt": lambda comparison: len(comparison.reference[0].length[0]),
    "the baseline": lambda comparison: comparison.baseline.label if comparison.baseline else None,
}
"""What a report prints of how it was measured."""
DIGESTS: Mapping[str, str] = {
    "reference": "the reference model",
    "prompts": "the prompts' tokens",
    "scorers": "the scorers' code or weights",
    "judge": "the judge",
    "baseline": "the baseline model",
    "sampling": "the sampling",
    "package": "the version of rayalign",
}
"""Key of ``ComparisonRecord.measured`` → its name; what else is there is named by its key."""


def whole_name(place: Place) -> str:
    """The one name of a folder that may be written in several ways."""
    return str(place.resolve() if isinstance(place, Path) else place)


def merge_folders(directories: Sequence[Place], out: Place | None) -> tuple[ComparisonRecord, Place]:
    """The merged comparison and its page, written below ``out``.

    Raises:
        UserError: a folder is given twice or holds no comparison, ``out`` is one of them or missing, nothing merges.
    """
    resolved = list(map(whole_name, directories))
    if len(set(resolved)) < len(resolved):
        raise UserError("a folder is given twice; name each comparison once")
    if out is None or whole_name(out) in resolved:
        raise UserError("several comparisons become a report of their own; say where: --out runs/merged")
    merged = merge([(str(directory), load_comparison(directory)) for directory in directories])
    save_comparison(merged, out)
    return merged, render_report(merged, out)


def merge(comparisons: Sequence[tuple[str, ComparisonRecord]]) -> ComparisonRecord:
    """``(folder, comparison)`` pairs as one comparison: the first leads, and who was measured otherwise is left out.

    Raises:
        UserError: no other was measured like the first; every reason is named.
    """
    (folder, first), *others = comparisons
    alike = [(folder, first)]
    left_out: list[UntriedSetting] = []
    for place, other in others:
        reasons = measured_differences(first, other)
        if reasons:
            text = f"differs from {first.name} in {', '.join(reasons)}"
            left_out.append(UntriedSetting(what=f"{other.name} ({place})", reason=text))
        else:
            alike.append((place, other))
    if len(alike) < 2:
        reasons = [f"{left.what} {left.reason}" for left in left_out]
        raise UserError(
            "nothing to merge: "
            + "; ".join(reasons)
            + ". Measure them the same way, with the same evaluate block, model and version, or report each by itself"
        )
    parts = named_apart([comparison for _, comparison in alike])
    cells = list(chain.from_iterable(part.cells for _, part in parts))
    return first.model_copy(
        update={
            "name": " + ".join(name for name, _ in parts),
            "text": merged_text([part for _, part in parts]),
            "cells": tuple(cells),
            "tuning": tuple(chain.from_iterable(part.tuning for _, part in parts)),
            "provenance": merged_provenance([part for _, part in parts]),
            "parts": tuple(merged_part(name, part) for name, part in parts),
            "left_out": tuple(left_out),
        }
    )


def merged_part(name: str, part: ComparisonRecord) -> MergedPart:
    return MergedPart(name=name, cells=tuple(cell.id for cell in part.cells))


def measured_differences(first: ComparisonRecord, other: ComparisonRecord) -> list[str]:
    """In what two comparisons were measured otherwise; empty where their numbers mean the same.

    Without digests on either side, as an older version wrote them, the reference's own numbers decide.
    """
    found = [name for name, of in MEASURED.items() if of(first) != of(other)]
    if found:
        return found
    if first.measured and other.measured:
        keys = dict.fromkeys([*first.measured, *other.measured])
        return [DIGESTS.get(key, key) for key in keys if first.measured.get(key) != other.measured.get(key)]
    same = reference_numbers(first) == reference_numbers(other)
    return [] if same else ["the numbers of the reference"]


def reference_numbers(comparison: ComparisonRecord) -> list[tuple[object, ...]]:
    return [(point.scores, point.kl, point.length, point.verdicts) for point in comparison.reference]


def named_apart(comparisons: Sequence[ComparisonRecord]) -> list[tuple[str, ComparisonRecord]]:
    """Each under a name of its own, and all cells of a comparison with one in common under names that say whose."""
    names: list[str] = []
    for comparison in comparisons:
        taken = sum(name == comparison.name or name.startswith(f"{comparison.name} (") for name in names)
        names.append(f"{comparison.name} ({taken + 1})" if taken else comparison.name)
    everywhere = list(chain.from_iterable(map(names_of_cells, comparisons)))
    if len(set(everywhere)) == len(everywhere):
        return list(zip(names, comparisons, strict=True))
    return [(name, prefix_names(comparison, name)) for name, comparison in zip(names, comparisons, strict=True)]


def names_of_cells(comparison: ComparisonRecord) -> set[str]:
    """Every id, label and entry of its cells."""
    names = chain.from_iterable((cell.id, cell.label, cell.entry) for cell in comparison.cells)
    return set(names) - {""}


def prefix_names(comparison: ComparisonRecord, name: str) -> ComparisonRecord:
    def own(text: str) -> str:
        return f"{name}: {text}" if text else ""

    def cell_of(cell: CellRecord) -> CellRecord:
        return cell.model_copy(update={"id": own(cell.id), "label": own(cell.label), "entry": own(cell.entry)})

    def tuning_of(tuning: TuningRecord) -> TuningRecord:
        return tuning.model_copy(update={"label": own(tuning.label), "cells": tuple(map(own, tuning.cells))})

    origin = comparison.provenance
    return comparison.model_copy(
        update={
            "cells": tuple(map(cell_of, comparison.cells)),
            "tuning": tuple(map(tuning_of, comparison.tuning)),
            "provenance": origin.model_copy(
                update={
                    "config_digests": {own(cell): digest for cell, digest in origin.config_digests.items()},
                    "seeds": {own(cell): seed for cell, seed in origin.seeds.items()},
                }
            ),
        }
    )


def merged_text(parts: Sequence[ComparisonRecord]) -> ReportText:
    texts = [part.text for part in parts]
    return ReportText(
        title=" + ".join(dict.fromkeys(text.title for text in texts)),
        opening=distinct_texts(text.opening for text in texts),
        caveats=distinct_texts(text.caveats for text in texts),
        kl_levels=tuple(sorted(set(chain.from_iterable(text.kl_levels for text in texts)))),
        curves=distinct_texts(text.curves for text in texts),
    )


def merged_provenance(parts: Sequence[ComparisonRecord]) -> Provenance:
    """Facts in which the comparisons differ stand side by side."""
    origins = [part.provenance for part in parts]
    times = [origin.started for origin in origins if origin.started]
    return Provenance(
        commands=distinct_texts(origin.commands for origin in origins),
        git_revision=", ".join(dict.fromkeys(origin.git_revision for origin in origins if origin.git_revision)),
        versions=side_by_side([origin.versions for origin in origins]),
        config_digests=dict(chain.from_iterable(origin.config_digests.items() for origin in origins)),
        seeds=dict(chain.from_iterable(origin.seeds.items() for origin in origins)),
        machine=side_by_side([origin.machine for origin in origins]),
        started=min(times, default=""),
        finished=max((origin.finished for origin in origins), default=""),
    )


def side_by_side(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in distinct_texts(facts):
        values = dict.fromkeys(fact[key] for fact in facts if key in fact)
        found[key] = ", ".join(values)
    return found


def distinct_texts(groups: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """In the order of their first appearance."""
    return tuple(dict.fromkeys(chain.from_iterable(groups)))
