"""Every policy against every other: who wins how many pairings of replies to the same prompt, under each scorer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from rayalign.report.entries import ReportEntry
from rayalign.report.points import REFERENCE, ComparisonRecord, EvaluationPoint, as_array
from rayalign.report.statistics import Bootstrap, Estimate, Matrix, rate_estimate, win_shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """``row`` against ``column``, ids of entries or the reference, each at its last step, on the first prompt set."""

    row: str
    column: str
    scorer: str
    wins: Estimate
    """Share of the pairings that ``row`` wins, ties as halves. No interval where either was run with several seeds:
    its prompts alone would make it too narrow."""


def contests(comparison: ComparisonRecord, entries: Sequence[ReportEntry], bootstrap: Bootstrap) -> Iterator[Contest]:
    """All ordered pairs of the reference and the entries that were measured, scorer by scorer."""
    prompt_set = comparison.prompt_sets[0].name
    last = {REFERENCE: [comparison.reference[0]]}
    for entry in entries:
        points = last_points(entry, prompt_set)
        if points:
            last[entry.id] = points
    for scorer in comparison.scorers:
        samples = {name: pooled_scores(points, scorer.name) for name, points in last.items()}
        for row, column in itertools.combinations(samples, 2):
            single = len(last[row]) == len(last[column]) == 1
            found = rate_estimate(win_shares(samples[row], samples[column]), bootstrap)
            wins = found if single else Estimate(mean=found.mean, low=np.nan, high=np.nan, n=found.n)
            yield Contest(row=row, column=column, scorer=scorer.name, wins=wins)
            lost = Estimate(mean=1 - wins.mean, low=1 - wins.high, high=1 - wins.low, n=wins.n)
            yield Contest(row=column, column=row, scorer=scorer.name, wins=lost)


def last_points(entry: ReportEntry, prompt_set: str) -> list[EvaluationPoint]:
    """One per seed that reached the last step which any did."""
    measured = chain.from_iterable(cell.points for cell in entry.cells)
    points = [point for point in measured if point.prompt_set == prompt_set]
    step = max((point.step for point in points), default=0)
    return [point for point in points if point.step == step]


def pooled_scores(points: Sequence[EvaluationPoint], scorer: str) -> Matrix:
    """[P, S] scores, the samples of all seeds side by side."""
    return np.concatenate([as_array(point.scores[scorer]) for point in points], axis=1)


def contests_by_pair(found: Sequence[Contest]) -> Mapping[tuple[str, str, str], Contest]:
    """(row, column, scorer) → contest."""
    return {(contest.row, contest.column, contest.scorer): contest for contest in found}
