"""Which entries differ: pairs of entries with several training seeds, p-values adjusted over all that is shown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rayalign.report.replication import ALPHA, Difference, Replicated, detectable, difference, holm
from rayalign.report.statistics import Bootstrap


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An entry under one scorer at its last step, where two seeds at least were measured."""

    entry: str
    scorer: str
    step: int
    replicated: Replicated


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryDifference:
    """Score of ``entry`` − score of ``other``, each at its last step, on the first prompt set."""

    entry: str
    other: str
    scorer: str
    steps: tuple[int, int]
    seeds: tuple[int, int]
    found: Difference
    adjusted_p: float
    """Holm's, over all differences of the report."""
    detectable: float
    """See :func:`rayalign.report.replication.detectable`."""
    better: str
    """The entry that scores higher where ``adjusted_p`` < 0.05; else empty, which is no finding of equality."""


def entry_differences(contenders: Sequence[Contender], bootstrap: Bootstrap) -> tuple[EntryDifference, ...]:
    """Every pair under every scorer: one family."""
    pairs = [
        (a, b)
        for a, b in itertools.combinations(contenders, 2)
        if a.scorer == b.scorer and not math.isnan(a.replicated.seeds + b.replicated.seeds)
    ]
    found = [difference(a.replicated, b.replicated, bootstrap) for a, b in pairs]
    adjusted = holm([one.p for one in found])
    rows = []
    for (a, b), one, p in zip(pairs, found, adjusted, strict=True):
        better = a.entry if one.mean > 0 else b.entry
        row = EntryDifference(
            entry=a.entry,
            other=b.entry,
            scorer=a.scorer,
            steps=(a.step, b.step),
            seeds=(len(a.replicated.values), len(b.replicated.values)),
            found=one,
            adjusted_p=p,
            detectable=detectable(one, len(pairs)),
            better=better if p < ALPHA else "",
        )
        rows.append(row)
    return tuple(rows)
