"""Candidates → numbers (:class:`~rayalign.judge.base.Scorer`) or verdicts (:class:`~rayalign.judge.base.Judge`)."""

from __future__ import annotations

from typing import Any

from rayalign.config.scoring import ScorerConfig
from rayalign.errors import UserError
from rayalign.imports import load_object
from rayalign.judge.base import Judge, Scorer

__all__ = ["Judge", "Scorer", "judge_of", "make_judge", "make_scorer", "parameters_of", "scorer_of"]

_SCORERS = {
    "llm": "rayalign.judge.llm:LlmScorer",
    "reward_model": "rayalign.judge.reward_model:RewardModelScorer",
    "rule": "rayalign.judge.rule:RuleScorer",
}


def scorer_of(config: ScorerConfig) -> Scorer:
    """The scorer that a ``scorer`` block describes; raises UserError where what it names is not there."""
    return make_scorer(config.name, **scorer_parameters(config))


def judge_of(config: ScorerConfig) -> Judge:
    """The judge that an ``evaluate.judge`` block describes; raises UserError where what it names is not there."""
    return make_judge(config.name, **scorer_parameters(config))


def scorer_parameters(config: ScorerConfig) -> dict[str, Any]:
    """What a scorer is made with: its block, without its name and what reports say of it."""
    return config.model_dump(exclude={"name", "unit", "description"})


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
