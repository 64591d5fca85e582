"""What KTO learns from: pairs as single labelled answers, and the mismatched completions of its KL estimate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from rayalign.data.group import Group
from rayalign.data.schema import MISSING
from rayalign.errors import UserError

_OF_THE_PAIR = frozenset({"margin", "soft_label"})


class Groups(Protocol):
    """An indexable sequence of groups, such as a token store."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Group: ...


def unpair(group: Group) -> tuple[Group, Group]:
    """A pair as two labelled answers: chosen with label 1, rejected with label 0.

    Columns that speak of the pair as a whole (margin, soft label) are left out. Raises :class:`UserError` where the
    group is no pair.
    """
    if len(group.candidates) != 2:
        found = f"{len(group.candidates)} candidates"
        raise UserError(f"{group.source}:{group.line}: a pair has a chosen and a rejected answer, not {found}")
    return _single(group, 0, label=1.0), _single(group, 1, label=0.0)


@dataclass(frozen=True, slots=True)
class Mismatched:
    """Every labelled answer with another prompt's completion as candidate 1, on which KTO estimates its KL.

    The completion is that of the next group, cyclically, whose prompt is different; where every prompt is the same,
    that of the next group. Its numbers are missing: they were of another prompt. A view: it reads the groups beneath
    it on demand and depends on their order alone, so that every worker sees the same, however many there are.
    """

    groups: Groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int, /) -> Group:
        index = range(len(self))[index]
        group = self.groups[index]
        if len(group.candidates) != 1:
            found = f"{len(group.candidates)} candidates"
            raise UserError(f"{group.source}:{group.line}: a labelled answer stands alone, but here are {found}")
        completion = self._other(index, group).candidates[0]
        missing = np.full(completion.num_predicted, MISSING, dtype=np.float32)
        return replace(
            group,
            candidates=(*group.candidates, completion),
            per_candidate={
                name: np.append(values, np.float32(MISSING)) for name, values in group.per_candidate.items()
            },
            per_token={name: np.concatenate([values, missing]) for name, values in group.per_token.items()},
        )

    def _other(self, index: int, group: Group) -> Group:
        for offset in range(1, len(self)):
            other = self.groups[(index + offset) % len(self)]
            if not np.array_equal(other.prompt_ids, group.prompt_ids):
                return other
        return self.groups[(index + 1) % len(self)]


def _single(group: Group, candidate: int, *, label: float) -> Group:
    starts = np.cumsum([0, *(answer.num_predicted for answer in group.candidates)])
    tokens = slice(starts[candidate], starts[candidate + 1])
    columns = {
        name: values[candidate : candidate + 1]
        for name, values in group.per_candidate.items()
        if name not in _OF_THE_PAIR
    }
    return replace(
        group,
        candidates=(group.candidates[candidate],),
        per_candidate={**columns, "label": np.array([label], dtype=np.float32)},
        per_token={name: values[tokens] for name, values in group.per_token.items()},
    )
