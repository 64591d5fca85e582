"""Points to estimates: how every number of a :class:`~rayalign.report.summary.Summary` comes about."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product

import numpy as np
from numpy.typing import NDArray

from rayalign.report.best_of_n import best_of_n
from rayalign.report.columns import KINDS, RATES, Columns, Key, columns
from rayalign.report.differences import Contender, EntryDifference, entry_differences
from rayalign.report.entries import ReportEntry, entries_of
from rayalign.report.formatting import SHARE
from rayalign.report.frontier import (
    FrontierPoint,
    pareto,
    pareto_frequency,
    score_at_kl,
    seed_crossings,
)
from rayalign.report.matrix import contests
from rayalign.report.points import (
    BASELINE,
    REFERENCE,
    AnswerCounts,
    CellRecord,
    ComparisonRecord,
    EvaluationPoint,
    PromptSet,
)
from rayalign.report.replication import replicated, resampled_means, seed_draws, two_level
from rayalign.report.statistics import Bootstrap, Estimate, Matrix, in_half, is_rate, prompt_draws
from rayalign.report.summary import AnswersSummary, AtKl, Chosen, EntryAtKl, PointSummary, Summary

Mask = NDArray[np.bool_]

COUNTS = ("replies", "missing", "calls", "failures", "ties", "disagreements")


def summarize(comparison: ComparisonRecord, bootstrap: Bootstrap | None = None) -> Summary:
    """Every estimate of the report. Equal comparisons give equal summaries."""
    bootstrap = bootstrap or Bootstrap()
    entries = entries_of(comparison.cells)
    parts = [_summarize_set(comparison, entries, index, bootstrap) for index in range(len(comparison.reference))]
    shares = shares_of(comparison)
    best = tuple(chain.from_iterable(best_of_n(reference, bootstrap, shares) for reference in comparison.reference))
    cells = [REFERENCE, BASELINE, *(cell.id for cell in comparison.cells)]
    rows = [REFERENCE, BASELINE, *(entry.id for entry in entries)]
    return Summary(
        bootstrap=bootstrap,
        entries=entries,
        points=_in_order(list(chain.from_iterable(part.points for part in parts)), cells),
        entry_points=_in_order(list(chain.from_iterable(part.entry_points for part in parts)), rows),
        at_kl=tuple(chain.from_iterable(part.at_kl for part in parts)),
        entries_at_kl=tuple(chain.from_iterable(part.entries_at_kl for part in parts)),
        differences=parts[0].differences,
        chosen=tuple(chain.from_iterable(part.chosen for part in parts)),
        answers=tuple(_answers(comparison)),
        best_of_n=best,
        contests=tuple(contests(comparison, entries, bootstrap)),
    )


def _in_order(points: Sequence[PointSummary], ids: Sequence[str]) -> tuple[PointSummary, ...]:
    place = {name: index for index, name in enumerate(ids)}
    return tuple(sorted(points, key=lambda point: place[point.cell]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSummary:
    """What :class:`Summary` says of one prompt set."""

    points: Sequence[PointSummary]
    entry_points: Sequence[PointSummary]
    at_kl: Sequence[AtKl]
    entries_at_kl: Sequence[EntryAtKl]
    differences: tuple[EntryDifference, ...]
    chosen: Sequence[Chosen]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An entry, the reference or the baseline at one step: one run's columns per seed."""

    id: str
    stream: int
    """Stream of the random draws of seeds: the entry's place."""
    step: int
    runs: tuple[Columns, ...]
    of_seeds: int

    def matrix(self, key: Key) -> Matrix:
        """[S, P]"""
        return np.stack([run.values[key] for run in self.runs])

    def measured(self, key: Key, bootstrap: Bootstrap, shares: frozenset[str], among: Mask | None = None) -> Estimate:
        """Mean and interval of one measure over all prompts, or those of the mask; ``shares`` are names of rates."""
        kind, name = key
        values = self.matrix(key)
        rate = kind in RATES or (kind in ("scores", "diagnostics") and name in shares and is_rate(values))
        return two_level(values if among is None else values[:, among], bootstrap, stream=self.stream, rate=rate)


def _summarize_set(
    comparison: ComparisonRecord, entries: Sequence[ReportEntry], index: int, bootstrap: Bootstrap
) -> SetSummary:
    reference = comparison.reference[index]
    baseline = comparison.baseline.points[index] if comparison.baseline else reference
    prompts = comparison.prompt_sets[index]
    scorers, estimator = [scorer.name for scorer in comparison.scorers], comparison.kl_estimators[0].name
    shares = shares_of(comparison)

    def of(cell: str, point: EvaluationPoint) -> Columns:
        return columns(cell, point, reference=reference, baseline=baseline)

    start = Row(id=REFERENCE, stream=0, step=reference.step, runs=(of(REFERENCE, reference),), of_seeds=1)
    others = [start]
    if comparison.baseline:
        others.append(Row(id=BASELINE, stream=0, step=baseline.step, runs=(of(BASELINE, baseline),), of_seeds=1))

    def path(cell: CellRecord) -> list[Columns]:
        return [of(cell.id, point) for point in cell.points if point.prompt_set == prompts.name]

    runs = {cell.id: path(cell) for cell in comparison.cells}
    rows = list(chain.from_iterable(_rows(entry, place, runs) for place, entry in enumerate(entries)))
    measured = chain.from_iterable(runs.values())
    cell_rows = [Row(id=run.cell, stream=0, step=run.step, runs=(run,), of_seeds=1) for run in measured]

    def summarized(rows: Sequence[Row]) -> list[PointSummary]:
        points = [_point(prompts.name, row, bootstrap, shares) for row in rows]
        return _mark_front(points, rows, scorers=scorers, estimator=estimator, bootstrap=bootstrap)

    points = summarized([*others, *cell_rows])
    entry_points = points if all(entry.num_seeds == 1 for entry in entries) else summarized([*others, *rows])
    at_kl: list[AtKl] = []
    for cell in comparison.cells:
        own = [point for point in points if point.cell == cell.id]
        paths = {name: _frontier_points(estimator, [points[0], *own], name) for name in scorers}
        for level in sorted(comparison.text.kl_levels) if own else ():
            crossings = {name: score_at_kl(found, level) for name, found in paths.items()}
            at_kl.append(AtKl(cell=cell.id, prompt_set=prompts.name, level=level, crossings=crossings))
    return SetSummary(
        points=points,
        entry_points=entry_points,
        at_kl=at_kl,
        entries_at_kl=list(_entries_at_kl(entries, at_kl, scorers)),
        differences=entry_differences(_contenders(rows, scorers, bootstrap), bootstrap),
        chosen=list(_chosen(prompts, rows, scorers, estimator, bootstrap, shares)),
    )


def _rows(entry: ReportEntry, stream: int, runs: Mapping[str, Sequence[Columns]]) -> Iterator[Row]:
    """By step; a seed without that step is not in the row."""
    by_step: dict[int, list[Columns]] = {}
    for cell in entry.cells:
        for run in runs[cell.id]:
            by_step.setdefault(run.step, []).append(run)
    for step in sorted(by_step):
        yield Row(id=entry.id, stream=stream, step=step, runs=tuple(by_step[step]), of_seeds=entry.num_seeds)


def _last(rows: Sequence[Row]) -> list[Row]:
    return list({row.id: row for row in rows}.values())


def _contenders(rows: Sequence[Row], scorers: Sequence[str], bootstrap: Bootstrap) -> list[Contender]:
    several = [row for row in _last(rows) if len(row.runs) > 1]
    return [
        Contender(
            entry=row.id,
            scorer=name,
            step=row.step,
            replicated=replicated(row.matrix(("scores", name)), bootstrap, stream=row.stream),
        )
        for name, row in product(scorers, several)
    ]


def _entries_at_kl(
    entries: Sequence[ReportEntry], at_kl: Sequence[AtKl], scorers: Sequence[str]
) -> Iterator[EntryAtKl]:
    found = {(row.cell, row.level): row.crossings for row in at_kl}
    for entry in entries:
        cells = [cell.id for cell in entry.cells]
        for level in dict.fromkeys(row.level for row in at_kl if row.cell in cells):
            reached = [found.get((cell, level), {}) for cell in cells]
            crossings = {}
            for name in scorers:
                crossings[name] = seed_crossings([own.get(name) for own in reached])
            yield EntryAtKl(entry=entry.id, prompt_set=at_kl[0].prompt_set, level=level, crossings=crossings)


def _chosen(
    prompts: PromptSet,
    rows: Sequence[Row],
    scorers: Sequence[str],
    estimator: str,
    bootstrap: Bootstrap,
    shares: frozenset[str],
) -> Iterator[Chosen]:
    """Checkpoints chosen of entries with several that as many seeds reached, where both halves have prompts."""
    select, report = (in_half(prompts.prompts, half) for half in ("select", "report"))
    if not select.any() or not report.any():
        return
    for entry in dict.fromkeys(row.id for row in rows):
        whole = max(len(row.runs) for row in rows if row.id == entry)
        path = [row for row in rows if row.id == entry and len(row.runs) == whole]
        means = [_mean_of(row.matrix(("scores", scorers[0]))[:, select]) for row in path]
        if len(path) < 2 or all(math.isnan(mean) for mean in means):
            continue
        row = path[max(range(len(path)), key=lambda index: (not math.isnan(means[index]), means[index]))]

        def measured(kind: str, name: str, row: Row = row) -> Estimate:
            return row.measured((kind, name), bootstrap, shares, report)

        yield Chosen(
            entry=entry,
            prompt_set=prompts.name,
            step=row.step,
            num_seeds=len(row.runs),
            num_select=int(select.sum()),
            num_report=int(report.sum()),
            scores={name: measured("scores", name) for name in scorers},
            changes={name: measured("changes", name) for name in scorers},
            kl=measured("kl", estimator),
        )


def _mean_of(values: Matrix) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else math.nan


def _answers(comparison: ComparisonRecord) -> Iterator[AnswersSummary]:
    baseline = [(BASELINE, comparison.baseline.points)] if comparison.baseline else []
    cells = [(cell.id, cell.points) for cell in comparison.cells]
    for cell, points in ((REFERENCE, comparison.reference), *baseline, *cells):
        found: dict[tuple[str, str], list[AnswerCounts]] = {}
        for answers in chain.from_iterable(point.answers for point in points):
            found.setdefault((answers.role, answers.name), []).append(answers)
        for (role, name), parts in found.items():
            sums: Counter[str] = Counter()
            for part in parts:
                sums.update({key: getattr(part, key) for key in COUNTS})
            problem = next((part.problem for part in parts if part.problem), "")
            yield AnswersSummary(cell=cell, role=role, name=name, problem=problem, **sums)


def shares_of(comparison: ComparisonRecord) -> frozenset[str]:
    """Names of the scorers and diagnostics that are shares."""
    return frozenset(one.name for one in (*comparison.scorers, *comparison.diagnostics) if one.unit == SHARE)


def _point(prompt_set: str, row: Row, bootstrap: Bootstrap, shares: frozenset[str]) -> PointSummary:
    found: dict[str, dict[str, Estimate]] = {kind: {} for kind in KINDS}
    for kind, name in row.runs[0].values:
        found[kind][name] = row.measured((kind, name), bootstrap, shares)
    return PointSummary(
        cell=row.id,
        prompt_set=prompt_set,
        step=row.step,
        num_samples=row.runs[0].num_samples,
        num_seeds=len(row.runs),
        of_seeds=row.of_seeds,
        scores=found["scores"],
        changes=found["changes"],
        win_rates=found["win_rates"],
        lc_win_rates=found["lc_win_rates"],
        judged=found["judged"].get(""),
        lc_judged=found["lc_judged"].get(""),
        kl=found["kl"],
        kl_per_token=found["kl_per_token"],
        diagnostics=found["diagnostics"],
        length=found["length"][""],
        cut=found["cut"][""],
    )


def _frontier_points(estimator: str, points: Sequence[PointSummary], scorer: str) -> list[FrontierPoint]:
    return [
        FrontierPoint(step=point.step, kl=point.kl[estimator].mean, score=point.scores[scorer].mean) for point in points
    ]


def _mark_front(
    points: Sequence[PointSummary],
    rows: Sequence[Row],
    *,
    scorers: Sequence[str],
    estimator: str,
    bootstrap: Bootstrap,
) -> list[PointSummary]:
    """Membership by the means, and its frequency when seeds and prompts are resampled, all points alike."""

    def resampled(kind: str, name: str) -> Matrix:
        matrices = [(row.matrix((kind, name)), row.stream) for row in rows]
        return np.stack(
            [
                resampled_means(
                    values, seed_draws(len(values), bootstrap, stream), prompt_draws(values.shape[1], bootstrap)
                )
                for values, stream in matrices
            ]
        )

    kl = resampled("kl", estimator)
    fronts = {name: pareto(_frontier_points(estimator, points, name)) for name in scorers}
    shares = {name: pareto_frequency(kl, resampled("scores", name)) for name in scorers}
    marked = []
    for index, point in enumerate(points):
        on_front = tuple(name for name, members in fronts.items() if members[index])
        frequency = {name: share[index] for name, share in shares.items()}
        marked.append(replace(point, on_front=on_front, front_frequency=frequency))
    return marked
