"""Who sees whom in a packed row: one rule, as a FlexAttention block mask (CUDA), group by group (CPU), or dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PretrainedConfig

from rayalign.engine.model.group_attention import GROUP_ATTENTION, branch_runs
from rayalign.types import PackedBatch

FLEX = "flex_attention"
"""Transformers' name of the attention implementation that takes block masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far back a layer looks, in position ids: candidates of one prompt stand side by side, so columns say nothing.

    ``window``: fewer than so many positions back. ``chunk``: only inside the same block of so many positions.
    """

    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """How a model family takes masks.

    ``reach`` is one :class:`Reach` for all layers, or one per layer type where the model takes a dict of masks.
    ``None`` means that the family is not known to obey a prepared mask: it gets plain right-padded sequences only
    (the ``concatenated`` layout).
    """

    reach: Reach | Mapping[str, Reach] | None


CONCATENATED_ONLY = AttentionKind(reach=None)

_ONE_MASK = frozenset(
    {"gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral"}
    | {"olmo", "olmo2", "phi", "phi3", "qwen3_moe", "starcoder2"}
)
_MASK_PER_LAYER_TYPE = frozenset({"gemma2", "gemma3_text", "llama4_text", "olmo3", "qwen2", "qwen3", "smollm3"})


def attention_kind(config: PretrainedConfig) -> AttentionKind:
    """The family of a model, by its configuration; whatever is not in the tables is ``CONCATENATED_ONLY``.

    Membership says how the mask is handed over; :mod:`rayalign.engine.model.parity` proves it before it is relied on.
    """
    window = Reach(window=getattr(config, "sliding_window", None))
    if config.model_type in _ONE_MASK:
        return AttentionKind(reach=window)
    chunk = Reach(chunk=getattr(config, "attention_chunk_size", None))
    reaches = {"full_attention": Reach(), "sliding_attention": window, "chunked_attention": chunk}
    scales_by_column = getattr(config, "attn_temperature_tuning", False)
    if config.model_type in _MASK_PER_LAYER_TYPE and not scales_by_column and reaches.keys() >= set(config.layer_types):
        return AttentionKind(reach={layer_type: reaches[layer_type] for layer_type in set(config.layer_types)})
    return CONCATENATED_ONLY


def may_attend(
    batch: PackedBatch, reach: Reach, *, row: Int[Tensor, " *r"], q: Int[Tensor, " *q"], kv: Int[Tensor, " *kv"]
) -> Bool[Tensor, " *seen"]:
    """The rule: the token in column ``q`` of a row may look at the one in column ``kv``.

    Same row, not later, same group, and the prompt's branch or its own; plus the layer's reach. Every token sees
    itself, padding included (its group is -1), so that no row of a softmax is empty. The index tensors broadcast.
    """
    groups, branches, positions = batch.group_ids, batch.branch_ids, batch.position_ids
    branch = branches[row, kv]
    visible = (kv <= q) & (groups[row, q] == groups[row, kv]) & ((branch == 0) | (branch == branches[row, q]))
    if reach.window is not None:
        visible = visible & (positions[row, q] - positions[row, kv] < reach.window)
    if reach.chunk is not None:
        visible = visible & (positions[row, q] // reach.chunk == positions[row, kv] // reach.chunk)
    return visible


def additive_mask(batch: PackedBatch, reach: Reach, dtype: torch.dtype) -> Float[Tensor, "R 1 L L"]:
    """0 where seen, the most negative number elsewhere.

    Never boolean: eager attention adds its mask to the scores, and True and False would count as 1 and 0.
    """
    num_rows, length = batch.input_ids.shape
    device = batch.input_ids.device
    column = torch.arange(length, device=device)
    row = torch.arange(num_rows, device=device)[:, None, None]
    visible = may_attend(batch, reach, row=row, q=column[:, None], kv=column[None, :])
    mask = torch.zeros(visible.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def block_mask(batch: PackedBatch, reach: Reach) -> BlockMask:
    """The same rule for FlexAttention, which skips blocks of the row that no token sees."""
    num_rows, length = batch.input_ids.shape
    return create_block_mask(
        lambda row, head, q, kv: may_attend(batch, reach, row=row, q=q, kv=kv),
        num_rows,
        None,
        length,
        length,
        device=batch.input_ids.device,
    )


def attention_inputs(
    batch: PackedBatch, kind: AttentionKind, implementation: str, dtype: torch.dtype
) -> dict[str, Any]:
    """The keyword arguments of the model that say who sees whom and where every token stands.

    ``implementation`` is the model's attention implementation and ``dtype`` that of its attention scores.

    Raises:
        ValueError: the family takes plain sequences only, and a row holds more than one.
    """
    if kind.reach is None:
        _require_one_sequence_per_row(batch)
        return {"attention_mask": (batch.group_ids >= 0).long()}

    def mask(reach: Reach) -> Tensor | BlockMask:
        if implementation == FLEX:
            return block_mask(batch, reach)
        if implementation == GROUP_ATTENTION:
            return branch_runs(batch, window=reach.window, chunk=reach.chunk)
        return additive_mask(batch, reach, dtype)

    masks = {name: mask(r) for name, r in kind.reach.items()} if isinstance(kind.reach, Mapping) else mask(kind.reach)
    return {"attention_mask": masks, "position_ids": batch.position_ids}


def _require_one_sequence_per_row(batch: PackedBatch) -> None:
    real = batch.group_ids >= 0
    expected = torch.arange(real.shape[1], device=real.device)
    if not bool((batch.position_ids == expected)[real].all()):
        raise ValueError(
            "this model family reads one prompt with one candidate per row: pack with layout='concatenated'"
        )
