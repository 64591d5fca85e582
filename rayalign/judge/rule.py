"""A scorer that is a Python function of the user's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from rayalign.data.schema import Turns
from rayalign.data.split import prompt_text
from rayalign.errors import UserError
from rayalign.imports import load_function


def no_score(prompt: str, reply: str) -> float:
    """Prefers nothing: stands in where completions are wanted without scores."""
    return 0.0


class RuleScorer:
    """Calls ``function(prompt, reply, **arguments)`` for every reply.

    Args:
        function: ``my_pkg.rewards:helpful`` or ``path/to/rewards.py:helpful``.
        arguments: keyword arguments for every call.

    Raises:
        UserError: there is no such function, or it does not take these arguments.
    """

    def __init__(self, *, function: str, arguments: Mapping[str, Any] | None = None) -> None:
        self.name = function
        self.arguments = dict(arguments or {})
        try:
            self.function = load_function(function, "a prompt", "a reply", **self.arguments)
        except UserError as error:
            raise UserError(f"scorer.function: {error}") from error

    def score(self, prompts: Sequence[str | Turns], replies: Sequence[str]) -> list[float]:
        """The function's numbers; it sees a conversation as a transcript.

        Raises:
            UserError: one of them is not a finite number; what the function itself raises is passed on.
        """
        return [
            self._checked(self.function(prompt_text(prompt), reply, **self.arguments), row, reply)
            for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
        ]

    def _checked(self, value: object, row: int, reply: str) -> float:
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
        raise UserError(
            f"scorer.function: {self.name!r} returned {value!r} for row {row} (reply {reply[:80]!r}): "
            "it must return a finite number"
        )
