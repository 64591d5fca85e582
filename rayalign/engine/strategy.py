"""How gradients meet: one protocol, here for one process and for DistributedDataParallel."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayalign.engine.forward import RootModule
from rayalign.errors import UserError


@runtime_checkable
class Strategy(Protocol):
    """What the step asks of a way of training. Every strategy averages gradients over ranks."""

    @property
    def device(self) -> torch.device: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def wrap(self, policy: RootModule) -> nn.Module:
        """The module whose forward and backward train ``policy``."""
        ...

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``; ``last`` is the step's last micro-batch, after which gradients are averaged."""
        ...

    def forward_context(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Held around one micro-batch's forward and backward."""
        ...

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        """Clip the averaged gradient to ``max_norm`` (0 = no clipping); returns the norm before clipping."""
        ...

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over ranks, the same on each."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable ``value`` on every rank."""
        ...


@dataclass(frozen=True, slots=True)
class Single:
    """One process, one device."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    def wrap(self, policy: RootModule) -> nn.Module:
        return policy

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)

    def forward_context(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        return clip_gradient(module, max_norm)

    def all_sum(self, values: Tensor) -> Tensor:
        return values

    def broadcast(self, value: Any) -> Any:
        return value


@dataclass(frozen=True, slots=True)
class DDP:
    """Replicated parameters, gradients averaged once per step by DistributedDataParallel (gloo or NCCL)."""

    device: torch.device
    rank: int
    world_size: int

    def wrap(self, policy: RootModule) -> nn.Module:
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            policy,
            device_ids=device_ids,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # they are constants, and sending them would be a collective in every forward
        )

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)

    def forward_context(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        assert isinstance(module, DistributedDataParallel)
        return contextlib.nullcontext() if last else module.no_sync()

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        return clip_gradient(module, max_norm)

    def all_sum(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]


def clip_gradient(module: nn.Module, max_norm: float) -> Tensor:
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))


def make_strategy(name: str, device: torch.device) -> Strategy:
    """The strategy called ``name`` for this process; a process without a process group trains alone."""
    if name == "ddp" and dist.is_initialized():
        return DDP(device, dist.get_rank(), dist.get_world_size())
    if name in ("single", "ddp"):
        return Single(device)
    raise UserError(f"strategy.name: this release does not run {name!r}; write single or ddp")
