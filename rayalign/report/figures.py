"""Figures as SVG text: the same input gives the same bytes, and nothing in them points outside the file.

Colours are CSS variables with the light palette as fallback, so that one drawing serves the page in both colour schemes
and stands alone as a file. A cell keeps its colour and marker (method) and its line style (data policy) everywhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayalign.report.points import REFERENCE, Cell, Comparison, Measure
from rayalign.report.statistics import Estimate
from rayalign.report.summary import PointSummary, Summary

PALETTE = (
    ("#0072b2", "#56a7dc"),
    ("#d55e00", "#f0883e"),
    ("#008f68", "#2fc498"),
    ("#b3568e", "#dd8fc0"),
    ("#a67c00", "#e3b341"),
    ("#3c4fa3", "#97a5f2"),
    ("#6f5f4f", "#bfae9c"),
)
"""(on light, on dark): distinguishable with the common colour-vision deficiencies, after Okabe and Ito."""
THEME: Mapping[str, tuple[str, str]] = {
    "ink": ("#1f2328", "#e3e7ec"),
    "muted": ("#59636e", "#98a2ad"),
    "rule": ("#d8dce1", "#333a42"),
    **{f"s{index}": pair for index, pair in enumerate(PALETTE)},
}
"""CSS variable to (on light, on dark): what page and figures share."""
INK, MUTED, RULE = (THEME[name][0] for name in ("ink", "muted", "rule"))
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))
"""(matplotlib, text)."""
LINES: Mapping[str, str] = {"off_policy": "-", "hybrid": "--", "on_policy": ":"}
SIZE = (5.4, 3.7)
LOG_FROM_KL = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    color: int
    """Index into :data:`PALETTE`."""
    marker: str
    symbol: str
    """The marker as text, for tables and legends."""
    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    x_interval: Sequence[tuple[float, float]] = ()
    y_interval: Sequence[tuple[float, float]] = ()


def styles(cells: Sequence[Cell]) -> dict[str, Style]:
    """Cell id to style: one colour and marker per method, one line per data policy; per cell where that repeats."""
    looks = [(cell.display_name, cell.data_policy) for cell in cells]
    keys = [cell.display_name if len(set(looks)) == len(looks) else cell.id for cell in cells]
    index = {key: position for position, key in enumerate(dict.fromkeys(keys))}
    return {
        cell.id: Style(
            color=index[key] % len(PALETTE),
            marker=MARKERS[index[key] % len(MARKERS)][0],
            symbol=MARKERS[index[key] % len(MARKERS)][1],
            line=LINES.get(cell.data_policy, "-."),
        )
        for cell, key in zip(cells, keys, strict=True)
    }


def draw_all(comparison: Comparison, summary: Summary) -> dict[str, str]:
    """File stem to SVG, in the order of the report: a frontier per scorer, lengths, one figure per training metric."""
    prompt_set = comparison.prompt_sets[0].name
    drawn = {
        f"frontier-{_slug(scorer.name)}": _frontier(comparison, summary, prompt_set, scorer)
        for scorer in comparison.scorers
    }
    drawn["length"] = _lengths(comparison, summary, prompt_set)
    for metric in comparison.text.curves:
        series = _metric_series(comparison, metric)
        if series:
            drawn[f"curve-{_slug(metric)}"] = _draw(f"curve-{_slug(metric)}", series, "step", metric)
    return drawn


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _intervals(estimates: Sequence[Estimate]) -> list[tuple[float, float]]:
    return [(estimate.low, estimate.high) for estimate in estimates]


def _frontier(comparison: Comparison, summary: Summary, prompt_set: str, scorer: Measure) -> str:
    estimator = comparison.kl_estimators[0]
    look = styles(comparison.cells)
    (reference,) = summary.of(REFERENCE, prompt_set)
    start = (reference.kl[estimator.name].mean, reference.scores[scorer.name].mean)
    series = []
    for cell in comparison.cells:
        path = summary.of(cell.id, prompt_set)
        if path:
            kl = [point.kl[estimator.name] for point in path]
            score = [point.scores[scorer.name] for point in path]
            series.append(
                Series(
                    label=cell.label,
                    style=look[cell.id],
                    x=[value.mean for value in kl],
                    y=[value.mean for value in score],
                    x_interval=_intervals(kl),
                    y_interval=_intervals(score),
                )
            )
    x_label = f"KL(π‖π_ref), {estimator.label}, nats per reply"
    return _draw(f"frontier-{_slug(scorer.name)}", series, x_label, f"{scorer.label}, mean over prompts", start=start)


def _lengths(comparison: Comparison, summary: Summary, prompt_set: str) -> str:
    look = styles(comparison.cells)
    (reference,) = summary.of(REFERENCE, prompt_set)
    series = []
    for cell in comparison.cells:
        path: Sequence[PointSummary] = summary.of(cell.id, prompt_set)
        if path:
            series.append(
                Series(
                    label=cell.label,
                    style=look[cell.id],
                    x=[point.step for point in path],
                    y=[point.length.mean for point in path],
                    y_interval=_intervals([point.length for point in path]),
                )
            )
    return _draw("length", series, "step", "reply length, tokens, mean over prompts", start=(0, reference.length.mean))


def _metric_series(comparison: Comparison, metric: str) -> list[Series]:
    look = styles(comparison.cells)
    series = []
    for cell in comparison.cells:
        rows = [(row["step"], row[metric]) for row in cell.metrics if row.get(metric) is not None]
        points = [(step, value) for step, value in rows if step is not None and value is not None]
        if points:
            window = smoothing_window(len(points))
            y = [value for _, value in points]
            smooth = [sum(y[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(y))]
            series.append(Series(label=cell.label, style=look[cell.id], x=[step for step, _ in points], y=smooth))
    return series


def smoothing_window(num_rows: int) -> int:
    """Rows in the trailing mean that training curves show: a tenth of the run."""
    return max(1, num_rows // 10)


def _draw(
    stem: str, series: Sequence[Series], x_label: str, y_label: str, *, start: tuple[float, float] | None = None
) -> str:
    settings = {
        "svg.hashsalt": stem,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": RULE,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": RULE,
        "grid.linewidth": 0.5,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        for line in series:
            _draw_series(axes, line, start)
        if start is not None:
            axes.plot(*start, marker="o", markersize=7, markerfacecolor="none", markeredgecolor=INK, linestyle="none")
            axes.annotate(REFERENCE, start, textcoords="offset points", xytext=(7, -11), color=INK)
        if "KL" in x_label and max((x for line in series for x in line.x), default=0.0) > LOG_FROM_KL:
            axes.set_xscale("symlog", linthresh=1)
            x_label += " (logarithmic above 1)"
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, handlelength=2.6)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _adapt(buffer.getvalue(), stem, f"{y_label} against {x_label}")


def _draw_series(axes: Axes, line: Series, start: tuple[float, float] | None) -> None:
    color = PALETTE[line.style.color][0]
    x, y = list(line.x), list(line.y)
    if start is not None:
        axes.plot([start[0], x[0]], [start[1], y[0]], color=color, linestyle=line.style.line, linewidth=0.8)
    for position, (low, high) in enumerate(line.x_interval):
        axes.plot([low, high], [y[position]] * 2, color=color, linewidth=0.7, alpha=0.55)
    for position, (low, high) in enumerate(line.y_interval):
        axes.plot([x[position]] * 2, [low, high], color=color, linewidth=0.7, alpha=0.55)
    sparse = len(x) <= 12
    axes.plot(
        x,
        y,
        color=color,
        linestyle=line.style.line,
        linewidth=1.4,
        marker=line.style.marker,
        markersize=5,
        markevery=1 if sparse else (len(x) - 1, 1),
        label=line.label,
    )


def _adapt(svg: str, stem: str, title: str) -> str:
    """Drop the prolog and metadata, make ids unique to the figure, name it, and let the page set the colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{stem}-", svg)
    variables = {light: f"var(--{name}, {light})" for name, (light, _) in THEME.items()}
    svg = re.sub("|".join(variables), lambda match: variables[match[0]], svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def inline(svg: str) -> str:
    """The drawing for an HTML page, where namespaces are implied and the page sets the size."""
    head, rest = svg.split(">", 1)
    return re.sub(r'\s(xmlns(:\w+)?|width|height)="[^"]*"', "", head) + ">" + rest


def standalone(svg: str) -> str:
    """The drawing as a file: on white."""
    head, rest = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}><rect width="100%" height="100%" fill="#fff"/>{rest}'
