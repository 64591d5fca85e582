"""DeepSpeed's ZeRO: gradients and optimizer state in shards (stage 2), or parameters too (stage 3)."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayalign.config.training import OptimConfig, StrategyConfig
from rayalign.engine.batches import State
from rayalign.engine.checkpoint.optimizer_state import FOLDER, Held, UnreadableOptimizer
from rayalign.engine.model.forward import Policy, RootModule
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.optimizer import make_optimizer
from rayalign.engine.strategy.base import from_rank_0, sum_over_ranks
from rayalign.engine.strategy.skeleton import CPU, load_on_rank_0, replace_parameters, spread_buffers
from rayalign.engine.strategy.zero_config import with_buckets, zero_config
from rayalign.errors import MissingExtra
from rayalign.storage.disk import save_object
from rayalign.types import PackedBatch, Scores

PARTS = "zero-*-of-*.pt"
STAGE = "stage"
"""What a part calls the stage that wrote it."""
NAMES = tuple(field.name for field in fields(Scores))


@dataclass(frozen=True, slots=True)
class DeepSpeed:
    """Rank 0 reads the model into the host's memory; DeepSpeed sends its parameters, one after the other."""

    device: torch.device
    rank: int
    world_size: int
    config: StrategyConfig
    file: str | None = None
    """The text of the user's own JSON."""

    def load(self, spec: ModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_on_rank_0(spec, self.device, self.rank)

    def wrap(
        self, policy: RootModule, optim: OptimConfig, *, compute_dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        deepspeed = import_deepspeed()
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))
        config = with_buckets(
            zero_config(self.config, optim, self.file, bfloat16=compute_dtype == torch.bfloat16),
            policy.model.config.get_text_config().hidden_size,
        )
        if self.rank != 0:  # room that no memory is taken for before something is written there
            replace_parameters(policy, lambda parameter: torch.empty_like(parameter, device=CPU))
        spread_buffers(policy, over=self.device, to=CPU)
        tuples = Tuples(policy)
        adam = make_optimizer(policy, optim)
        engine, *_ = deepspeed.initialize(model=tuples, optimizer=adam, config=config, dist_init_required=False)
        if config["zero_optimization"]["stage"] == 3:
            for parameter in head_parameters(policy):
                deepspeed.zero.register_external_parameter(tuples, parameter)
        return Engine(engine), cast(torch.optim.Optimizer, ZeroOptimizer(engine))

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        deepspeed_engine(module).backward(loss, scale_wrt_gas=False)

    def forward_context(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def clip(self, module: nn.Module, max_norm: float | None) -> Tensor:
        """DeepSpeed averages, clips and updates in one call; it updates nothing where the norm is not finite."""
        engine = deepspeed_engine(module)
        engine.step()
        return torch.as_tensor(engine.get_global_grad_norm())

    def all_sum(self, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    def broadcast(self, value: Any) -> Any:
        return from_rank_0(value, self.device)

    def full_state(self, model: PreTrainedModel) -> State:
        """Copies, since parameters of a rank lie in one buffer; gathered one after the other where they are sharded."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        copies: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            found = parameters.get(name, tensor)
            if id(found) not in copies:
                with gather_parameter(found):
                    copies[id(found)] = found.detach().cpu().clone() if self.rank == 0 else torch.empty(0)
            state[name] = copies[id(found)]
        return state

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> Held:
        return zero_of(optimizer).state()

    def save_optimizer(self, held: Held, directory: Path, *, group: dist.ProcessGroup | None = None) -> None:
        (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        save_object(dict(held), directory / FOLDER / f"zero-{self.rank + 1:05d}-of-{self.world_size:05d}.pt")
        everybody = torch.zeros(1, device=self.device if group is None else "cpu")
        dist.all_reduce(everybody, group=group)  # all parts are there

    def load_optimizer(self, optimizer: torch.optim.Optimizer, directory: Path) -> None:
        paths = sorted((directory / FOLDER).glob(PARTS))
        if len(paths) != self.world_size:
            refuse_other_parts(directory, f"deepspeed with {self.world_size} workers")
        found = torch.load(paths[self.rank], weights_only=True, map_location="cpu")
        if int(found[STAGE]) != zero_of(optimizer).stage:
            refuse_other_parts(directory, f"ZeRO stage {zero_of(optimizer).stage}")
        zero_of(optimizer).load(found)


class Tuples(nn.Module):
    """The policy with its answer as a tuple: DeepSpeed's hooks, which this class alone has, understand nothing else."""

    def __init__(self, policy: RootModule) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: PackedBatch, **options: Any) -> tuple[Tensor | None, ...]:
        scores = self.policy.forward(batch, **options)
        return tuple(getattr(scores, name) for name in NAMES)


class Engine(nn.Module):
    """DeepSpeed's engine, which answers with :class:`Scores` as the policy does."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, batch: PackedBatch, **options: Any) -> Scores:
        return Scores(**dict(zip(NAMES, self.engine(batch, **options), strict=True)))


class ZeroOptimizer:
    """The engine's AdamW where the loop has its own; the engine zeroes gradients and updates by itself."""

    def __init__(self, engine: Any) -> None:
        self.zero = engine.optimizer
        self.stage = int(engine.zero_optimization_stage())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.zero.param_groups
        return groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The engine does it after every update."""

    def step(self) -> None:
        """The engine did it: see :meth:`DeepSpeed.clip`."""

    @property
    def partitions(self) -> list[Tensor]:
        """This rank's float32 parts of the parameters, which AdamW's state belongs to; the weights give them again."""
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.zero, name))

    def state(self) -> Held:
        """The stage, and AdamW's state by number of the partition and name."""
        held = {STAGE: torch.tensor(self.stage)}
        for number, part in enumerate(self.partitions):
            held |= {f"{number}.{name}": value for name, value in self.zero.optimizer.state[part].items()}
        return held

    def load(self, held: Held) -> None:
        for number, part in enumerate(self.partitions):
            own = {name: value for name, value in held.items() if name.partition(".")[0] == str(number)}
            self.zero.optimizer.state[part] = {
                name.partition(".")[2]: value.to(part.device) for name, value in own.items()
            }


def zero_of(optimizer: Any) -> ZeroOptimizer:
    assert isinstance(optimizer, ZeroOptimizer)
    return optimizer


def deepspeed_engine(module: nn.Module) -> Any:
    assert isinstance(module, Engine)
    return module.engine


def head_parameters(policy: RootModule) -> list[Tensor]:
    """What the root's forward uses without calling the module that holds it."""
    head = policy.model.get_output_embeddings() if isinstance(policy, Policy) else policy.model.score
    return list(head.parameters())


def gather_parameter(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """While the block runs, every rank holds all of a parameter."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = import_deepspeed().zero.GatheredParameters([tensor])
    return context


def refuse_missing_deepspeed() -> None:
    """Raises MissingExtra where deepspeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtra("deepspeed", "deepspeed")


def import_deepspeed() -> Any:
    refuse_missing_deepspeed()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def refuse_other_parts(directory: Path, wanted: str) -> None:
    held = sorted(path.name for path in (directory / FOLDER).iterdir())
    raise UnreadableOptimizer(
        f"{directory} holds the optimizer as {', '.join(held)}, which {wanted} cannot read: DeepSpeed's parts fit the "
        "workers and the stage that wrote them, and no other strategy. Continue with what wrote them; or resume from "
        "the weights alone, with a new optimizer: checkpoint.restart_optimizer=true"
    )
