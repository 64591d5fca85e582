"""How gradients meet: one protocol, here for one process and for DistributedDataParallel."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayalign.config.training import OptimConfig, ParameterDtype, StrategyConfig, StrategyName
from rayalign.engine.batches import State
from rayalign.engine.checkpoint.optimizer_state import Held, load_state, named_state, save_state
from rayalign.engine.model.forward import RootModule
from rayalign.engine.model.parameter_dtype import hold_in_bfloat16, names_in_bfloat16
from rayalign.engine.model.pretrained import CPU, ModelSpec, load_policy
from rayalign.engine.optimizer import make_optimizer


@runtime_checkable
class Strategy(Protocol):
    """What the loop asks of a way of training. Every strategy averages gradients over ranks.

    ``wrap``, ``clip``, ``all_sum``, ``broadcast``, ``full_state`` and every forward may be collectives: all ranks call
    them alike.
    """

    @property
    def config(self) -> StrategyConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def load(self, spec: ModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model as :meth:`wrap` wants it; only rank 0 is sure to hold its weights."""
        ...

    def wrap(
        self, policy: RootModule, optim: OptimConfig, *, compute_dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module whose forward and backward train ``policy``, which holds rank 0's weights now, and its AdamW."""
        ...

    def load_frozen(self, spec: ModelSpec) -> PreTrainedModel:
        """The model as :meth:`freeze` wants it: in the host's memory, of rank 0 at least."""
        ...

    def freeze(self, policy: RootModule, wanted: ParameterDtype, *, compute_dtype: torch.dtype) -> nn.Module:
        """The module whose forward scores with ``policy``, which holds rank 0's weights now and is not trained.

        ``wanted`` says what they are held in: see :mod:`rayalign.engine.model.parameter_dtype`.
        """
        ...

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``; ``last`` is the step's last micro-batch, after which gradients are averaged."""
        ...

    def forward_context(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Held around one micro-batch's forward and backward."""
        ...

    def clip(self, module: nn.Module, max_norm: float | None) -> Tensor:
        """Clip the averaged gradient to ``max_norm`` (None: no clipping); returns the norm before clipping."""
        ...

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over ranks, the same on each."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable ``value`` on every rank."""
        ...

    def full_state(self, model: PreTrainedModel) -> State:
        """``model``'s whole state by name on rank 0, tied tensors as one; nothing that counts on the others."""
        ...

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> Held:
        """What this rank has to write of the optimizer's state: the tensors themselves, not copies."""
        ...

    def save_optimizer(self, held: Held, directory: Path, *, group: dist.ProcessGroup | None = None) -> None:
        """Write what :meth:`optimizer_state` gave; all ranks call this alike, and rank 0 returns when all is there.

        ``group`` is where ranks meet that write beside training; None is where training meets.
        """
        ...

    def load_optimizer(self, optimizer: torch.optim.Optimizer, directory: Path) -> None:
        """Load the optimizer's state from a checkpoint.

        Raises:
            UnreadableOptimizer: this strategy or this number of workers cannot read it; on every rank.
        """
        ...


@dataclass(frozen=True, slots=True)
class Single:
    """One process, one device."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    config: StrategyConfig = StrategyConfig()

    def load(self, spec: ModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_policy(spec, device=self.device)

    def wrap(
        self, policy: RootModule, optim: OptimConfig, *, compute_dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        return policy, make_optimizer(policy, optim)

    def load_frozen(self, spec: ModelSpec) -> PreTrainedModel:
        return load_policy(spec, device=self.device, place=CPU)[0]

    def freeze(self, policy: RootModule, wanted: ParameterDtype, *, compute_dtype: torch.dtype) -> nn.Module:
        return freeze_whole(policy, wanted, compute_dtype, device=self.device)

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)

    def forward_context(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def clip(self, module: nn.Module, max_norm: float | None) -> Tensor:
        return clip_gradient(module, max_norm)

    def all_sum(self, values: Tensor) -> Tensor:
        return values

    def broadcast(self, value: Any) -> Any:
        return value

    def full_state(self, model: PreTrainedModel) -> State:
        state: State = model.state_dict()
        return state

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> Held:
        return named_state(optimizer)

    def save_optimizer(self, held: Held, directory: Path, *, group: dist.ProcessGroup | None = None) -> None:
        save_state(held, directory, alone=True)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, directory: Path) -> None:
        load_state(optimizer, directory)


@dataclass(frozen=True, slots=True)
class DDP:
    """Replicated parameters, gradients averaged once per step by DistributedDataParallel (gloo or NCCL)."""

    device: torch.device
    rank: int
    world_size: int
    config: StrategyConfig = StrategyConfig(name="ddp")

    def load(self, spec: ModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_policy(spec, device=self.device)

    def wrap(
        self, policy: RootModule, optim: OptimConfig, *, compute_dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        module = DistributedDataParallel(policy, device_ids=device_ids, gradient_as_bucket_view=True)
        # They are constants, and sending them would be a collective in every forward. Set here since the argument's
        # name is another one in newer versions of torch.
        module.broadcast_buffers = False
        return module, make_optimizer(policy, optim)

    def load_frozen(self, spec: ModelSpec) -> PreTrainedModel:
        return load_policy(spec, device=self.device, place=CPU)[0]

    def freeze(self, policy: RootModule, wanted: ParameterDtype, *, compute_dtype: torch.dtype) -> nn.Module:
        return freeze_whole(policy, wanted, compute_dtype, device=self.device)

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)

    def forward_context(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        assert isinstance(module, DistributedDataParallel)
        return contextlib.nullcontext() if last else module.no_sync()

    def clip(self, module: nn.Module, max_norm: float | None) -> Tensor:
        return clip_gradient(module, max_norm)

    def all_sum(self, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    def broadcast(self, value: Any) -> Any:
        return from_rank_0(value, self.device)

    def full_state(self, model: PreTrainedModel) -> State:
        state: State = model.state_dict()
        return state

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> Held:
        return named_state(optimizer) if self.rank == 0 else {}

    def save_optimizer(self, held: Held, directory: Path, *, group: dist.ProcessGroup | None = None) -> None:
        if self.rank == 0:
            save_state(held, directory, alone=True)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, directory: Path) -> None:
        load_state(optimizer, directory)


def freeze_whole(
    policy: RootModule, wanted: ParameterDtype, compute_dtype: torch.dtype, *, device: torch.device
) -> RootModule:
    """``policy`` on ``device`` without gradients, its parameters held as ``wanted`` says."""
    policy.requires_grad_(False)
    hold_in_bfloat16(policy, names_in_bfloat16(policy, wanted, compute_dtype))
    return policy.to(device)


def clip_gradient(module: nn.Module, max_norm: float | None) -> Tensor:
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)


def sum_over_ranks(values: Tensor) -> Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total


def from_rank_0(value: Any, device: torch.device) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device if device.type == "cuda" else None)
    return box[0]


def make_strategy(config: StrategyConfig | StrategyName, device: torch.device, *, zero: str | None = None) -> Strategy:
    """The strategy for this process; one without a process group trains alone, whatever it would be in a group.

    ``zero`` is the text of the file that ``config.config`` names, which this process need not see.
    """
    if isinstance(config, str):
        config = StrategyConfig(name=config)
    if config.name == "single" or not dist.is_initialized():
        return Single(device)
    if config.name == "ddp":
        return DDP(device, dist.get_rank(), dist.get_world_size(), config)
    if config.name == "fsdp2":
        from rayalign.engine.strategy.fsdp2 import FSDP2

        return FSDP2(device, dist.get_rank(), dist.get_world_size(), config)
    from rayalign.engine.strategy.deepspeed import DeepSpeed

    return DeepSpeed(device, dist.get_rank(), dist.get_world_size(), config, zero)
