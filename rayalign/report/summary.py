"""Points to estimates: what the report says about every checkpoint, before it is laid out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rayalign.report.best_of_n import BestOfN, best_of_n
from rayalign.report.columns import KINDS, Columns, Key, columns
from rayalign.report.differences import Contender, EntryDifference, differences
from rayalign.report.entries import Entry, entries_of, replicated_anywhere
from rayalign.report.frontier import (
    Crossing,
    FrontierPoint,
    SeedCrossings,
    pareto,
    pareto_frequency,
    score_at_kl,
    seed_crossings,
)
from rayalign.report.points import BASELINE, REFERENCE, Answers, Comparison, EvaluationPoint, PromptSet
from rayalign.report.replication import replicated, resampled_means, seed_draws, two_level
from rayalign.report.split import in_half
from rayalign.report.statistics import INTERVAL_HEAD, SEEDS_HEAD, Bootstrap, Estimate, Matrix, prompt_draws

COUNTS = ("replies", "missing", "calls", "failures", "ties", "disagreements")


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSummary:
    """The estimates of one policy at one step on one prompt set; mappings are keyed by measure name."""

    cell: str
    """A cell's or entry's id, ``reference`` or ``(baseline)``."""
    prompt_set: str
    step: int
    num_samples: int
    """Samples per prompt; the number of prompts stands in every estimate."""
    num_seeds: int
    """Training runs that were measured at this step: with more than one, intervals are over them and prompts."""
    of_seeds: int
    """Training runs that there should be."""
    scores: Mapping[str, Estimate]
    changes: Mapping[str, Estimate]
    """Score minus the reference's, paired by prompt."""
    win_rates: Mapping[str, Estimate]
    """By scorer, over all pairings of a prompt's samples with the baseline's."""
    lc_win_rates: Mapping[str, Estimate]
    """Length-controlled; see :mod:`rayalign.report.length_control`."""
    judged: Estimate | None
    """The judge's win rate, over samples of equal number; None: there is no judge."""
    lc_judged: Estimate | None
    kl: Mapping[str, Estimate]
    """Nats per reply, by estimator."""
    kl_per_token: Mapping[str, Estimate]
    """The same over the tokens of all replies: Σ KL / Σ tokens."""
    diagnostics: Mapping[str, Estimate]
    length: Estimate
    cut: Estimate
    """Share of replies cut at the token limit."""
    on_front: tuple[str, ...] = ()
    """Scorers under which no other point of the prompt set dominates this one (point estimates)."""
    front_frequency: Mapping[str, float] = field(default_factory=dict)
    """By scorer: the share of the resamples in which that is so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtKl:
    """A cell's scores at a KL level, by scorer; ``None`` where the cell's checkpoints do not bracket the level."""

    cell: str
    prompt_set: str
    level: float
    crossings: Mapping[str, Crossing | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryAtKl:
    """What an entry's seeds score at a KL level, by scorer."""

    entry: str
    prompt_set: str
    level: float
    crossings: Mapping[str, SeedCrossings]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """An entry at the checkpoint whose first score is highest on the *select* half, measured on the *report* half."""

    entry: str
    prompt_set: str
    step: int
    num_seeds: int
    num_select: int
    num_report: int
    scores: Mapping[str, Estimate]
    changes: Mapping[str, Estimate]
    kl: Estimate
    """By the leading estimator, nats per reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersSummary:
    """What one scorer or judge was asked about one policy: sums over its steps and prompt sets."""

    cell: str
    role: str
    name: str
    replies: int
    missing: int
    problem: str
    calls: int
    failures: int
    ties: int
    disagreements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    bootstrap: Bootstrap
    entries: tuple[Entry, ...]
    """In the order of their first cells."""
    points: tuple[PointSummary, ...]
    """Of every run: the reference, a baseline if any, then the cells in order; prompt sets in order; steps ascending.
    """
    entry_points: tuple[PointSummary, ...]
    """The same with entries for cells; their intervals are over seeds and prompts where there are several seeds."""
    at_kl: tuple[AtKl, ...]
    entries_at_kl: tuple[EntryAtKl, ...]
    differences: tuple[EntryDifference, ...]
    """Of entries with several seeds, on the first prompt set."""
    chosen: tuple[Chosen, ...]
    answers: tuple[AnswersSummary, ...]
    """In the order of the points; of scorers and judges that count what they are asked."""
    best_of_n: tuple[BestOfN, ...]
    """Of the reference: prompt sets in order, n ascending."""

    @property
    def replicated(self) -> bool:
        """Whether anything was trained with several seeds."""
        return replicated_anywhere(self.entries)

    @property
    def interval_head(self) -> str:
        return SEEDS_HEAD if self.replicated else INTERVAL_HEAD

    def of(self, cell: str, prompt_set: str) -> tuple[PointSummary, ...]:
        return tuple(point for point in self.points if point.cell == cell and point.prompt_set == prompt_set)

    def path(self, entry: str, prompt_set: str) -> tuple[PointSummary, ...]:
        return tuple(point for point in self.entry_points if point.cell == entry and point.prompt_set == prompt_set)

    def crossings(self, cell: str, prompt_set: str) -> tuple[AtKl, ...]:
        """By ascending KL level; empty where the cell has no points."""
        return tuple(row for row in self.at_kl if row.cell == cell and row.prompt_set == prompt_set)

    def seed_crossings(self, entry: str, prompt_set: str) -> tuple[EntryAtKl, ...]:
        """By ascending KL level; empty where no cell of the entry has points."""
        return tuple(row for row in self.entries_at_kl if row.entry == entry and row.prompt_set == prompt_set)

    def best(self, prompt_set: str) -> tuple[BestOfN, ...]:
        """The reference's best of n, by ascending n."""
        return tuple(row for row in self.best_of_n if row.prompt_set == prompt_set)

    def last(self, prompt_set: str) -> tuple[PointSummary, ...]:
        """The last point of the reference and of every entry that has one."""
        return tuple({point.cell: point for point in self.entry_points if point.prompt_set == prompt_set}.values())


def summarize(comparison: Comparison, bootstrap: Bootstrap | None = None) -> Summary:
    """Every estimate of the report. Equal comparisons give equal summaries."""
    bootstrap = bootstrap or Bootstrap()
    entries = entries_of(comparison.cells)
    parts = [_summarize_set(comparison, entries, index, bootstrap) for index in range(len(comparison.reference))]
    best = tuple(row for reference in comparison.reference for row in best_of_n(reference, bootstrap))
    cells = [REFERENCE, BASELINE, *(cell.id for cell in comparison.cells)]
    rows = [REFERENCE, BASELINE, *(entry.id for entry in entries)]
    return Summary(
        bootstrap=bootstrap,
        entries=entries,
        points=_in_order([point for part in parts for point in part.points], cells),
        entry_points=_in_order([point for part in parts for point in part.entry_points], rows),
        at_kl=tuple(row for part in parts for row in part.at_kl),
        entries_at_kl=tuple(row for part in parts for row in part.entries_at_kl),
        differences=parts[0].differences,
        chosen=tuple(row for part in parts for row in part.chosen),
        answers=tuple(_answers(comparison)),
        best_of_n=best,
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
    """Of the draws of seeds: the entry's place."""
    step: int
    runs: tuple[Columns, ...]
    of_seeds: int

    def matrix(self, key: Key) -> Matrix:
        """[S, P]"""
        return np.stack([run.values[key] for run in self.runs])


def _summarize_set(comparison: Comparison, entries: Sequence[Entry], index: int, bootstrap: Bootstrap) -> SetSummary:
    reference = comparison.reference[index]
    baseline = comparison.baseline.points[index] if comparison.baseline else reference
    prompts = comparison.prompt_sets[index]
    scorers, estimator = [scorer.name for scorer in comparison.scorers], comparison.kl_estimators[0].name

    def of(cell: str, point: EvaluationPoint) -> Columns:
        return columns(cell, point, reference=reference, baseline=baseline)

    start = Row(id=REFERENCE, stream=0, step=reference.step, runs=(of(REFERENCE, reference),), of_seeds=1)
    others = [start]
    if comparison.baseline:
        others.append(Row(id=BASELINE, stream=0, step=baseline.step, runs=(of(BASELINE, baseline),), of_seeds=1))
    runs = {
        cell.id: [of(cell.id, point) for point in cell.points if point.prompt_set == prompts.name]
        for cell in comparison.cells
    }
    rows = [row for place, entry in enumerate(entries) for row in _rows(entry, place, runs)]
    cell_rows = [
        Row(id=run.cell, stream=0, step=run.step, runs=(run,), of_seeds=1) for path in runs.values() for run in path
    ]

    def summarized(rows: Sequence[Row]) -> list[PointSummary]:
        points = [_point(prompts.name, row, bootstrap) for row in rows]
        return _mark_front(points, rows, scorers=scorers, estimator=estimator, bootstrap=bootstrap)

    points = summarized([*others, *cell_rows])
    entry_points = points if all(entry.num_seeds == 1 for entry in entries) else summarized([*others, *rows])
    paths = {cell.id: [points[0], *(point for point in points if point.cell == cell.id)] for cell in comparison.cells}
    at_kl = [
        AtKl(
            cell=cell,
            prompt_set=prompts.name,
            level=level,
            crossings={name: score_at_kl(_frontier_points(estimator, path, name), level) for name in scorers},
        )
        for cell, path in paths.items()
        if len(path) > 1
        for level in sorted(comparison.text.kl_levels)
    ]
    return SetSummary(
        points=points,
        entry_points=entry_points,
        at_kl=at_kl,
        entries_at_kl=list(_entries_at_kl(entries, at_kl, scorers)),
        differences=differences(_contenders(rows, scorers, bootstrap), bootstrap),
        chosen=list(_chosen(prompts, rows, scorers, estimator, bootstrap)),
    )


def _rows(entry: Entry, stream: int, runs: Mapping[str, Sequence[Columns]]) -> Iterator[Row]:
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
    return [
        Contender(
            entry=row.id,
            scorer=name,
            step=row.step,
            replicated=replicated(row.matrix(("scores", name)), bootstrap, stream=row.stream),
        )
        for name in scorers
        for row in _last(rows)
        if len(row.runs) > 1
    ]


def _entries_at_kl(entries: Sequence[Entry], at_kl: Sequence[AtKl], scorers: Sequence[str]) -> Iterator[EntryAtKl]:
    found = {(row.cell, row.level): row for row in at_kl}
    for entry in entries:
        cells = [cell.id for cell in entry.cells]
        for level in dict.fromkeys(row.level for row in at_kl if row.cell in cells):
            rows = [found.get((cell, level)) for cell in cells]

            def crossings(name: str, rows: Sequence[AtKl | None] = rows) -> SeedCrossings:
                return seed_crossings([row.crossings[name] if row else None for row in rows])

            yield EntryAtKl(
                entry=entry.id,
                prompt_set=at_kl[0].prompt_set,
                level=level,
                crossings={
                    name: seed_crossings([row.crossings[name] if row else None for row in rows]) for name in scorers
                },
            )


def _chosen(
    prompts: PromptSet, rows: Sequence[Row], scorers: Sequence[str], estimator: str, bootstrap: Bootstrap
) -> Iterator[Chosen]:
    """Of entries with several checkpoints, where both halves have prompts."""
    select, report = (in_half(prompts.prompts, half) for half in ("select", "report"))
    if not select.any() or not report.any():
        return
    for entry in dict.fromkeys(row.id for row in rows):
        path = [row for row in rows if row.id == entry]
        means = [_mean_of(row.matrix(("scores", scorers[0]))[:, select]) for row in path]
        if len(path) < 2 or all(math.isnan(mean) for mean in means):
            continue
        row = path[max(range(len(path)), key=lambda index: (not math.isnan(means[index]), means[index]))]

        def measured(kind: str, name: str, row: Row = row) -> Estimate:
            return two_level(row.matrix((kind, name))[:, report], bootstrap, stream=row.stream)

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


def _answers(comparison: Comparison) -> Iterator[AnswersSummary]:
    baseline = [(BASELINE, comparison.baseline.points)] if comparison.baseline else []
    cells = [(cell.id, cell.points) for cell in comparison.cells]
    for cell, points in ((REFERENCE, comparison.reference), *baseline, *cells):
        found: dict[tuple[str, str], list[Answers]] = {}
        for answers in (answers for point in points for answers in point.answers):
            found.setdefault((answers.role, answers.name), []).append(answers)
        for (role, name), parts in found.items():
            sums = {key: sum(getattr(part, key) for part in parts) for key in COUNTS}
            problem = next((part.problem for part in parts if part.problem), "")
            yield AnswersSummary(cell=cell, role=role, name=name, problem=problem, **sums)


def _point(prompt_set: str, row: Row, bootstrap: Bootstrap) -> PointSummary:
    found: dict[str, dict[str, Estimate]] = {kind: {} for kind in KINDS}
    for kind, name in row.runs[0].values:
        found[kind][name] = two_level(row.matrix((kind, name)), bootstrap, stream=row.stream)
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
    return [
        replace(
            point,
            on_front=tuple(name for name, members in fronts.items() if members[index]),
            front_frequency={name: share[index] for name, share in shares.items()},
        )
        for index, point in enumerate(points)
    ]
