"""Lines over seeds: each figure is small, and the same numbers give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayalign.report.svg import LEGEND_ROW, PALETTE, SETTINGS

WIDTH, HEIGHT, COLUMNS = 7.2, 2.7, 3
MARKERS, LINES = "os^Dv<>P*X", ("-", "--", "-.", ":")
Path = Sequence[tuple[float, float]]


def color(number: int) -> str:
    return PALETTE[number % len(PALETTE)][0]


def band(axes: Axes, label: str, seeds: Sequence[Path], number: int) -> None:
    """The mean over seeds, and where the lowest and the highest seed are."""
    x = [at for at, _ in seeds[0]]
    columns = list(zip(*([y for _, y in path] for path in seeds), strict=True))
    line = LINES[number // len(PALETTE)]
    marker = MARKERS[number] if len(x) <= 12 else None
    axes.plot(
        x,
        [fmean(column) for column in columns],
        color=color(number),
        linestyle=line,
        linewidth=1.3,
        marker=marker,
        markersize=3.5,
        label=label,
    )
    axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color(number), alpha=0.15, lw=0)


def finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def render(name: str, draw: Callable[[Figure], None], *, format: str = "svg") -> bytes:
    """The figure as a file, with one legend of all its labels below."""
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="white")
        draw(figure)
        labelled: dict[str, object] = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                labelled.setdefault(label, handle)
        figure.get_layout_engine().set(wspace=0.06)
        figure.set_figheight(HEIGHT + LEGEND_ROW * -(-len(labelled) // COLUMNS))
        figure.legend(
            labelled.values(),
            labelled.keys(),
            loc="outside lower center",
            ncols=COLUMNS,
            frameon=False,
            fontsize=8,
            handlelength=2.6,
        )
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if format == "svg" else None
        figure.savefig(buffer, format=format, metadata=metadata, dpi=110)
    return _compact(buffer.getvalue()) if format == "svg" else buffer.getvalue()


def _compact(svg: bytes) -> bytes:
    """Without metadata, comments and indentation."""
    svg = re.sub(rb"\s*<metadata>.*?</metadata>|\s*<!--.*?-->", b"", svg, flags=re.DOTALL)
    return re.sub(rb"\n\s+", b"\n", svg)
