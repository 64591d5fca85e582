"""Any scorer as a judge: the reply with the higher score is the better one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rayalign.data.schema import Turns
from rayalign.judge.base import NoVerdict, Scorer, Tally, refuse_missing_verdicts


class ScorerJudge:
    """Compares two scores; equal ones tie."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.tally = Tally()
        self.remarks = getattr(scorer, "remarks", None)

    def compare(self, prompts: Sequence[str | Turns], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """See :class:`rayalign.judge.base.Judge`; a pair has no verdict unless both replies have a score."""
        reason = ""
        try:
            scores = self.scorer.score([*prompts, *prompts], [*first, *second])
        except NoVerdict as problem:
            scores, reason = list(problem.values), str(problem)
        here, there = scores[: len(first)], scores[len(first) :]
        values = [compare_scores(one, other) for one, other in zip(here, there, strict=True)]
        self.tally.add(calls=len(scores), failures=sum(map(math.isnan, scores)), ties=values.count(0.5))
        return refuse_missing_verdicts(values, reason)


def compare_scores(one: float, other: float) -> float:
    """1, ½ or 0; NaN where a score is missing."""
    if math.isnan(one) or math.isnan(other):
        return math.nan
    return 0.5 if one == other else float(one > other)
