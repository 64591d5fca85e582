"""What turns candidates into numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rayalign.data.schema import Turns
from rayalign.errors import UserError


class ScorerUnusable(UserError):
    """The scorer can score nothing at all; any other error is about the prompts that it was given."""


class Scorer(Protocol):
    """Candidates → numbers, higher is better."""

    def score(self, prompts: Sequence[str | Turns], replies: Sequence[str]) -> list[float]:
        """One finite number for each prompt and its reply, in order; a prompt with K replies comes K times.

        A prompt is a text, or the turns of a conversation.
        """
        ...
