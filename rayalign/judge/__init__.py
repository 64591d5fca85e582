"""Candidates → numbers (:class:`~rayalign.judge.base.Scorer`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rayalign.errors import UserError
from rayalign.judge.base import Scorer
from rayalign.judge.rule import RuleScorer

__all__ = ["Scorer", "make_scorer"]

_SCORERS: Mapping[str, Callable[..., Scorer]] = {"rule": RuleScorer}


def make_scorer(name: str, **parameters: Any) -> Scorer:
    """The scorer of a ``scorer:`` block: its name and its other keys.

    Raises:
        UserError: no scorer has that name.
    """
    if name not in _SCORERS:
        raise UserError(f"scorer.name: no scorer is called {name!r}; there is {', '.join(sorted(_SCORERS))}")
    return _SCORERS[name](**parameters)
