"""Two halves of a prompt set: what is chosen on one is reported on the other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Half = Literal["select", "report"]


def half_of(prompt: str) -> Half:
    """By the prompt's text alone, so that a prompt is in the same half of every file, run and version."""
    return "select" if hashlib.sha256(prompt.encode()).digest()[0] % 2 == 0 else "report"


def in_half(prompts: Sequence[str], half: Half) -> NDArray[np.bool_]:
    """[P] True where the prompt is in ``half``."""
    return np.array([half_of(prompt) == half for prompt in prompts], dtype=np.bool_)
