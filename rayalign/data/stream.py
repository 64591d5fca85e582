"""Streams: an endless sequence of positions, each of which names one row of one source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rayalign.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A mixture of sources, as a function of the position alone: nothing is consumed, so any step can be asked again.

    An epoch holds ``round(weight · size)`` draws of every source, interleaved evenly (every step has the mixture's
    proportions up to one group). A source is drawn in its own shuffled order, carried on from epoch to epoch: each of
    its rows is seen before any is seen again, whatever its weight.

    Args:
        name: keys the order, together with ``seed``.
        sizes: rows of every source.
        weights: passes over every source per epoch.
        groups_per_step: positions that one step takes; a step may straddle epochs and is never short.

    Raises:
        UserError: nothing is left to draw, or a weight leaves the rows of a source without a draw. A source that a
            filter has emptied is passed over.
    """

    name: str
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    groups_per_step: int
    seed: int
    orders: tuple[SourceOrder, ...] = ()
    """One per source; none: :func:`order` of all its rows."""

    def __post_init__(self) -> None:
        if not self.sizes:
            raise UserError(f"stream {self.name!r} has no source")
        if not any(self.sizes):
            raise UserError(f"stream {self.name!r} has no row")
        for source, (size, weight, draws) in enumerate(zip(self.sizes, self.weights, self.draws, strict=True)):
            if size and draws < 1:
                raise UserError(
                    f"stream {self.name!r}: source {source} has {size} rows and weight {weight}, so it is never drawn; "
                    "raise its weight or remove it"
                )

    @property
    def draws(self) -> tuple[int, ...]:
        """Draws of every source per epoch."""
        return tuple(round(weight * size) for weight, size in zip(self.weights, self.sizes, strict=True))

    @property
    def groups_per_epoch(self) -> int:
        return sum(self.draws)

    def num_steps(self, epochs: float) -> int:
        """Steps that cover ``epochs`` epochs; the last may run into the next one."""
        return math.ceil(Fraction(epochs).limit_denominator(10**6) * self.groups_per_epoch / self.groups_per_step)

    def positions(self, step: int) -> range:
        """Positions that step ``step`` (from 0) trains on."""
        return range(step * self.groups_per_step, (step + 1) * self.groups_per_step)

    def epoch(self, position: int) -> float:
        """Epochs finished when ``position`` groups have been seen."""
        return position / self.groups_per_epoch

    def row(self, position: int) -> tuple[int, int]:
        """(source, row in that source) at ``position``."""
        source, epoch, index = self.place(position)
        if self.orders:
            return source, self.orders[source](epoch, index)
        return source, order(self.seed, f"{self.name}/{source}", epoch, self.sizes[source])(index)

    def place(self, position: int) -> tuple[int, int, int]:
        """(source, epoch of that source, place in its order) at ``position``."""
        epoch, slot = divmod(position, self.groups_per_epoch)
        remaining = self.groups_per_epoch
        for source, draws in enumerate(self.draws):
            # Of the first `slot` slots left to sources `source`, `source + 1`, …, this source has taken `taken`.
            taken = slot * draws // remaining
            if (slot + 1) * draws // remaining > taken:
                return source, *divmod(epoch * draws + taken, self.sizes[source])
            slot -= taken
            remaining -= draws
        raise AssertionError("the last source takes every slot that is left")


def hybrid_positions(step: int, *, groups_per_step: int, fresh_fraction: float) -> tuple[range, range]:
    """Positions of step ``step`` in the stream of fresh groups and in the stream of stored ones.

    Before step s, ⌊s·G·f⌋ fresh groups have been taken; a step takes G groups in all.
    """
    fraction = Fraction(fresh_fraction).limit_denominator(10**6)
    start, stop = (math.floor(s * groups_per_step * fraction) for s in (step, step + 1))
    return range(start, stop), range(step * groups_per_step - start, (step + 1) * groups_per_step - stop)


class SourceOrder(Protocol):
    """In which order the rows of a source are visited."""

    def __call__(self, epoch: int, index: int, /) -> int:
        """The row at place ``index`` of an epoch."""
        ...

    def needed(self, epoch: int, index: int) -> list[int]:
        """The shards to have at hand from place ``index`` of an epoch on."""
        ...


class WindowedOrder:
    """Shards in random order, ``window`` at a time, whose rows are shuffled together.

    A pure function of seed, epoch and place, in memory that grows with shards and not with rows. So a worker needs the
    shards of one window at a time. With as many shards as one window has, it is :func:`order` of all rows.
    """

    def __init__(self, seed: int, name: str, parts: Sequence[int], window: int | None) -> None:
        self.seed = seed
        self.name = name
        self.window = len(parts) if window is None else window
        self.parts = np.array(parts, np.int64)
        self.firsts = np.cumsum(self.parts) - self.parts
        self._epoch = -1
        self._shards = self._ends = np.empty(0, np.int64)

    def __call__(self, epoch: int, index: int, /) -> int:
        if len(self.parts) <= self.window:
            return order(self.seed, self.name, epoch, int(self.parts.sum()))(index)
        number, own = self._window(epoch, index)
        begin = int(self._ends[number * self.window - 1]) if number else 0
        ends = np.cumsum(self.parts[own])
        inner = order(self.seed, f"{self.name}/window {number}", epoch, int(ends[-1]))(index - begin)
        place = int(np.searchsorted(ends, inner, side="right"))
        return int(self.firsts[own[place]]) + inner - (int(ends[place - 1]) if place else 0)

    def needed(self, epoch: int, index: int) -> list[int]:
        """The shards that place ``index`` and those soon after it may need: of its window, then of the next."""
        shards: Sequence[int] = range(len(self.parts))
        if len(shards) > self.window:
            number, own = self._window(epoch, index)
            end = (number + 1) * self.window
            shards = [*own.tolist(), *self._shards[end : end + self.window].tolist()]
        return [shard for shard in shards if self.parts[shard]]

    def _window(self, epoch: int, index: int) -> tuple[int, NDArray[np.int64]]:
        """The number of the window that has place ``index`` of an epoch, and its shards."""
        if epoch != self._epoch:
            self._epoch = epoch
            visit = order(self.seed, f"{self.name}/shards", epoch, len(self.parts))
            self._shards = np.array([visit(place) for place in range(len(self.parts))])
            self._ends = np.cumsum(self.parts[self._shards])
        number = int(np.searchsorted(self._ends, index, side="right")) // self.window
        return number, self._shards[number * self.window : (number + 1) * self.window]


_ROUNDS = 8
_WORD = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class Permutation:
    """A bijection of [0, n) that needs no memory, equal on every machine.

    A balanced Feistel network permutes the smallest domain of 4^h ≥ n values; results outside [0, n) are permuted
    again until they fall inside (cycle walking; Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """

    n: int
    keys: tuple[int, ...]

    def __call__(self, index: int) -> int:
        """Raises IndexError outside [0, n)."""
        if not 0 <= index < self.n:
            raise IndexError(f"index {index} is outside [0, {self.n})")
        value = self._scramble(index)
        while value >= self.n:
            value = self._scramble(value)
        return value

    def _scramble(self, value: int) -> int:
        half = max(1, ((self.n - 1).bit_length() + 1) // 2)
        mask = (1 << half) - 1
        left, right = value >> half, value & mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half) | right


def order(seed: int, stream: str, epoch: int, n: int) -> Permutation:
    """The order in which epoch ``epoch`` of ``stream`` visits its ``n`` rows: position in the epoch → row."""
    digest = blake2b(f"{seed}\n{stream}\n{epoch}\n{n}".encode(), digest_size=8 * _ROUNDS).digest()
    return Permutation(n, tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)))


def _mix(word: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014)."""
    word = ((word ^ (word >> 30)) * 0xBF58_476D_1CE4_E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D0_49BB_1331_11EB) & _WORD
    return word ^ (word >> 31)
