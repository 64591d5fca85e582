"""Points to estimates: what the report says about every checkpoint, before it is laid out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rayalign.report.best_of_n import BestOfN, best_of_n
from rayalign.report.frontier import Crossing, FrontierPoint, pareto, score_at_kl
from rayalign.report.points import (
    BASELINE,
    REFERENCE,
    Answers,
    Cell,
    Comparison,
    EvaluationPoint,
    Samples,
    as_array,
)
from rayalign.report.statistics import Bootstrap, Estimate, Vector, estimate, paired_change, prompt_means
from rayalign.report.winrate import win_shares

COUNTS = ("replies", "missing", "calls", "failures", "ties", "disagreements")


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSummary:
    """The estimates of one policy at one step on one prompt set; mappings are keyed by measure name."""

    cell: str
    """A cell's id, ``reference`` or ``(baseline)``."""
    prompt_set: str
    step: int
    num_samples: int
    """Samples per prompt; the number of prompts stands in every estimate."""
    scores: Mapping[str, Estimate]
    changes: Mapping[str, Estimate]
    """Score minus the reference's, paired by prompt."""
    win_rates: Mapping[str, Estimate]
    """By scorer, over all pairings of a prompt's samples with the baseline's."""
    judged: Estimate | None
    """The judge's win rate, over samples of equal number; None: there is no judge."""
    kl: Mapping[str, Estimate]
    diagnostics: Mapping[str, Estimate]
    length: Estimate
    cut: Estimate
    """Share of replies cut at the token limit."""
    on_front: tuple[str, ...] = ()
    """Scorers under which no other point of the prompt set dominates this one (point estimates)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtKl:
    """A cell's scores at a KL level, by scorer; ``None`` where the cell's checkpoints do not bracket the level."""

    cell: str
    prompt_set: str
    level: float
    crossings: Mapping[str, Crossing | None]


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
    points: tuple[PointSummary, ...]
    """The reference, a baseline if any, then the cells in order; prompt sets in order; steps ascending."""
    at_kl: tuple[AtKl, ...]
    answers: tuple[AnswersSummary, ...]
    """In the order of the points; of scorers and judges that count what they are asked."""
    best_of_n: tuple[BestOfN, ...]
    """Of the reference: prompt sets in order, n ascending."""

    def of(self, cell: str, prompt_set: str) -> tuple[PointSummary, ...]:
        return tuple(point for point in self.points if point.cell == cell and point.prompt_set == prompt_set)

    def crossings(self, cell: str, prompt_set: str) -> tuple[AtKl, ...]:
        """By ascending KL level; empty where the cell has no points."""
        return tuple(row for row in self.at_kl if row.cell == cell and row.prompt_set == prompt_set)

    def best(self, prompt_set: str) -> tuple[BestOfN, ...]:
        """The reference's best of n, by ascending n."""
        return tuple(row for row in self.best_of_n if row.prompt_set == prompt_set)

    def last(self, prompt_set: str) -> tuple[PointSummary, ...]:
        """The last point of the reference and of every cell that has one."""
        return tuple({point.cell: point for point in self.points if point.prompt_set == prompt_set}.values())


def summarize(comparison: Comparison, bootstrap: Bootstrap | None = None) -> Summary:
    """Every estimate of the report. Equal comparisons give equal summaries."""
    bootstrap = bootstrap or Bootstrap()
    points: list[PointSummary] = []
    at_kl: list[AtKl] = []
    for index, reference in enumerate(comparison.reference):
        against = Against(
            reference=reference,
            baseline=comparison.baseline.points[index] if comparison.baseline else reference,
            bootstrap=bootstrap,
        )
        start = _summarize_point(REFERENCE, reference, against)
        others = [_summarize_point(BASELINE, against.baseline, against)] if comparison.baseline else []
        paths = [_summarize_path(cell, against) for cell in comparison.cells]
        points += _mark_front(comparison, [start, *others, *(point for path in paths for point in path)])
        at_kl += [
            _at_kl(comparison, [start, *path], level)
            for path in paths
            if path
            for level in sorted(comparison.text.kl_levels)
        ]
    order = {name: index for index, name in enumerate([REFERENCE, BASELINE, *(cell.id for cell in comparison.cells)])}
    points.sort(key=lambda point: order[point.cell])
    best = tuple(row for reference in comparison.reference for row in best_of_n(reference, bootstrap))
    return Summary(
        bootstrap=bootstrap,
        points=tuple(points),
        at_kl=tuple(at_kl),
        answers=tuple(_answers(comparison)),
        best_of_n=best,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """What the points of one prompt set are held against."""

    reference: EvaluationPoint
    """Of changes."""
    baseline: EvaluationPoint
    """Of wins; the reference unless the comparison names another."""
    bootstrap: Bootstrap


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


def _summarize_path(cell: Cell, against: Against) -> list[PointSummary]:
    return [
        _summarize_point(cell.id, point, against)
        for point in cell.points
        if point.prompt_set == against.reference.prompt_set
    ]


def _summarize_point(cell: str, point: EvaluationPoint, against: Against) -> PointSummary:
    reference, baseline, bootstrap = against.reference, against.baseline, against.bootstrap

    def per_prompt(samples: Samples) -> Vector:
        return prompt_means(as_array(samples))

    def means(columns: Mapping[str, Samples]) -> dict[str, Estimate]:
        return {name: estimate(per_prompt(samples), bootstrap) for name, samples in columns.items()}

    return PointSummary(
        cell=cell,
        prompt_set=point.prompt_set,
        step=point.step,
        num_samples=len(point.length[0]),
        scores=means(point.scores),
        changes={
            name: paired_change(per_prompt(samples), per_prompt(reference.scores[name]), bootstrap)
            for name, samples in point.scores.items()
        },
        win_rates={
            name: estimate(win_shares(as_array(samples), as_array(baseline.scores[name])), bootstrap)
            for name, samples in point.scores.items()
        },
        judged=None if point.verdicts is None else estimate(per_prompt(point.verdicts), bootstrap),
        kl=means(point.kl),
        diagnostics=means(point.diagnostics),
        length=estimate(per_prompt(point.length), bootstrap),
        cut=estimate(1 - per_prompt(point.finished), bootstrap),
    )


def _frontier_points(comparison: Comparison, points: Sequence[PointSummary], scorer: str) -> list[FrontierPoint]:
    estimator = comparison.kl_estimators[0].name
    return [
        FrontierPoint(step=point.step, kl=point.kl[estimator].mean, score=point.scores[scorer].mean) for point in points
    ]


def _mark_front(comparison: Comparison, points: Sequence[PointSummary]) -> list[PointSummary]:
    fronts = {scorer.name: pareto(_frontier_points(comparison, points, scorer.name)) for scorer in comparison.scorers}
    return [
        replace(point, on_front=tuple(name for name, members in fronts.items() if members[index]))
        for index, point in enumerate(points)
    ]


def _at_kl(comparison: Comparison, path: Sequence[PointSummary], level: float) -> AtKl:
    return AtKl(
        cell=path[-1].cell,
        prompt_set=path[-1].prompt_set,
        level=level,
        crossings={
            scorer.name: score_at_kl(_frontier_points(comparison, path, scorer.name), level)
            for scorer in comparison.scorers
        },
    )
