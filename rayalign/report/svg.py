"""Lines as SVG text: the same input gives the same bytes, and nothing in it points outside the file.

Colours are CSS variables with the light palette as fallback. So one drawing serves the page in both colour schemes, and
is complete as a file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayalign.report.points import REFERENCE
from rayalign.report.statistics import Estimate

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
WIDTH, PLOT_HEIGHT, LEGEND_ROW = 4.6, 3.1, 0.16
"""Inches; small enough that the text is still legible at the width of a phone."""
LEGEND_COLUMNS = 2
LOG_TICKS = (0, 1, 3, 10, 30, 100, 300, 1000)

SETTINGS: Mapping[str, str | float | bool | list[str]] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.ymargin": 0.1,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


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
    """One cell's line; a coordinate is a number or an estimate, whose interval is drawn too."""

    label: str
    style: Style
    x: Sequence[float | Estimate]
    y: Sequence[float | Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """A line that belongs to no cell, grey with crosses."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    stem: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    start: tuple[float, float] | None = None,
    yardstick: Yardstick | None = None,
    log_from: float | None = None,
) -> str:
    """One line per series, from ``start`` where there is one; a logarithmic x axis where it passes ``log_from``."""
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": stem}):
        legend_rows = -(-(len(series) + (yardstick is not None)) // LEGEND_COLUMNS)
        figure = Figure(figsize=(WIDTH, PLOT_HEIGHT + LEGEND_ROW * legend_rows), layout="constrained")
        axes = figure.add_subplot()
        for line in series:
            _draw_series(axes, line, start)
        if yardstick is not None:
            axes.plot(
                yardstick.x, yardstick.y, color=MUTED, linestyle="-", linewidth=0.8, marker="+", label=yardstick.label
            )
        if start is not None:
            axes.plot(*start, marker="o", markersize=7, markerfacecolor="none", markeredgecolor=INK, linestyle="none")
            axes.annotate(REFERENCE, start, textcoords="offset points", xytext=(7, -11), color=INK)
        largest_x = max(map(_mean, chain.from_iterable(line.x for line in series)), default=0.0)
        if log_from is not None and largest_x > log_from:
            axes.set_xscale("symlog", linthresh=1)
            ticks = [tick for tick in LOG_TICKS if tick <= 1.2 * largest_x]
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            x_label += " (logarithmic above 1)"
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if series or yardstick is not None:
            figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize=8, handlelength=2.6)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _adapt(buffer.getvalue(), stem, f"{y_label} against {x_label}", in_words(series))


def in_words(series: Sequence[Series]) -> str:
    """Where every line ends, for who does not see it."""
    ends = [f"{line.label} ends at {_mean(line.x[-1]):.3g}, {_mean(line.y[-1]):.3g}" for line in series]
    ends = [end.replace("nan", "no value") for end in ends]
    return f"{len(series)} lines, as x, y. {'; '.join(ends)}." if ends else "No lines."


def _mean(value: float | Estimate) -> float:
    return value.mean if isinstance(value, Estimate) else value


def _bounds(values: Sequence[float | Estimate]) -> tuple[list[float], list[float]]:
    estimates = [value for value in values if isinstance(value, Estimate)]
    return [value.low for value in estimates], [value.high for value in estimates]


def _draw_series(axes: Axes, line: Series, start: tuple[float, float] | None) -> None:
    color = PALETTE[line.style.color][0]
    x, y = [_mean(value) for value in line.x], [_mean(value) for value in line.y]
    if start is not None:
        axes.plot([start[0], x[0]], [start[1], y[0]], color=color, linestyle=line.style.line, linewidth=0.8)
    if isinstance(line.x[0], Estimate):
        axes.hlines(y, *_bounds(line.x), colors=color, linewidth=0.7, alpha=0.55)
    if isinstance(line.y[0], Estimate):
        axes.vlines(x, *_bounds(line.y), colors=color, linewidth=0.7, alpha=0.55)
    axes.plot(
        x,
        y,
        color=color,
        linestyle=line.style.line,
        linewidth=1.4,
        marker=line.style.marker,
        markersize=5,
        markevery=1 if start is not None else [len(x) - 1],
        label=line.label,
    )


def _adapt(svg: str, stem: str, title: str, description: str) -> str:
    """Drop the prolog and metadata, make ids unique to the figure, name it, and let the page set the colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{stem}-", svg)
    variables = {light: f"var(--{name}, {light})" for name, (light, _) in THEME.items()}
    svg = re.sub("|".join(variables), lambda match: variables[match[0]], svg)
    named = f'<svg role="img" aria-labelledby="{stem}-title {stem}-desc" '
    head, rest = svg.replace("<svg ", named, 1).split(">", 1)
    words = f'<title id="{stem}-title">{escape(title)}</title><desc id="{stem}-desc">{escape(description)}</desc>'
    return f"{head}>\n {words}{rest}"


def inline(svg: str) -> str:
    """The drawing for an HTML page, where namespaces are implied and the page sets the size."""
    head, rest = svg.split(">", 1)
    return re.sub(r'\s(xmlns(:\w+)?|width|height)="[^"]*"', "", head) + ">" + rest


def standalone(svg: str) -> str:
    """The drawing as a file: on white."""
    head, rest = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}><rect width="100%" height="100%" fill="#fff"/>{rest}'
