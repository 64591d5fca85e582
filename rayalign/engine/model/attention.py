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

from rayalign.data.rows import Layout
from rayalign.engine.model.group_attention import GROUP_ATTENTION, branch_runs
from rayalign.types import PackedBatch

FLEX, DENSE = "flex_attention", "eager"
"""Transformers' names of the implementations that take block masks, and masks of all pairs of columns."""
WINDOWS = ("sliding_window", "sliding_window_size")
"""What configurations call the number of positions that a layer looks back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far back a layer looks, in position ids: candidates of one prompt stand side by side, so columns say nothing.

    ``window``: fewer than so many positions back. ``chunk``: only inside the same block of so many positions.
    """

    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """How a model takes masks.

    ``reach`` is one :class:`Reach` for all layers, or one per layer type where the model takes a dict of masks.
    ``None`` means that it does not obey a prepared mask: it gets plain right-padded sequences only (the
    ``concatenated`` layout).
    """

    reach: Reach | Mapping[str, Reach] | None
    implementation: str | None = None
    """Transformers' name of the attention function; None: the one that the model was loaded with."""

    @property
    def layout(self) -> Layout:
        return "concatenated" if self.reach is None else "packed"


CONCATENATED_ONLY = AttentionKind(reach=None)


def attention_kinds(config: PretrainedConfig, device: torch.device) -> dict[str, AttentionKind]:
    """Name → way in which a model may take the masks of packed rows, fastest first, by what its configuration says.

    Which of them it does take is not known before :mod:`rayalign.engine.model.parity` has tried.
    """
    kinds = {}
    for implementation in (FLEX if device.type == "cuda" else GROUP_ATTENTION, DENSE):
        for name, reach in reaches(config).items():
            kinds[f"{implementation}, {name}"] = AttentionKind(reach=reach, implementation=implementation)
    return kinds


def first_kind(config: PretrainedConfig, device: torch.device) -> AttentionKind:
    """The way that is tried first."""
    return next(iter(attention_kinds(config, device).values()))


def reaches(config: PretrainedConfig) -> dict[str, Reach | Mapping[str, Reach]]:
    """How far layers may look: each type of layer as it says, or all alike."""
    text = config.get_text_config()
    window = next((Reach(window=size) for name in WINDOWS if (size := getattr(text, name, None))), Reach())
    chunk = Reach(chunk=getattr(text, "attention_chunk_size", None))
    by_type = {"full_attention": Reach(), "sliding_attention": window, "chunked_attention": chunk}
    types = sorted(set(getattr(text, "layer_types", None) or ()))
    found: dict[str, Reach | Mapping[str, Reach]] = {}
    if types and by_type.keys() >= set(types):
        found["a mask per type of layer"] = {layer_type: by_type[layer_type] for layer_type in types}
    if window.window:
        found["one mask with a window"] = window
    return {**found, "one mask": Reach()}


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
        ValueError: the model takes plain sequences only, and a row holds more than one.
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
        raise ValueError("this model reads one prompt with one candidate per row: pack with layout='concatenated'")
