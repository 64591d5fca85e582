"""A scorer and a judge whose answers are written down beforehand. For tests of what consumes scores and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rayalign.data.schema import Turns
from rayalign.judge.base import Tally, refuse_missing_verdicts
from rayalign.judge.scored import ScorerJudge


class FakeScorer:
    """Scores replies by a table; a reply that is not in it has no score, as when an endpoint does not answer.

    ``seen`` lists every (prompt, reply) that was asked for.
    """

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.scores = dict(scores)
        self.seen: list[tuple[str | Turns, str]] = []
        self.tally = Tally()

    def score(self, prompts: Sequence[str | Turns], replies: Sequence[str]) -> list[float]:
        """See :class:`rayalign.judge.base.Scorer`."""
        self.seen += zip(prompts, replies, strict=True)
        values = [self.scores.get(reply, math.nan) for reply in replies]
        self.tally.add(calls=len(values), failures=sum(map(math.isnan, values)))
        return refuse_missing_verdicts(values, "the table has no such reply")


class FakeJudge:
    """Prefers the reply that stands higher in a table of scores; equal scores tie, an unknown reply has no verdict."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.judge = ScorerJudge(FakeScorer(scores))
        self.tally = self.judge.tally

    def compare(self, prompts: Sequence[str | Turns], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """See :class:`rayalign.judge.base.Judge`."""
        return self.judge.compare(prompts, first, second)
