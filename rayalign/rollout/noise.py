"""Randomness that depends on what is drawn, never on when, where or together with what."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def sample_key(seed: int, prompt_key: int, sample_index: int) -> int:
    """128 bits that are fixed by a sample's identity; engines that take one seed per request use the lowest of them."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{prompt_key}/{sample_index}".encode(), digest_size=16).digest())


def uniforms(key: int, count: int) -> NDArray[np.float64]:
    """The first ``count`` numbers in [0, 1) of the Philox counter stream ``key``; the t-th belongs to token t.

    Raw Philox words (Salmon et al. 2011) are used because NumPy promises that they never change.
    """
    words: NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
