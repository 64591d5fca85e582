"""The numbers of a measurement of the support desk, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

T = TypeVar("T")


class NotMeasured(LookupError):
    """There is not exactly one such number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One policy on one family of prompts: means over the prompts."""

    seed: int
    cell: str
    step: int
    family: str
    oracle: float
    audit2: float
    no_valid_opening: float
    grammatical: float
    right_thing: float
    kl: float
    """k1 on the policy's own samples, nats per reply."""
    tokens: float
    ended: float
    """Share of replies that end by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """How far log π(chosen) − log π(rejected) has moved from where it began: mean over the fixed pairs, nats."""

    seed: int
    method: str
    step: int
    nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    points: tuple[Point, ...] = ()
    margins: tuple[Margin, ...] = ()

    def __add__(self, other: Results) -> Results:
        return Results(points=self.points + other.points, margins=self.margins + other.margins)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(point.seed for point in self.points))

    def of(self, seed: int) -> Results:
        """The results of one seed."""
        return Results(
            points=tuple(point for point in self.points if point.seed == seed),
            margins=tuple(margin for margin in self.margins if margin.seed == seed),
        )

    def point(self, cell: str, step: int, family: str) -> Point:
        """The only such point; raises NotMeasured where there is not exactly one."""
        return only([p for p in self.points if (p.cell, p.step, p.family) == (cell, step, family)])

    def margin(self, method: str, step: int) -> float:
        """The only such margin; raises NotMeasured where there is not exactly one."""
        return only([m.nats for m in self.margins if (m.method, m.step) == (method, step)])


def only(found: Sequence[T]) -> T:
    if len(found) != 1:
        raise NotMeasured(f"measured {len(found)} times, not once")
    return found[0]


def points_table(results: Results) -> str:
    """One Markdown row per cell and step: shop, which the pairs are about, then travel, which none of them is about."""
    lines = [
        "| cell | step | oracle | audit2 | KL | tokens | no valid opening | travel: oracle | travel: KL |",
        "|---" * 9 + "|",
    ]
    for cell, step in dict.fromkeys((point.cell, point.step) for point in results.points):
        here = [point for point in results.points if (point.cell, point.step) == (cell, step)]
        shop = [point for point in here if point.family == "shop"]
        travel = [point for point in here if point.family == "travel"]
        columns = [
            spread([point.oracle for point in shop], 3),
            spread([point.audit2 for point in shop], 3),
            spread([point.kl for point in shop], 2),
            spread([point.tokens for point in shop], 1),
            spread([point.no_valid_opening for point in shop], 2),
            spread([point.oracle for point in travel], 3),
            spread([point.kl for point in travel], 2),
        ]
        lines.append(f"| {cell} | {step} | {' | '.join(columns)} |")
    return "\n".join(lines)


def margins_table(results: Results) -> str:
    """One Markdown row per method on the fixed pairs."""
    steps = sorted({margin.step for margin in results.margins})
    lines = [f"| method | {' | '.join(f'step {step}' for step in steps)} |", "|---" * (len(steps) + 1) + "|"]
    for method in dict.fromkeys(margin.method for margin in results.margins):
        columns = [
            spread([m.nats for m in results.margins if (m.method, m.step) == (method, step)], 2) for step in steps
        ]
        lines.append(f"| {method} | {' | '.join(columns)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± sample sd over seeds."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"
