"""One fixed sequence that every holder of the same weights must score alike: what catches a broken weight transfer."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rayalign.data.group import Candidate, Group
from rayalign.data.pack import pack
from rayalign.data.rows import Layout
from rayalign.engine.batches import to_device
from rayalign.engine.model.forward import Policy

PROMPT_TOKENS, RESPONSE_TOKENS = 4, 28
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Nats per token by which rounding may let two forwards of the same weights differ."""


def canary_group(vocabulary: int) -> Group:
    """A prompt and a response whose ids run all over the vocabulary, the same on every machine."""
    ids = np.array([(7919 * (n + 1) ** 2) % vocabulary for n in range(PROMPT_TOKENS + RESPONSE_TOKENS)], np.int32)
    response = Candidate(ids=ids[PROMPT_TOKENS:], mask=np.ones(RESPONSE_TOKENS, np.bool_))
    return Group(prompt_ids=ids[:PROMPT_TOKENS], candidates=(response,), source="canary")


@torch.no_grad()
def canary_logps(
    model: PreTrainedModel,
    *,
    layout: Layout,
    dtype: torch.dtype,
    policy: nn.Module | None = None,
    device: torch.device | None = None,
) -> tuple[float, ...]:
    """Log-probabilities of the canary's response under the training forward, nats.

    ``policy`` is the wrapped module that a strategy trains ``model`` by, on ``device``; all ranks call this alike.
    """
    device = device or model.device
    group = canary_group(model.get_output_embeddings().out_features)
    batch = pack([group], positions=[0], num_candidates=1, pad_id=0, row_tokens=None, layout=layout)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        scores = (policy or Policy(model))(to_device(batch, device))
    return tuple(scores.token_logp.float().tolist())


def canary_error(expected: tuple[float, ...], found: tuple[float, ...]) -> float:
    """Largest difference of log-probabilities, nats; infinite where one is not a number or the lengths differ."""
    if len(expected) != len(found):
        return float("inf")
    error = float(np.max(np.abs(np.subtract(expected, found))))
    return error if np.isfinite(error) else float("inf")
