"""A scorer that is a Python function of the user's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from rayalign.data.schema import Turns
from rayalign.data.shared_prompt import prompt_text
from rayalign.errors import UserError
from rayalign.judge.base import NoVerdict, ScorerUnusable
from rayalign.user_function import CallFailed, UserFunction

TIMEOUT_SECONDS = 60.0
MOST_FATAL = 8
"""Prompts in a row whose calls end the function's process: it is the function, and not the prompts."""
EXCERPT = 80


def no_score(prompt: str, reply: str) -> float:
    """Prefer nothing: the scorer of completions that need no scores."""
    return 0.0


class RuleScorer:
    """Calls ``function(prompt, reply, **arguments)`` for every reply, in a process that a call may end.

    Args:
        function: ``my_pkg.rewards:helpful`` or ``path/to/rewards.py:helpful``.
        arguments: keyword arguments for every call.
        timeout_seconds: of one call.

    Raises:
        UserError: there is no such function, it cannot be imported, or it does not take these arguments.
    """

    def __init__(
        self, *, function: str, arguments: Mapping[str, Any] | None = None, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self.name = function
        self.fatal_in_a_row = 0
        try:
            self.function = UserFunction(
                function,
                ("a prompt", "a reply"),
                keywords=arguments or {},
                seconds=timeout_seconds,
                setting="scorer.timeout_seconds",
            )
        except UserError as error:
            raise UserError(f"scorer.function: {error}") from error
        self.remarks = self.function.printed.remarks

    def score(self, prompts: Sequence[str | Turns], replies: Sequence[str]) -> list[float]:
        """The function's numbers; it sees a conversation as a transcript.

        A prompt one of whose replies ends the function's process, or takes too long, is given up with its other
        replies.

        Raises:
            NoVerdict: some calls raised, took too long, ended their process, or returned no finite number.
            ScorerUnusable: calls for many prompts in a row ended their process.
        """
        values, problems = [], []
        fatal: tuple[str | Turns, str] | None = None
        for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            values.append(math.nan)
            if fatal is not None and fatal[0] == prompt:
                problems.append(fatal[1])
                continue
            try:
                found = self.function(prompt_text(prompt), reply)
                self.fatal_in_a_row = 0
                if is_finite_number(found.value):
                    values[-1] = float(found.value)
                else:
                    returned = self._told(f"returned {found.shown}", row, reply)
                    problems.append(f"{returned}: it must return a finite number")
            except CallFailed as failure:
                problems.append(self._told(str(failure), row, reply))
                if failure.fatal:
                    fatal = prompt, problems[-1]
                    self._count_fatal(problems[-1])
            except UserError as error:  # it can be imported no more
                raise ScorerUnusable(f"scorer.function: {error}") from error
        if problems:
            raise NoVerdict(problems[0], values)
        return values

    def _count_fatal(self, problem: str) -> None:
        self.fatal_in_a_row += 1
        if self.fatal_in_a_row >= MOST_FATAL:
            raise ScorerUnusable(f"{problem}; so it went with {MOST_FATAL} prompts in a row")

    def _told(self, what: str, row: int, reply: str) -> str:
        return f"scorer.function: {self.name!r} {what} for row {row} (reply {reply[:EXCERPT]!r})"


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """True for numbers and booleans."""
    return isinstance(value, int | float) and math.isfinite(value)
