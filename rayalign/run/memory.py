"""What each training process of a run will hold in its device's memory, and which settings lower that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rayalign.config.model import Checkpointing, LoraConfig
from rayalign.config.run import RunConfig
from rayalign.config.training import ReferenceConfig, StrategyConfig
from rayalign.engine.memory import Activations, activation_bytes
from rayalign.engine.model.compiled import transformer_blocks
from rayalign.engine.model.head import CHUNK_BYTES
from rayalign.engine.model.loading import META
from rayalign.engine.model.pretrained import ModelSpec, compute_dtype, load_policy
from rayalign.errors import UserError
from rayalign.run.model import critic_model, reference_spec, trained_spec

FLOAT32 = 4
ADAM_MOMENTS = 2
GATHERED_BLOCKS = 2
"""Blocks whose parameters are whole at a time where they are sharded: one computes, and the next one is fetched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMemory:
    """Bytes on the device of one training process, where several micro-batches make a step."""

    parts: Mapping[str, int]
    remarks: tuple[str, ...] = ()
    """What is not in the numbers."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Over how many processes each kind of state is spread; 0: it waits in the host's memory."""

    parameters: int
    gradients: int
    optimizer: int

    @classmethod
    def of(cls, strategy: StrategyConfig, workers: int) -> Spread:
        if strategy.name == "fsdp2":
            if strategy.cpu_offload:
                return cls(parameters=0, gradients=0, optimizer=0)
            shards = strategy.shard or workers
            gradients = shards if strategy.sync_every_micro_batch else 1
            return cls(parameters=shards, gradients=gradients, optimizer=shards)
        if strategy.name == "deepspeed":
            whole = strategy.zero_stage != 3
            optimizer = 0 if strategy.cpu_offload else workers
            return cls(parameters=1 if whole else workers, gradients=workers, optimizer=optimizer)
        return cls(parameters=1, gradients=1, optimizer=1)


def worker_memory(run: RunConfig, *, device: torch.device, workers: int) -> WorkerMemory:
    """What one of ``workers`` training processes holds on a device of that type.

    Raises:
        UserError: there is no such model.
    """
    spread = Spread.of(run.strategy, workers)
    spec = trained_spec(run)
    parts = model_parts(skeleton_of(spec), spec, spread, run, device)
    remarks = parts.remarks
    found = dict(parts.parts)
    if run.reference_is_beside:
        reference = reference_spec(run)
        held = held_bytes(skeleton_of(reference), run.reference, compute_dtype(reference, device))
        found["reference"] = share(held, spread.parameters)
    if run.method.record.critic is not None:
        critic = critic_model(run)
        other = model_parts(skeleton_of(critic), critic, spread, run, device)
        kept = ("parameters", "gradients", "optimizer", "gathered parameters")
        found["critic"] = sum(other.parts.get(name, 0) for name in kept)
    return WorkerMemory(parts={name: size for name, size in found.items() if size}, remarks=remarks)


def skeleton_of(spec: ModelSpec) -> PreTrainedModel:
    """The model as it is trained, without weights and uncompiled."""
    plain = replace(spec, config=spec.config.model_copy(update={"compile": False, "gradient_checkpointing": False}))
    return load_policy(plain, place=META)[0]


def model_parts(
    skeleton: PreTrainedModel, spec: ModelSpec, spread: Spread, run: RunConfig, device: torch.device
) -> WorkerMemory:
    """What a model that is trained takes."""
    computes = compute_dtype(spec, device)
    trained = sum(own.numel() for own in skeleton.parameters() if own.requires_grad)
    frozen = sum(own.numel() for own in skeleton.parameters() if not own.requires_grad)
    width = FLOAT32 if run.strategy.name == "deepspeed" else computes.itemsize
    copies = ADAM_MOMENTS + (run.strategy.name == "deepspeed")  # which keeps the parameters once more
    parts = {
        "parameters": share(trained * FLOAT32 + frozen * width, spread.parameters),
        "gradients": share(trained * FLOAT32, spread.gradients),
        "optimizer": share(trained * FLOAT32 * copies, spread.optimizer),
    }
    is_sharded = spread.parameters != 1
    if is_sharded:
        parts["gathered parameters"] = gathered_bytes(skeleton, computes)
    remarks = ["frozen weights: as bfloat16 files hold them"] if frozen and width < FLOAT32 else []
    checkpointed = run.model.gradient_checkpointing
    try:
        found = activation_bytes(skeleton, tokens=run.optim.tokens_per_micro_batch, dtype=computes)
    except UserError as error:
        remarks.append(str(error))
    else:
        parts["activations"] = found.kept(checkpointed=checkpointed)
        parts["rounded weights"] = 0 if is_sharded else cast_bytes(found, checkpointed=checkpointed)
    parts["logits"] = logits_bytes(skeleton, computes, device) if spec.head is None else 0
    return WorkerMemory(parts=parts, remarks=tuple(remarks))


def share(size: int, processes: int) -> int:
    return -(-size // processes) if processes else 0


def cast_bytes(found: Activations, *, checkpointed: Checkpointing) -> int:
    """Weights that autocast has rounded: of all blocks until the backward, or of one."""
    return found.casts // max(1, len(found.blocks)) if checkpointed else found.casts


def gathered_bytes(skeleton: PreTrainedModel, computes: torch.dtype) -> int:
    """What is whole of sharded parameters at a time: some blocks, and embeddings and head in float32."""
    blocks = [count(block) for block in transformer_blocks(skeleton)]
    outside = count(skeleton) - sum(blocks)
    return GATHERED_BLOCKS * max(blocks, default=0) * computes.itemsize + outside * FLOAT32


def count(module: nn.Module) -> int:
    return sum(own.numel() for own in module.parameters())


def held_bytes(skeleton: PreTrainedModel, reference: ReferenceConfig, computes: torch.dtype) -> int:
    """What a frozen model takes."""
    width = FLOAT32 if reference.dtype == "float32" else computes.itemsize
    return count(skeleton) * width


def logits_bytes(skeleton: PreTrainedModel, computes: torch.dtype, device: torch.device) -> int:
    """A chunk of logits, the same rounded, and the head's gradient before it is added to the others."""
    head = skeleton.get_output_embeddings().weight
    rounded = head.numel() * computes.itemsize if computes != torch.float32 else 0
    gradient = head.numel() * FLOAT32 if head.requires_grad else 0
    chunk = CHUNK_BYTES[device.type]
    return chunk + chunk * computes.itemsize // FLOAT32 + rounded + gradient


def cheaper(run: RunConfig, workers: int) -> Iterator[tuple[str, RunConfig]]:
    """Settings that lower the memory of a training process, each with those before it, the cheapest first."""
    changes: list[tuple[str, str, dict[str, Any]]] = []
    stages: tuple[bool | str, ...] = ("selective", True) if not run.model.compile else (True,)
    later = stages[stages.index(run.model.gradient_checkpointing) + 1 :] if run.model.gradient_checkpointing else stages
    for how in later:
        named = str(how).lower()
        changes.append((f"model.gradient_checkpointing={named}", "model", {"gradient_checkpointing": how}))
    if run.strategy.name in ("single", "ddp") and workers > 1:
        changes.append(("strategy.name=fsdp2", "strategy", {"name": "fsdp2"}))
    if run.reference_is_beside:
        changes.append(("reference.place=pool", "reference", {"place": "pool"}))
    half = run.optim.tokens_per_micro_batch // 2
    changes.append((f"optim.tokens_per_micro_batch={half}", "optim", {"tokens_per_micro_batch": half}))
    if run.strategy.name == "fsdp2" and not run.strategy.cpu_offload:
        changes.append(("strategy.cpu_offload=true", "strategy", {"cpu_offload": True}))
    if run.model.lora is None and not run.model.from_scratch:
        changes.append(("model.lora.rank=16", "model", {"lora": LoraConfig(rank=16)}))
    for name, block, update in changes:
        changed = getattr(run, block).model_copy(update=update)
        run = run.model_copy(update={block: changed})
        yield name, run
