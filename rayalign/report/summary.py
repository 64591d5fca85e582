"""What the report says about every checkpoint, before it is laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rayalign.report.best_of_n import BestOfN
from rayalign.report.differences import EntryDifference
from rayalign.report.entries import ReportEntry, replicated_anywhere
from rayalign.report.frontier import (
    Crossing,
    SeedCrossings,
)
from rayalign.report.matrix import Contest
from rayalign.report.statistics import INTERVAL_HEAD, SEEDS_HEAD, Bootstrap, Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSummary:
    """The estimates of one policy at one step on one prompt set; mappings are keyed by measure name."""

    cell: str
    """A cell's or entry's id, ``reference`` or ``(baseline)``."""
    prompt_set: str
    step: int
    num_samples: int
    """Samples per prompt; every estimate has the number of prompts."""
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
    """By scorer: the share of the resamples in which the point is on the front."""


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
    entries: tuple[ReportEntry, ...]
    """In the order of their first cells."""
    points: tuple[PointSummary, ...]
    """Points of every run: reference, baseline if any, then the cells in order; prompt sets in order; steps ascending.
    """
    entry_points: tuple[PointSummary, ...]
    """The same with entries for cells; their intervals are over seeds and prompts where there are several seeds."""
    at_kl: tuple[AtKl, ...]
    entries_at_kl: tuple[EntryAtKl, ...]
    differences: tuple[EntryDifference, ...]
    """Comparisons of entries with several seeds, on the first prompt set."""
    chosen: tuple[Chosen, ...]
    answers: tuple[AnswersSummary, ...]
    """In the order of the points; of scorers and judges that count what they are asked."""
    best_of_n: tuple[BestOfN, ...]
    """Rows of the reference: prompt sets in order, n ascending."""
    contests: tuple[Contest, ...] = ()
    """One contest per ordered pair and scorer."""

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
