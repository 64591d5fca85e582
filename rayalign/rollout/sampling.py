"""One token per row from logits and one uniform number per row."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from rayalign.rollout.base import SamplingParams


def draw(
    logits: Float[Tensor, "rows V"], noise: Float[Tensor, " rows"], params: SamplingParams
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "2 rows"]]:
    """The token at which the cumulative distribution passes ``noise``, and its log-probabilities.

    Returns:
        tokens, and their log-probabilities under (0) the distribution drawn from and (1) the full softmax.
    """
    full = torch.log_softmax(logits / (params.temperature or 1.0), dim=-1)
    if params.temperature == 0:
        token = full.argmax(dim=-1)
        return token, torch.stack([torch.zeros_like(full[:, 0]), _at(full, token)])
    behavior = truncated(full, top_k=params.top_k, top_p=params.top_p) if params.truncates else full
    cumulative = behavior.double().exp().cumsum(dim=-1)  # in float32 a long tail of a large vocabulary would vanish
    threshold = noise[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, torch.stack([_at(behavior, token), _at(full, token)])


def truncated(logp: Float[Tensor, "rows V"], *, top_k: int, top_p: float) -> Float[Tensor, "rows V"]:
    """``logp`` of the kept tokens, renormalised; −inf elsewhere. See :class:`SamplingParams` for what is kept."""
    ordered, order = logp.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    if top_p < 1:
        probability = torch.softmax(ordered, dim=-1)
        reached_before = probability.cumsum(dim=-1) - probability
        ordered = ordered.masked_fill(reached_before >= top_p, -torch.inf)
    return torch.log_softmax(torch.full_like(logp, -torch.inf).scatter(1, order, ordered), dim=-1)


def _at(logp: Float[Tensor, "rows V"], token: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return logp.gather(1, token[:, None])[:, 0]


def sample_key(seed: int, prompt_key: int, sample_index: int) -> int:
    """128 bits that are fixed by a sample's identity; engines that take one seed per request use the lowest of them."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{prompt_key}/{sample_index}".encode(), digest_size=16).digest())


def uniforms(key: int, count: int) -> NDArray[np.float64]:
    """The first ``count`` numbers in [0, 1) of the Philox counter stream ``key``; the t-th belongs to token t.

    Raw Philox words (Salmon et al. 2011) are used because NumPy promises that they never change.
    """
    words: NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
