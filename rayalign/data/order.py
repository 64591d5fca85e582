"""Shuffling as a function: a keyed bijection of [0, n), computed one index at a time."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

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
