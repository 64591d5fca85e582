"""What turns candidates into numbers (:class:`Scorer`) or into verdicts (:class:`Judge`)."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rayalign.data.schema import Turns
from rayalign.errors import UserError


class ScorerUnusable(UserError):
    """The scorer or judge can answer nothing at all; any other error is about the prompts that it was given."""


class NoVerdict(Exception):
    """Some of what was asked got no answer, however often it was asked; the message says why of the first.

    ``values`` are all answers in order, NaN where there is none, so that the others need not be asked for again.
    """

    def __init__(self, reason: str, values: Sequence[float] = ()) -> None:
        super().__init__(reason)
        self.values = tuple(values)


class Scorer(Protocol):
    """Candidates → numbers, higher is better."""

    def score(self, prompts: Sequence[str | Turns], replies: Sequence[str]) -> list[float]:
        """One finite number for each prompt and its reply, in order; a prompt with K replies comes K times.

        A prompt is a text, or the turns of a conversation.

        Raises:
            NoVerdict: some replies could not be scored.
        """
        ...


class Judge(Protocol):
    """Two replies to one prompt → a verdict."""

    def compare(self, prompts: Sequence[str | Turns], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """For each prompt, how much better its first reply is than its second: 1, 0, ½ for a tie, or between them.

        Whatever the order in which replies are shown does to a verdict is the judge's to cancel: swapping ``first``
        and ``second`` turns v into 1 − v.

        Raises:
            NoVerdict: some pairs could not be judged.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What answers have cost, and how they came about."""

    calls: int = 0
    """Questions put to a model, or replies scored."""
    failures: int = 0
    """Calls that gave no answer that can be read."""
    ties: int = 0
    """Verdicts that call two replies equally good, those between equal texts included."""
    disagreements: int = 0
    """Verdicts that turned with the order of the replies, and so count as a half."""

    def __add__(self, other: Asked) -> Asked:
        return Asked(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    def __sub__(self, other: Asked) -> Asked:
        return Asked(**{name: getattr(self, name) - getattr(other, name) for name in self.__slots__})


class Tally:
    """Counts what a scorer or judge was asked, in its attribute ``tally``; exact from several threads too."""

    def __init__(self) -> None:
        self._asked = Asked()
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        with self._lock:
            self._asked += Asked(**counts)

    @property
    def asked(self) -> Asked:
        """Everything so far."""
        return self._asked


def refuse_missing_verdicts(values: Sequence[float], reason: str) -> list[float]:
    """``values`` as they are; raises NoVerdict where one is NaN."""
    if any(map(math.isnan, values)):
        raise NoVerdict(reason, values)
    return list(values)
