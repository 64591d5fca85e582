"""What KTO learns from: pairs as single labelled answers, and the mismatched completions of its KL estimate."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rayalign.data.group import Group
from rayalign.data.schema import MISSING
from rayalign.data.store import TokenStore
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


class Mismatched:
    """Every labelled answer with another prompt's completion as candidate 1, on which KTO estimates its KL.

    The completions change places, so that the mismatched set is the set of the answers themselves: see
    :func:`other_prompts`. Their numbers are missing: they were of another prompt. A view that reads the groups beneath
    it on demand and depends on their order alone, so that every worker sees the same, however many there are. An answer
    without a label gives and gets no completion.

    Args:
        groups: labelled answers.
        partners: what :func:`other_prompts` says of them; None: it is asked.
    """

    def __init__(self, groups: Groups, partners: NDArray[np.int64] | None = None) -> None:
        self.groups = groups
        self.partners = partners_of(groups) if partners is None else partners

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int, /) -> Group:
        index = range(len(self))[index]
        group, partner = self.groups[index], int(self.partners[index])
        if partner < 0:
            return group
        completion = self.groups[partner].candidates[0]
        missing = np.full(completion.num_predicted, MISSING, dtype=np.float32)
        return replace(
            group,
            candidates=(*group.candidates, completion),
            per_candidate={
                name: np.append(values, np.float32(MISSING)) for name, values in group.per_candidate.items()
            },
            per_token={name: np.concatenate([values, missing]) for name, values in group.per_token.items()},
        )


def partners_of(groups: Groups) -> NDArray[np.int64]:
    """:func:`other_prompts` of labelled answers; raises UserError where a group is none."""
    every = [groups[index] for index in range(len(groups))]
    labels = [group.per_candidate.get("label", [MISSING])[0] for group in every]
    return other_prompts(numbered(map(_own_prompt, every), len(every)), np.array(labels, np.float64))


def partners_in(store: TokenStore) -> NDArray[np.int64]:
    """The same of a store, whose groups are not read for it one by one."""
    for piece in store.index.pieces():
        if (piece.num_candidates != 1).any():
            _own_prompt(store[piece.first + int((piece.num_candidates != 1).argmax())])
    labels = [np.full(0, MISSING), *(values for _, values in store.column("label"))]
    return other_prompts(numbered(store.prompts(), len(store)), np.concatenate(labels).astype(np.float64))


def numbered(prompts: Iterable[bytes], count: int) -> NDArray[np.int64]:
    """[count] a number for each distinct prompt, in the order of their first places."""
    known: dict[bytes, int] = {}
    digests = (hashlib.blake2b(prompt, digest_size=16).digest() for prompt in prompts)
    return np.fromiter((known.setdefault(digest, len(known)) for digest in digests), np.int64, count)


def other_prompts(prompt_of: NDArray[np.int64], labels: NDArray[np.floating]) -> NDArray[np.int64]:
    """For each answer the one whose completion is set beside its prompt; -1 for none.

    Each labelled answer is taken once. Desirable ones change places among themselves, and so do undesirable ones, so
    that any batch has as many desirable completions among the mismatched as among its own; where one of the two kinds
    has a single prompt, all change places together. Among those who change places a completion comes from another
    prompt as far as that is possible: where more than half answer one prompt, the surplus get other completions of that
    prompt, and where every prompt is the same, all do. A lone answer gets none. Takes O(n log n) steps whatever the
    prompts are.

    Args:
        prompt_of: [n] a number for each distinct prompt.
        labels: [n] above 0.5 is desirable; NaN is no label.
    """
    partners = np.full(len(prompt_of), -1, np.int64)
    desirable = labels > 0.5
    kinds = [np.flatnonzero(desirable), np.flatnonzero(~desirable & ~np.isnan(labels))]
    if any(len(kind) and (prompt_of[kind] == prompt_of[kind[0]]).all() for kind in kinds):
        kinds = [np.flatnonzero(~np.isnan(labels))]
    for kind in kinds:
        if len(kind) < 2:
            continue
        ordered = kind[np.argsort(prompt_of[kind], kind="stable")]
        # Answers to one prompt stand side by side: a shift by the longest such run leaves every run.
        longest = int(np.unique(prompt_of[kind], return_counts=True)[1].max())
        partners[ordered] = np.roll(ordered, -(longest if longest < len(kind) else 1))
    return partners


def _own_prompt(group: Group) -> bytes:
    if len(group.candidates) != 1:
        found = f"{len(group.candidates)} candidates"
        raise UserError(f"{group.source}:{group.line}: a labelled answer stands alone, but here are {found}")
    return group.prompt_ids.tobytes()


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
