"""Which tokens are in which row: the arithmetic that the packer and the plan share."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import chain
from typing import Literal, NamedTuple

from rayalign.data.group import GroupLengths

Layout = Literal["packed", "concatenated"]
"""``packed``: a prompt once per row, shared by its candidates there. ``concatenated``: one prompt + candidate a row."""


class RowBlock(NamedTuple):
    """A prompt and the candidates that share it, side by side in one row."""

    group: int
    candidates: tuple[int, ...]
    tokens: int


def arrange(lengths: Sequence[GroupLengths], *, row_tokens: int | None, layout: Layout) -> list[list[RowBlock]]:
    """The blocks of every row.

    ``packed``: a group larger than ``row_tokens`` is spread over rows, each with its own copy of the prompt; two blocks
    of one group never meet in a row. First-fit-decreasing gives the number of rows, which are then evened out so that
    the longest is short. A row is longer than ``row_tokens`` only where a prompt with a single candidate already is,
    since a candidate is never split; ``row_tokens=None`` means one row for everything.

    ``concatenated``: every row is one prompt with one candidate, so that models whose state or bias runs along the row
    (recurrent layers, ALiBi) read it as an ordinary right-padded sequence.
    """
    if layout == "concatenated":
        alone: list[list[RowBlock]] = []
        for group, length in enumerate(lengths):
            for candidate, tokens in enumerate(length.candidates):
                alone.append([RowBlock(group, (candidate,), length.prompt + tokens)])
        return alone
    if row_tokens is None:
        return [[_whole(group, length) for group, length in enumerate(lengths)]]
    room = max(row_tokens, *(length.prompt + max(length.candidates) for length in lengths))
    blocks = list(chain.from_iterable(_spread(group, length, room) for group, length in enumerate(lengths)))
    sizes = [block.tokens for block in blocks]
    rows = _first_fit_decreasing(sizes, room)
    even = _evened(sizes, len(rows))
    candidates = [_chosen(blocks, rows), _chosen(blocks, even)]
    return min(candidates, key=_longest)


def rows_needed(lengths: Sequence[GroupLengths], *, row_tokens: int | None, layout: Layout) -> tuple[int, int]:
    """(R, L) of the micro-batch that :func:`rayalign.data.pack.pack` makes of these groups."""
    return row_shape(arrange(lengths, row_tokens=row_tokens, layout=layout))


def row_shape(rows: Sequence[Sequence[RowBlock]]) -> tuple[int, int]:
    """(R, L): the number of rows and the tokens of the longest one."""
    return len(rows), _longest(rows)


def _longest(rows: Sequence[Sequence[RowBlock]]) -> int:
    """Tokens of the longest row."""
    return max(map(_num_tokens, rows))


def _num_tokens(row: Sequence[RowBlock]) -> int:
    return sum(block.tokens for block in row)


def _chosen(blocks: Sequence[RowBlock], rows: Sequence[Sequence[int]]) -> list[list[RowBlock]]:
    """The rows of blocks that rows of indices name."""
    found = []
    for row in rows:
        found.append([blocks[i] for i in row])
    return found


def _whole(group: int, length: GroupLengths) -> RowBlock:
    return RowBlock(group, tuple(range(len(length.candidates))), length.packed)


def _spread(group: int, length: GroupLengths, room: int) -> list[RowBlock]:
    """One block where the whole group fits, else as many as its candidates need."""
    if length.packed <= room:
        return [_whole(group, length)]
    shares = _first_fit_decreasing(length.candidates, room - length.prompt)
    spread = []
    for share in shares:
        tokens = length.prompt + sum(length.candidates[k] for k in share)
        spread.append(RowBlock(group, tuple(sorted(share)), tokens))
    return spread


def _first_fit_decreasing(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Indices into ``sizes``, binned so that no bin holds more than ``room``."""
    bins: list[list[int]] = []
    free: list[int] = []
    for index in _decreasing(sizes):
        size = sizes[index]
        target = next((b for b, left in enumerate(free) if size <= left), None)
        if target is None:
            bins.append([index])
            free.append(room - size)
        else:
            bins[target].append(index)
            free[target] -= size
    return bins


def _evened(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """The same indices in the same number of bins, each put where least is so far: shorter rows, if they fit."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    least = [(0, b) for b in range(num_bins)]
    for index in _decreasing(sizes):
        load, target = least[0]
        bins[target].append(index)
        heapq.heapreplace(least, (load + sizes[index], target))
    return bins


def _decreasing(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda i: -sizes[i])
