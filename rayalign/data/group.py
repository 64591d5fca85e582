"""A prompt group: one prompt and its K candidates as token ids. The only unit of data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
TokenMask = NDArray[np.bool_]
Column = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One answer: its token ids and which of them are predicted.

    A later user or tool turn inside a candidate is seen but not predicted: its mask is False. A finished response ends
    in exactly one end token, which is predicted; a truncated one has none.
    """

    ids: TokenIds
    mask: TokenMask
    finished: bool = True

    @property
    def num_predicted(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One prompt and its candidates; for pairs ``candidates[0]`` is chosen and ``candidates[1]`` rejected.

    ``per_candidate`` holds float32 [K] (NaN = missing); ``per_token`` holds float32 over the predicted tokens of all
    candidates, one candidate after the other.
    """

    prompt_ids: TokenIds
    candidates: tuple[Candidate, ...]
    per_candidate: Mapping[str, Column] = field(default_factory=dict)
    per_token: Mapping[str, Column] = field(default_factory=dict)
    source: str = ""
    """The file that the group came from, as the user named it."""
    line: int = 0
    """1-based line in that file (row in a Parquet file or dataset)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLengths:
    """All that the plan needs to know of a group: numbers of tokens."""

    prompt: int
    candidates: tuple[int, ...]
    predicted: tuple[int, ...]

    @property
    def packed(self) -> int:
        """Tokens of the group in one row: the prompt once and every candidate."""
        return self.prompt + sum(self.candidates)

    @property
    def concatenated(self) -> int:
        """Tokens of the group when every candidate carries its own prompt."""
        return self.prompt * len(self.candidates) + sum(self.candidates)


def check_group(group: Group) -> None:
    """Raises ValueError, naming source and line, where something is empty or a column has the wrong length.

    A prompt alone, without candidates, is a group that can be stored.
    """
    where = f"{group.source}:{group.line}"
    if len(group.prompt_ids) == 0:
        raise ValueError(f"{where}: the prompt has no token, so nothing predicts the first response token")
    predicted = [candidate.num_predicted for candidate in group.candidates]
    if 0 in predicted:
        raise ValueError(f"{where}: candidate {predicted.index(0)} has no predicted token")
    for expected, columns in ((len(predicted), group.per_candidate), (sum(predicted), group.per_token)):
        for name, column in columns.items():
            if len(column) != expected:
                raise ValueError(f"{where}: column {name!r} has {len(column)} values, not {expected}")
