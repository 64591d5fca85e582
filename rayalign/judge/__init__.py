"""Candidates → numbers (:class:`~rayalign.judge.base.Scorer`) or verdicts (:class:`~rayalign.judge.base.Judge`)."""

from __future__ import annotations

from typing import Any

from rayalign.errors import UserError
from rayalign.imports import load_object
from rayalign.judge.base import Judge, Scorer

__all__ = ["Judge", "Scorer", "make_judge", "make_scorer"]

_SCORERS = {
    "llm": "rayalign.judge.llm:LlmScorer",
    "reward_model": "rayalign.judge.reward_model:RewardModelScorer",
    "rule": "rayalign.judge.rule:RuleScorer",
}


def make_scorer(name: str, **parameters: Any) -> Scorer:
    """The scorer of a ``scorer:`` block: its name and its other keys.

    Raises:
        UserError: no scorer has that name, or what it names is not there.
    """
    if name not in _SCORERS:
        raise UserError(f"scorer.name: no scorer is called {name!r}; there is {', '.join(sorted(_SCORERS))}")
    scorer: Scorer = load_object(_SCORERS[name])(**parameters)
    return scorer


def make_judge(name: str, **parameters: Any) -> Judge:
    """The judge of an ``evaluate.judge`` block: a model that compares two replies, or a scorer that scores both.

    Raises:
        UserError: no judge has that name, or what it names is not there.
    """
    if name == "llm":
        judge: Judge = load_object("rayalign.judge.llm:LlmJudge")(**parameters)
        return judge
    scorer = make_scorer(name, **parameters)
    scored: Judge = load_object("rayalign.judge.scored:ScorerJudge")(scorer)
    return scored
