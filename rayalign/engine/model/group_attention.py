"""Attention group by group: packed rows on a CPU, without a mask that grows with the square of the row.

No token looks beyond its own group, and a group is a run of neighbouring columns. So each group is a small attention of
its own, and the work does not depend on how many groups share a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rayalign.functional.logprobs import at_least_float32
from rayalign.types import PADDING_GROUP, PackedBatch

GROUP_ATTENTION = "rayalign_groups"
"""Transformers' name of this implementation."""

_PADDING = -1


def branch_runs(batch: PackedBatch, *, window: int | None, chunk: int | None) -> Int[Tensor, "1 1 lines 2"]:
    """What :func:`attend` gets instead of a mask; transformers passes on whatever has four axes.

    The first line is (window, chunk), 0 where there is none. Every other is a run of columns of one branch, in the
    order of rows and columns: (number of columns, branch id, or -1 on padding).
    """
    num_rows, length = batch.input_ids.shape
    row = torch.arange(num_rows)[:, None].expand(num_rows, length)
    owners = torch.stack([row, batch.group_ids, batch.branch_ids]).flatten(1)
    (_, groups, branches), sizes = torch.unique_consecutive(owners, dim=1, return_counts=True)
    lines = torch.stack([sizes, torch.where(groups == PADDING_GROUP, _PADDING, branches)], dim=1)
    return torch.cat([torch.tensor([[window or 0, chunk or 0]]), lines])[None, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRule:
    """What a layer does between the products of queries and keys and the sum over values."""

    scale: float | None
    """What the products are multiplied by; None: one over the square root of a key's width."""
    softcap: float | None = None
    """The largest |score|, approached by a tanh (Gemma 2)."""
    sinks: Float[Tensor, " heads"] | None = None
    """Scores of a column that takes weight and has no value (gpt-oss)."""

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


# Never compiled: it reads lengths as numbers, and each new one would be compiled again.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    module: nn.Module,
    query: Float[Tensor, "R heads L D"],
    key: Float[Tensor, "R kv_heads M D"],
    value: Float[Tensor, "R kv_heads M V"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "R L heads V"], None]:
    """Transformers' attention function: by groups for :func:`branch_runs`, plain ``sdpa`` for any other mask.

    The output is 0 on padding, which is not read.
    """
    how = ScoreRule(scale=scaling, softcap=softcap or None, sinks=s_aux)
    repeats = getattr(module, "num_key_value_groups", 1)
    if attention_mask is None or attention_mask.dtype != torch.int64:
        if how.plain:
            output: Tensor = sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )[0]
            return output, None
        seen = attention_mask if attention_mask is not None else causal(query.shape[2], key.shape[2], query.device)
        return scored(query, repeat_kv(key, repeats), repeat_kv(value, repeats), seen, how).transpose(1, 2), None
    (window, chunk), *runs = attention_mask[0, 0].tolist()
    starts = [index for index, (_, branch) in enumerate(runs) if branch <= 0]
    sizes_of_runs = [size for size, _ in runs]
    blocks = [sizes_of_runs[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]
    totals = [sum(sizes) for sizes in blocks]
    queries, keys, values = (
        tensor.transpose(1, 2).flatten(0, 1).split(totals)
        for tensor in (query, repeat_kv(key, repeats), repeat_kv(value, repeats))
    )
    outputs = []
    for start, sizes, q, k, v in zip(starts, blocks, queries, keys, values, strict=True):
        is_padding = runs[start][1] == _PADDING
        outputs.append(torch.zeros_like(v) if is_padding else _within(q, k, v, sizes, (window, chunk), how))
    num_rows, heads, length, _ = query.shape
    return torch.cat(outputs).view(num_rows, length, heads, value.shape[-1]), None


def _within(
    query: Float[Tensor, "n heads D"],
    key: Float[Tensor, "n heads D"],
    value: Float[Tensor, "n heads V"],
    sizes: Sequence[int],
    limits: tuple[int, int],
    how: ScoreRule,
) -> Float[Tensor, "n heads V"]:
    """One group; a single candidate after its prompt is an ordinary sequence, for which no mask need be made."""
    window, chunk = limits
    is_sequence = len(sizes) <= 2 and not window and not chunk and how.plain
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    seen = None if is_sequence else visible_tokens(sizes, window=window, chunk=chunk)
    if seen is None or how.plain:
        output = scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=is_sequence, scale=how.scale)
    else:
        output = scored(q, k, v, seen, how)
    return output[0].transpose(0, 1)


def scored(
    query: Float[Tensor, "R heads L D"],
    key: Float[Tensor, "R heads M D"],
    value: Float[Tensor, "R heads M V"],
    seen: Tensor,
    how: ScoreRule,
) -> Float[Tensor, "R heads L V"]:
    """Attention by its definition; ``seen`` is boolean, or what is added to the scores. Softmax is in float32."""
    scores = query @ key.transpose(-1, -2) * (how.scale if how.scale is not None else query.shape[-1] ** -0.5)
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    is_bool = seen.dtype == torch.bool
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min) if is_bool else scores + seen
    if how.sinks is not None:
        sinks = how.sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = at_least_float32(scores).softmax(dim=-1)[..., : key.shape[-2]]
    return weights.to(value.dtype) @ value


def causal(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "L M"]:
    """Every query sees the keys up to its own; the last query is that of the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def visible_tokens(sizes: Sequence[int], *, window: int, chunk: int) -> Bool[Tensor, "n n"]:
    """Which tokens see which, by the rule of :func:`.attention.may_attend`; the prompt has ``sizes[0]`` tokens."""
    prompt, tokens = sizes[0], sum(sizes)
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril_()
    for start, stop in pairwise(accumulate(sizes)):
        visible[stop:, start:stop] = False
    if window or chunk:
        position = torch.cat([torch.arange(prompt), *(torch.arange(prompt, prompt + size) for size in sizes[1:])])
        if window:
            visible &= position[:, None] - position < window
        if chunk:
            visible &= position[:, None] // chunk == position // chunk
    return visible


AttentionInterface.register(GROUP_ATTENTION, attend)
AttentionMaskInterface.register(GROUP_ATTENTION, sdpa_mask)
