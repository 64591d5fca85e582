"""Parameters, gradients and optimizer state in shards: torch's ``fully_shard`` on every block, then on the root."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayalign.config.training import OptimConfig, ParameterDtype, StrategyConfig
from rayalign.engine.batches import State
from rayalign.engine.checkpoint.optimizer_state import Held, load_state, named_state, save_state
from rayalign.engine.model.compiled import transformer_blocks
from rayalign.engine.model.forward import RootModule
from rayalign.engine.model.parameter_dtype import hold_in_bfloat16, names_in_bfloat16
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.optimizer import make_optimizer
from rayalign.engine.strategy.base import clip_gradient, from_rank_0, sum_over_ranks
from rayalign.engine.strategy.skeleton import CPU, META, load_on_rank_0, replace_parameters, spread_buffers
from rayalign.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FSDP2:
    """Each rank holds a part of every parameter, and all of a block only while it computes.

    With ``config.shard`` that many neighbouring ranks hold a copy of the model together (HSDP).

    Parameters, gradients and optimizer state are float32. Where autocast computes in bfloat16, matrices of blocks are
    gathered in bfloat16, as autocast would have made them; what autocast leaves in float32 (norms, embeddings, the
    residual stream) is gathered in float32, so that a forward gives the very bits of ``single``.
    """

    device: torch.device
    rank: int
    world_size: int
    config: StrategyConfig

    def load(self, spec: ModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Whole on rank 0, in the host's memory; a skeleton without weights on the others."""
        return load_on_rank_0(spec, self.device, self.rank)

    def wrap(
        self, policy: RootModule, optim: OptimConfig, *, compute_dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        if self.config.cpu_offload and self.device.type == "cpu":
            log.warning("strategy.cpu_offload changes nothing on a CPU, where parameters are in its memory anyway")
        # The head ends the forward and begins the backward: what the root gathers is kept between the two.
        self._spread(policy, compute_dtype, reshard_root=False)
        return policy, make_optimizer(policy, optim)

    def load_frozen(self, spec: ModelSpec) -> PreTrainedModel:
        return self.load(spec)[0]

    def freeze(self, policy: RootModule, wanted: ParameterDtype, *, compute_dtype: torch.dtype) -> nn.Module:
        """Nothing stays gathered between two forwards, the root's parameters neither: no backward follows."""
        policy.requires_grad_(False)
        names = names_in_bfloat16(policy, wanted, compute_dtype) if self.rank == 0 else None
        hold_in_bfloat16(policy, self.broadcast(names))
        self._spread(policy, compute_dtype, reshard_root=True)
        return policy

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)

    def forward_context(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(last or self.config.sync_every_micro_batch)
        module.set_is_last_backward(last)
        return contextlib.nullcontext()

    def clip(self, module: nn.Module, max_norm: float | None) -> Tensor:
        norm = clip_gradient(module, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def all_sum(self, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    def broadcast(self, value: Any) -> Any:
        return from_rank_0(value, self.device)

    def full_state(self, model: PreTrainedModel) -> State:
        """Gathered one parameter at a time, into rank 0's host memory."""
        held = model.state_dict()  # reshards what a forward without a backward left whole, the root's part too
        sharded = dict(model.named_parameters(remove_duplicate=False))
        gathered: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in held.items():
            key = id(sharded.get(name, tensor))
            if key not in gathered:
                gathered[key] = self._gathered(sharded.get(name, tensor))
            state[name] = gathered[key]
        return state

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> Held:
        return named_state(optimizer)

    def save_optimizer(self, held: Held, directory: Path, *, group: dist.ProcessGroup | None = None) -> None:
        save_state(held, directory, group=group)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, directory: Path) -> None:
        load_state(optimizer, directory)

    def _gathered(self, tensor: Tensor) -> Tensor:
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            moved: Any = whole.to(self.device)
            whole = moved.full_tensor()
        return whole.to(CPU) if self.rank == 0 else torch.empty(0)

    def _mesh(self) -> DeviceMesh:
        """All ranks share one copy of the model; or neighbours share one, and copies average their gradients."""
        shard = self.config.shard
        if shard is None:
            return init_device_mesh(self.device.type, (self.world_size,))
        if self.world_size % shard:
            raise UserError(
                f"strategy.shard: {self.world_size} workers are no whole number of copies of {shard}: write another "
                "number, or strategy.workers"
            )
        return init_device_mesh(
            self.device.type, (self.world_size // shard, shard), mesh_dim_names=("replicate", "shard")
        )

    def _spread(self, policy: RootModule, compute_dtype: torch.dtype, *, reshard_root: bool) -> None:
        mesh = self._mesh()
        whole = dict(policy.named_parameters())
        replace_parameters(policy, lambda parameter: torch.empty_like(parameter, device=META))
        self._shard(policy, mesh, compute_dtype, reshard_root=reshard_root)
        self._fill(policy, whole if self.rank == 0 else {})

    def _shard(self, policy: RootModule, mesh: DeviceMesh, compute_dtype: torch.dtype, *, reshard_root: bool) -> None:
        offload = CPUOffloadPolicy() if self.config.cpu_offload and self.device.type == "cuda" else OffloadPolicy()
        options: dict[str, Any] = {"mesh": mesh, "offload_policy": offload}
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in transformer_blocks(policy.model):
            reshard = self.config.reshard_after_forward
            if compute_dtype == torch.float32:
                fully_shard(block, reshard_after_forward=reshard, mp_policy=exact, **options)
                continue
            for module in vector_modules(block):
                fully_shard(module, reshard_after_forward=reshard, mp_policy=exact, **options)
            low = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(block, reshard_after_forward=reshard, mp_policy=low, **options)
        fully_shard(policy, reshard_after_forward=reshard_root, mp_policy=exact, **options)

    def _fill(self, policy: RootModule, whole: dict[str, nn.Parameter]) -> None:
        """Give every rank its part of rank 0's parameters, one after the other, and all of its buffers."""
        offloaded = self.config.cpu_offload and self.device.type == "cuda"
        names = {id(parameter): name for name, parameter in policy.named_parameters()}

        def part(parameter: nn.Parameter) -> Tensor:
            assert isinstance(parameter, DTensor)
            source = (
                whole.pop(names[id(parameter)]).detach()
                if self.rank == 0
                else torch.empty(parameter.shape, dtype=parameter.dtype)
            )
            spread = distribute_tensor(source.to(self.device), parameter.device_mesh, parameter.placements)
            return spread.to(CPU) if offloaded else spread

        replace_parameters(policy, part)
        spread_buffers(policy, over=self.device, to=self.device)


def vector_modules(block: nn.Module) -> Iterator[nn.Module]:
    """Modules of a block whose own parameters are vectors that autocast leaves alone: norms."""
    for module in block.modules():
        own = list(module.parameters(recurse=False))
        if own and all(parameter.ndim < 2 for parameter in own):
            yield module
