"""From the groups of one step to the micro-batches of every worker, before anything is read or computed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from rayalign.data.group import GroupLengths
from rayalign.data.rows import Layout, rows_needed
from rayalign.data.store import TokenStore
from rayalign.errors import UserError

_BALANCED = 0.02
"""Workers whose bound could be lower by this share are balanced well enough."""


class PlanError(UserError):
    """A group does not fit into a micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """What one step holds over all workers: the denominators of every loss term."""

    pairs: int
    """Groups of at least two candidates."""
    groups: int
    sequences: int
    """Candidates."""
    tokens: int
    """Predicted response tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Groups that one worker packs together."""

    slots: tuple[int, ...]
    """Indices into the step's groups, ascending."""
    dummy: bool = False
    """Computed for company only: its loss counts nothing, and its group is another micro-batch's."""


def count_step(lengths: Sequence[GroupLengths]) -> StepCounts:
    return StepCounts(
        pairs=sum(len(length.candidates) >= 2 for length in lengths),
        groups=len(lengths),
        sequences=sum(len(length.candidates) for length in lengths),
        tokens=sum(sum(length.predicted) for length in lengths),
    )


def plan_step(
    lengths: Sequence[GroupLengths],
    *,
    num_workers: int,
    tokens_per_micro_batch: int,
    row_tokens: int | None,
    layout: Layout,
    describe: Callable[[int], str] = "group {} of the step".format,
) -> tuple[tuple[MicroBatch, ...], ...]:
    """The micro-batches of every worker: each group once, the same number of micro-batches for all.

    Groups are taken in order of length, so that rows of one micro-batch are about equally long. The number of
    micro-batches per worker is the smallest that keeps R · L within ``tokens_per_micro_batch``; for several workers
    the bound is then lowered as far as that number allows, which balances them. What is still missing is filled by
    dummies, each the smallest group of the step, since workers with unequal numbers of micro-batches deadlock in
    collectives.

    Args:
        lengths: the step's groups; none at all gives no micro-batch.
        describe: names the group of a slot in errors, such as its file and line.

    Raises:
        PlanError: one group alone is above ``tokens_per_micro_batch``.
    """

    def cost(slots: Sequence[int]) -> int:
        rows, tokens = rows_needed([lengths[slot] for slot in slots], row_tokens=row_tokens, layout=layout)
        return rows * tokens

    if not lengths:
        return ((),) * num_workers
    alone = {slot: cost([slot]) for slot in range(len(lengths))}
    for slot, tokens in alone.items():
        if tokens > tokens_per_micro_batch:
            raise PlanError(_too_large(describe(slot), tokens, tokens_per_micro_batch))
    by_length = sorted(alone, key=lambda slot: (-alone[slot], slot))
    ordered = [lengths[slot] for slot in by_length]
    tokens_of = [own.packed for own in ordered] if layout == "packed" else [own.concatenated for own in ordered]
    parts = _fill(by_length, tokens_of, cost, bound=tokens_per_micro_batch)
    per_worker = math.ceil(len(parts) / num_workers)
    low = max(alone[by_length[0]], math.ceil(sum(tokens_of) / (per_worker * num_workers)))
    high = max(part.cost for part in parts)
    while num_workers > 1 and high - low > _BALANCED * high:
        bound = (low + high) // 2
        tighter = _fill(by_length, tokens_of, cost, bound=bound)
        if len(tighter) <= per_worker * num_workers:
            parts, high = tighter, max(part.cost for part in tighter)
        else:
            low = bound + 1
    return _deal(parts, num_workers, per_worker, spare=by_length[-1])


def check_budget(store: TokenStore, *, tokens_per_micro_batch: int, row_tokens: int | None, layout: Layout) -> None:
    """Raises PlanError naming the groups of a store that no micro-batch could hold, before any step is planned."""
    count, most, largest = 0, tokens_per_micro_batch, 0
    for piece in store.index.pieces():
        suspects = np.flatnonzero(piece.num_candidates * piece.packed_tokens > tokens_per_micro_batch)
        for group in (piece.first + suspects).tolist():
            rows, length = rows_needed([store.lengths(group)], row_tokens=row_tokens, layout=layout)
            count += rows * length > tokens_per_micro_batch
            if rows * length > most:
                most, largest = rows * length, group
    if count:
        others = f" ({count} groups are too large; this is the largest)" if count > 1 else ""
        raise PlanError(_too_large(store.index.name(largest), most, tokens_per_micro_batch) + others)


class _Part(NamedTuple):
    """Slots that one micro-batch holds."""

    cost: int
    slots: Sequence[int]


def _fill(
    slots: Sequence[int], tokens: Sequence[int], cost: Callable[[Sequence[int]], int], *, bound: int
) -> list[_Part]:
    """Consecutive runs of slots, each as long as a search finds to cost at most ``bound``.

    No run costs less than its ``tokens``, and most cost little more: the search starts at the longest run whose tokens
    fit and goes down in growing steps, then bisects.
    """
    ends = list(accumulate(tokens, initial=0))
    parts = []
    first = 0
    while first < len(slots):
        beyond = bisect_right(ends, ends[first] + bound)
        fits, step = beyond - 1, 1
        while (found := cost(slots[first:fits])) > bound:
            beyond, step = fits, 2 * step
            fits = max(first + 1, fits - step)
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if (trial := cost(slots[first:middle])) <= bound:
                fits, found = middle, trial
            else:
                beyond = middle
        parts.append(_Part(found, slots[first:fits]))
        first = fits
    return parts


def _deal(
    parts: Sequence[_Part], num_workers: int, per_worker: int, *, spare: int
) -> tuple[tuple[MicroBatch, ...], ...]:
    """Largest first to the least loaded worker that has room; then dummies."""
    hands: list[list[MicroBatch]] = [[] for _ in range(num_workers)]
    load = [0] * num_workers
    for part in sorted(parts, key=lambda part: -part.cost):
        worker = min((w for w in range(num_workers) if len(hands[w]) < per_worker), key=lambda w: load[w])
        hands[worker].append(MicroBatch(slots=tuple(sorted(part.slots))))
        load[worker] += part.cost
    dummy = MicroBatch(slots=(spare,), dummy=True)
    return tuple(tuple(hand) + (dummy,) * (per_worker - len(hand)) for hand in hands)


def _too_large(name: str, tokens: int, tokens_per_micro_batch: int) -> str:
    return (
        f"{name} takes {tokens} tokens of a micro-batch, more than optim.tokens_per_micro_batch = "
        f"{tokens_per_micro_batch}; raise it to at least {tokens}, or lower data.max_tokens or the number of candidates"
    )
