"""What a training process holds in its device's memory, from shapes alone: nothing is computed, no weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from rayalign.config.model import Checkpointing
from rayalign.engine.model.checkpointing import COSTLY
from rayalign.engine.model.compiled import transformer_blocks
from rayalign.engine.model.folder import FAILURES
from rayalign.errors import UserError, first_line

SHAPES_ALONE = "rayalign_shapes"
"""Transformers' name of an attention that keeps what fused kernels keep for their backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes that a forward keeps for its backward."""

    blocks: tuple[int, ...]
    """Those of each transformer block."""
    inputs: int
    """What enters the blocks, which is all that gradient checkpointing keeps of them."""
    outside: int
    """Those of everything before, between and after the blocks."""
    products: tuple[int, ...]
    """Results of matrix products and attention in each block, which selective checkpointing keeps."""
    casts: int
    """Weights that autocast has rounded; FSDP2 gathers them again instead."""

    def kept(self, *, checkpointed: Checkpointing) -> int:
        """Bytes between forward and backward; with checkpointing one block is computed again at a time."""
        if not checkpointed:
            return sum(self.blocks) + self.outside
        held = self.products if checkpointed == "selective" else (0,) * len(self.blocks)
        again = max((block - own for block, own in zip(self.blocks, held, strict=True)), default=0)
        return self.inputs + sum(held) + again + self.outside


class _ShapedAttention(torch.autograd.Function):
    """Keeps query, key, value, output and one number per query, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("only shapes are computed")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if torch.is_autocast_enabled("cpu"):  # which rounds what enters a fused kernel
        query, key, value = (given.to(torch.get_autocast_dtype("cpu")) for given in (query, key, value))
    return _ShapedAttention.apply(query, key, value), None  # type: ignore[no-untyped-call]


def _no_mask(*arguments: Any, **options: Any) -> None:
    return None


class _ShapedProduct(torch.autograd.Function):
    """Rows times the matrices of their experts; keeps both, as a grouped product does."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(len(rows), width)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("only shapes are computed")


def _experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Fused experts, each token at as many as a router chooses; which ones does not matter."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    rows = hidden[chosen.reshape(-1)]
    inner = _ShapedProduct.apply(rows, first, first.shape[-1 if module.is_transposed else -2])  # type: ignore[no-untyped-call]
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _ShapedProduct.apply(inner, module.down_proj, hidden.shape[-1])  # type: ignore[no-untyped-call]
    mixed: Tensor = (outer * weights.reshape(-1, 1)).view(len(hidden), -1, hidden.shape[-1]).sum(dim=1)
    return mixed.to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(SHAPES_ALONE, _experts)
AttentionInterface.register(SHAPES_ALONE, _attend)
AttentionMaskInterface.register(SHAPES_ALONE, _no_mask)


def activation_bytes(skeleton: PreTrainedModel, *, tokens: int, dtype: torch.dtype) -> Activations:
    """What a forward of ``tokens`` tokens in one row keeps, computed in ``dtype``.

    Args:
        skeleton: the model on the meta device, with its adapter if it has one; what is not trained needs no gradient.
        tokens: of a micro-batch, padding included.
        dtype: of autocast; float32 turns it off.

    Raises:
        UserError: the family's forward depends on values, such as a router's, so that shapes alone do not run it.
    """
    config, backbone = skeleton.config, skeleton.base_model
    usual = config._attn_implementation, config._experts_implementation
    skeleton.set_attn_implementation(SHAPES_ALONE)
    skeleton.set_experts_implementation(SHAPES_ALONE)
    try:
        with FakeTensorMode():
            shaped = {
                name: without_values(own) for name, own in chain(backbone.named_parameters(), backbone.named_buffers())
            }
            held = _Held(backbone, shaped, dtype)
            with (
                held.watching(),
                held.counting,
                torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack),
                torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
            ):
                ids = torch.zeros(1, tokens, dtype=torch.long)
                inputs = {"input_ids": ids, "position_ids": ids, "use_cache": False, "return_dict": True}
                torch.func.functional_call(backbone, shaped, kwargs=inputs, tie_weights=False)
    except FAILURES as error:
        raise UserError(
            f"{config.model_type}: the memory of its activations cannot be told from shapes ({first_line(error)})"
        ) from error
    finally:
        skeleton.set_attn_implementation(usual[0])
        skeleton.set_experts_implementation(usual[1])
    return held.found()


def without_values(tensor: Tensor) -> Tensor:
    """A tensor of the same shape on the CPU; under FakeTensorMode it has no memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)


class _Held:
    """Every storage that autograd keeps, once, and in which block it was first kept."""

    def __init__(self, backbone: PreTrainedModel, shaped: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.blocks = list(transformer_blocks(backbone))
        self.dtype = dtype
        own = list(shaped.values())
        self.parameters = {tensor.untyped_storage()._cdata for tensor in own}
        self.rounded = {parameter.numel() * dtype.itemsize for parameter in own if parameter.ndim > 1}
        self.alive: dict[int, Tensor] = {}
        self.owner: dict[int, int | None] = {}
        self.inputs = 0
        self.now: int | None = None
        self.counting = _Results(self)
        self.products = [0] * len(self.blocks)

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for place, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(self._enter(place), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leave))
        yield
        for handle in handles:
            handle.remove()

    def _enter(self, place: int) -> Any:
        def enter(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.now = place
            given = next(value for value in (*positional, *named.values()) if isinstance(value, Tensor))
            self.inputs += given.numel() * given.element_size()

        return enter

    def _leave(self, *_: object) -> None:
        self.now = None

    def pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self.parameters and key not in self.alive:
            self.alive[key], self.owner[key] = tensor, self.now
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor

    def found(self) -> Activations:
        sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in self.alive.items()}
        is_cast = {key: self._is_cast(tensor, sizes[key]) for key, tensor in self.alive.items()}
        of_block = [0] * len(self.blocks)
        outside = 0
        for key, size in sizes.items():
            place = self.owner[key]
            if is_cast[key]:
                continue
            if place is None:
                outside += size
            else:
                of_block[place] += size
        return Activations(
            blocks=tuple(of_block),
            inputs=self.inputs,
            outside=outside,
            products=tuple(self.products),
            casts=sum(size for key, size in sizes.items() if is_cast[key]),
        )

    def _is_cast(self, tensor: Tensor, size: int) -> bool:
        return self.dtype != torch.float32 and tensor.dtype == self.dtype and tensor.ndim == 2 and size in self.rounded


class _Results(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the results of costly operations by block; attention of shapes alone makes new empty tensors."""

    def __init__(self, held: _Held) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = held

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if self.held.now is not None and (operation in COSTLY or operation == torch.ops.aten.new_empty.default):
            self.held.products[self.held.now] += result.numel() * result.element_size()
        return result
