"""What turns candidates into numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Scorer(Protocol):
    """Candidates → numbers, higher is better."""

    def score(self, prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
        """One finite number for each prompt and its reply, in order; a prompt with K replies comes K times."""
        ...
