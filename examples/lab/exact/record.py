"""What an experiment is, what it measures, and what is claimed of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from ..claims import Verdict, interval, verdict
from ..results import NotMeasured, only, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The exact quantities of one policy: ``cell`` is how it was made, ``at`` the step or the size it was made with."""

    cell: str
    at: float
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one seed found."""

    points: tuple[Point, ...]

    def value(self, cell: str, quantity: str, at: float) -> float:
        """Raises NotMeasured where there is not exactly one."""
        return only([p.values[quantity] for p in self.points if (p.cell, p.at) == (cell, at) and quantity in p.values])

    def path(self, cell: str) -> list[Point]:
        return [point for point in self.points if point.cell == cell]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """On every seed ``value`` is above ``above``."""

    text: str
    value: Callable[[Measured], float]
    above: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    name: str
    title: str
    about: str
    """Markdown: the world and what varies in it."""
    reading: str
    """Markdown: what the deciding seeds say, written after them."""
    at: str
    """What a point's ``at`` is."""
    measure: Callable[[int], tuple[Point, ...]]
    """seed → points; everything random comes from the seed."""
    claims: tuple[Claim, ...]
    draw: Callable[[Figure, Sequence[Measured]], None]
    caption: str
    digits: int = 3
    shown: tuple[float, ...] | None = None
    """The values of ``at`` that the page's table has; None: all."""


def ahead(one: str, other: str, quantity: str, at: float) -> Callable[[Measured], float]:
    """``quantity`` of ``one`` − that of ``other``."""
    return lambda seed: seed.value(one, quantity, at) - seed.value(other, quantity, at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A claim and what the seeds say of it."""

    claim: Claim
    values: tuple[float, ...]

    @property
    def interval(self) -> tuple[float, float]:
        """NaN where a seed has no value."""
        return interval(self.values) if self.known else (math.nan, math.nan)

    @property
    def verdict(self) -> Verdict:
        return verdict(self.values, self.claim.above) if self.known else "not shown"

    @property
    def known(self) -> bool:
        return not any(map(math.isnan, self.values))


def judged(experiment: Experiment, seeds: Sequence[Measured]) -> list[Judged]:
    return [Judged(claim=c, values=tuple(_value(c, seed) for seed in seeds)) for c in experiment.claims]


def _value(claim: Claim, seed: Measured) -> float:
    try:
        return claim.value(seed)
    except NotMeasured:  # such as a KL that a path never reached: the claim is then not shown
        return math.nan


def claims_table(found: Sequence[Judged], seeds: Sequence[int], digits: int = 3) -> str:
    """One Markdown row per claim."""
    lines = [
        f"| claim | above | {' | '.join(f'seed {seed}' for seed in seeds)} | mean [95 % over seeds] | |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    for one in found:
        low, high = one.interval
        numbers = " | ".join(number(value, digits) for value in one.values)
        summary = f"{number(fmean(one.values), digits)} [{number(low, digits)}, {number(high, digits)}]"
        lines.append(
            f"| {escaped(one.claim.text)} | {number(one.claim.above, digits)} | {numbers} | {summary} | {one.verdict} |"
        )
    return "\n".join(lines)


def points_table(experiment: Experiment, seeds: Sequence[Measured]) -> str:
    """One Markdown row per policy: mean ± standard deviation over seeds."""
    first = [p for p in seeds[0].points if experiment.shown is None or p.at in experiment.shown]
    quantities = list(dict.fromkeys(name for point in first for name in point.values))
    lines = [f"| | {experiment.at} | {' | '.join(map(escaped, quantities))} |", "|---" * (len(quantities) + 2) + "|"]
    for point in first:
        columns = [
            spread([seed.value(point.cell, name, point.at) for seed in seeds], experiment.digits)
            if name in point.values
            else ""
            for name in quantities
        ]
        lines.append(f"| {point.cell} | {point.at:g} | {' | '.join(columns)} |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """As a cell of a Markdown table says it."""
    return text.replace("|", "\\|").replace("*", "\\*")


def number(value: float, digits: int) -> str:
    """So many decimals, or a power of ten where these would say nothing."""
    if math.isnan(value):
        return "–"
    return f"{value + 0.0:.{digits}f}" if value == 0 or abs(value) >= 0.5 * 10**-digits else f"{value:.0e}"


def as_json(points: Sequence[Point]) -> list[Any]:
    """Rounded to nine significant digits."""
    return [[p.cell, p.at, {name: float(f"{value:.9g}") for name, value in p.values.items()}] for p in points]


def from_json(rows: Sequence[Any]) -> Measured:
    return Measured(points=tuple(Point(cell=cell, at=at, values=values) for cell, at, values in rows))
