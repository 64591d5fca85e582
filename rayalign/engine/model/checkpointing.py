"""Activations that are computed again in the backward pass: those of whole blocks, or all but the costly ones."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

aten = torch.ops.aten
COSTLY = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._grouped_mm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
    }
)
"""Operations whose results ``selective`` keeps: matrix products and attention, nearly all arithmetic of a block."""


def checkpoint_blocks(model: PreTrainedModel, how: Literal[True, "selective"]) -> None:
    """Let the blocks of ``model`` keep their inputs alone (True), or these and the results of :data:`COSTLY`."""
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_costly)
    model.gradient_checkpointing_enable(options)


def keep_costly(context: object, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
