"""What is drawn: scores against KL, reply lengths, training metrics.

A cell keeps its colour and marker (method) and its line style (data policy) in every figure and table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from rayalign.report.entries import ReportEntry
from rayalign.report.points import REFERENCE, ComparisonRecord, Measure
from rayalign.report.statistics import Estimate
from rayalign.report.summary import PointSummary, Summary
from rayalign.report.svg import PALETTE, Series, Style, Yardstick, line_chart
from rayalign.report.trials import Cost

MARKERS = tuple(zip("os^DvPX*ph<>", "●■▲◆▼✚✖★⬟⬢◀▶", strict=True))
"""(matplotlib, text)."""
LINES: Mapping[str, str] = {"off_policy": "-", "hybrid": "--", "on_policy": ":"}
LOG_FROM_KL = 30.0

Coordinate = Callable[[PointSummary], float | Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostAxis:
    """What a checkpoint had cost, in place of its KL."""

    key: str
    label: str
    amount: Callable[[Cost], float]


COST_AXES = (
    CostAxis(key="tokens", label="tokens trained", amount=lambda cost: cost.tokens_trained),
    CostAxis(
        key="supervision", label="labels and scorer calls", amount=lambda cost: cost.labels_used + cost.scorer_calls
    ),
    CostAxis(key="seconds", label="device seconds", amount=lambda cost: cost.device_seconds or 0.0),
)


def entry_styles(entries: Sequence[ReportEntry]) -> dict[str, Style]:
    """Id of an entry or cell to style: one colour and marker per method, one line per data policy.

    Where two entries would look alike, one colour and marker per entry. All cells of an entry share its style.
    """
    looks = [(entry.display_name, entry.data_policy) for entry in entries]
    differ = len(set(looks)) == len(looks)
    names = [entry.display_name for entry in entries]
    keys = names if differ else [entry.id for entry in entries]
    index = {key: position for position, key in enumerate(dict.fromkeys(keys))}
    found: dict[str, Style] = {}
    for entry, key in zip(entries, keys, strict=True):
        marker, symbol = MARKERS[index[key] % len(MARKERS)]
        line = LINES.get(entry.data_policy, "-.")
        style = Style(color=index[key] % len(PALETTE), marker=marker, symbol=symbol, line=line)
        found |= dict.fromkeys([entry.id, *(cell.id for cell in entry.cells)], style)
    return found


def draw_all(comparison: ComparisonRecord, summary: Summary) -> dict[str, str]:
    """File stem to SVG, in the order of the report: per scorer a frontier, then against each cost; lengths, metrics."""
    prompt_set = comparison.prompt_sets[0].name
    (reference,) = summary.of(REFERENCE, prompt_set)
    drawn = {
        f"frontier-{_slug(scorer.name)}": _frontier(comparison, summary, reference, scorer)
        for scorer in comparison.scorers
    }
    for axis in cost_axes(summary):
        for scorer in comparison.scorers:
            stem = f"cost-{axis.key}-{_slug(scorer.name)}"
            drawn[stem] = _against_cost(stem, comparison, summary, reference, scorer, axis)
    drawn["length"] = line_chart(
        "length",
        _evaluated(comparison, summary, lambda point: point.step, lambda point: point.length),
        x_label="step",
        y_label="reply length, tokens",
        start=(0, reference.length.mean),
    )
    for metric in comparison.text.curves:
        stem, series = f"curve-{_slug(metric)}", _trained(comparison, summary, metric)
        if series:
            drawn[stem] = line_chart(stem, series, x_label="step", y_label=metric)
    return drawn


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def _frontier(comparison: ComparisonRecord, summary: Summary, reference: PointSummary, scorer: Measure) -> str:
    estimator = comparison.kl_estimators[0]
    return line_chart(
        f"frontier-{_slug(scorer.name)}",
        _evaluated(
            comparison, summary, lambda point: point.kl[estimator.name], lambda point: point.scores[scorer.name]
        ),
        x_label=f"KL(π‖π_ref), {estimator.label}, nats per reply",
        y_label=f"{scorer.label}, mean over prompts",
        start=(reference.kl[estimator.name].mean, reference.scores[scorer.name].mean),
        yardstick=_best_of_n(summary, comparison.prompt_sets[0].name, scorer),
        log_from=LOG_FROM_KL,
    )


def cost_axes(summary: Summary) -> list[CostAxis]:
    """Those along which anything was spent."""
    costs = [entry.cost for entry in summary.entries if entry.measured]
    return [axis for axis in COST_AXES if any(map(axis.amount, costs))]


def _against_cost(
    stem: str, comparison: ComparisonRecord, summary: Summary, reference: PointSummary, scorer: Measure, axis: CostAxis
) -> str:
    entries = {entry.id: entry for entry in summary.entries}

    def spent(point: PointSummary) -> float:
        """In proportion to the step: of what a run used in all, only the whole was counted."""
        entry = entries[point.cell]
        return axis.amount(entry.cost) * point.step / last_entry_step(entry)

    return line_chart(
        stem,
        _evaluated(comparison, summary, spent, lambda point: point.scores[scorer.name]),
        x_label=axis.label,
        y_label=f"{scorer.label}, mean over prompts",
        start=(0.0, reference.scores[scorer.name].mean),
    )


def last_entry_step(entry: ReportEntry) -> int:
    """Number of its runs: trained where that is known, else measured."""
    rows = chain.from_iterable(cell.metrics for cell in entry.cells)
    logged = [row.get("step") for row in rows]
    trained = [int(step) for step in logged if step is not None]
    points = chain.from_iterable(cell.points for cell in entry.cells)
    return max([*trained, *(point.step for point in points)])


def _best_of_n(summary: Summary, prompt_set: str, scorer: Measure) -> Yardstick | None:
    rows = summary.best(prompt_set)
    if not rows:
        return None
    scores = [row.scores[scorer.name].mean for row in rows]
    return Yardstick(label="reference, best of n", x=[row.kl_bound for row in rows], y=scores)


def _evaluated(comparison: ComparisonRecord, summary: Summary, x: Coordinate, y: Coordinate) -> list[Series]:
    """A line per entry through its checkpoints on the first prompt set."""
    look = entry_styles(summary.entries)
    series = []
    for entry in summary.entries:
        path = summary.path(entry.id, comparison.prompt_sets[0].name)
        if path:
            label = f"{entry.label} ({entry.failed})" if entry.failed else entry.label
            xs, ys = [x(point) for point in path], [y(point) for point in path]
            series.append(Series(label=label, style=look[entry.id], x=xs, y=ys))
    return series


def _trained(comparison: ComparisonRecord, summary: Summary, metric: str) -> list[Series]:
    """A line per run that logged the metric: its trailing mean over a tenth of the run."""
    look = entry_styles(summary.entries)
    series = []
    for cell in comparison.cells:
        rows = [(row.get("step"), row.get(metric)) for row in cell.metrics]
        points = [(step, value) for step, value in rows if step is not None and value is not None]
        if points:
            steps, values = zip(*points, strict=True)
            smooth = trailing_mean(values, max(1, len(values) // 10))
            series.append(Series(label=cell.label, style=look[cell.id], x=steps, y=smooth))
    return series


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """At every position the mean of the last ``window`` values, of fewer at the start."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
