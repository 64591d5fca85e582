"""Attention group by group: packed rows on a CPU, without a mask that grows with the square of the row.

No token looks beyond its own group, and a group is a run of neighbouring columns. So each group is a small attention of
its own, and the work does not depend on how many groups share a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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


# Never compiled: it reads lengths as numbers, and each new one would be compiled again.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    module: nn.Module,
    query: Float[Tensor, "R heads L D"],
    key: Float[Tensor, "R kv_heads M D"],
    value: Float[Tensor, "R kv_heads M D"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "R L heads D"], None]:
    """Transformers' attention function: by groups for :func:`branch_runs`, plain ``sdpa`` for any other mask.

    The output is 0 on padding, which is not read.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        output: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]
        return output, None
    (window, chunk), *runs = attention_mask[0, 0].tolist()
    starts = [index for index, (_, branch) in enumerate(runs) if branch <= 0]
    sizes_of_runs = [size for size, _ in runs]
    blocks = [sizes_of_runs[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]
    totals = [sum(sizes) for sizes in blocks]
    repeats = getattr(module, "num_key_value_groups", 1)
    queries, keys, values = (
        tensor.transpose(1, 2).flatten(0, 1).split(totals)
        for tensor in (query, repeat_kv(key, repeats), repeat_kv(value, repeats))
    )
    outputs = []
    for start, sizes, q, k, v in zip(starts, blocks, queries, keys, values, strict=True):
        is_padding = runs[start][1] == _PADDING
        outputs.append(torch.zeros_like(q) if is_padding else _within(q, k, v, sizes, (window, chunk), scaling))
    num_rows, heads, length, width = query.shape
    return torch.cat(outputs).view(num_rows, length, heads, width), None


def _within(
    query: Float[Tensor, "n heads D"],
    key: Float[Tensor, "n heads D"],
    value: Float[Tensor, "n heads D"],
    sizes: Sequence[int],
    limits: tuple[int, int],
    scaling: float | None,
) -> Float[Tensor, "n heads D"]:
    """One group; a single candidate after its prompt is an ordinary sequence, for which no mask need be made."""
    window, chunk = limits
    is_sequence = len(sizes) <= 2 and not window and not chunk
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    output = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if is_sequence else visible_tokens(sizes, window=window, chunk=chunk),
        is_causal=is_sequence,
        scale=scaling,
    )
    return output[0].transpose(0, 1)


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
