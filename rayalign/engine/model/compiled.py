"""``torch.compile`` of the transformer blocks: one compilation that all blocks of a kind and all row lengths share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rayalign.errors import UserError


def transformer_blocks(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The transformer blocks, as the family names them for Hugging Face."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    yield from (module for module in model.modules() if type(module).__name__ in names)


def compile_blocks(model: PreTrainedModel, device: torch.device) -> None:
    """Compile every block's forward, and its backward, at their first use on ``device``.

    No module is wrapped or renamed, and hooks around a block, such as FSDP2's, stay outside of what is compiled.

    Raises:
        UserError: the model names no blocks, or there is no C++ compiler for the CPU's kernels.
    """
    found = list(transformer_blocks(model))
    if not found:
        raise UserError(
            f"model.compile: {model.config.model_type} models do not name their transformer blocks; remove it"
        )
    if device.type == "cpu":
        refuse_missing_compiler()
    # A block is a graph of its own, which is what DDP's splitting of larger graphs is for; it refuses FlexAttention.
    torch._dynamo.config.optimize_ddp = False
    for block in found:
        block.forward = with_gradient(block.forward)


def with_gradient(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward``, compiled for calls that a gradient follows; others are few, and each kind would cost a compilation.

    Random numbers are drawn as without compilation.
    """
    compiled = torch.compile(forward, dynamic=True, options={"fallback_random": True})

    @wraps(forward)
    def either(*args: Any, **options: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **options)

    return either


def refuse_missing_compiler() -> None:
    """Raises UserError where torch finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "model.compile: torch.compile needs a C++ compiler for the CPU, and there is none here: install g++, name "
            "one in the environment variable CXX, or remove model.compile"
        ) from error
