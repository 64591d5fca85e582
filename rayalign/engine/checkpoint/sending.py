"""The policy's weights on their way out of training: to the actors that sample them, and into files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rayalign.engine.batches import Rounds, State, Weights
from rayalign.engine.canary import canary_logps
from rayalign.engine.model.lora import ADAPTER, state_with_adapter_merged, write_adapter
from rayalign.engine.model.pretrained import is_renamed, save_pretrained, state_digest
from rayalign.engine.state import Run
from rayalign.storage.cache import working
from rayalign.storage.manifest import commit


def offer_weights(run: Run, rounds: Rounds | None) -> None:
    """Export the policy for the rounds that are drawn from it now; every worker learns which weights they are."""
    if rounds is None or not rounds.wants_weights(run.step):
        return
    began = time.perf_counter()
    state, _ = state_to_export(run)
    canary = canary_logps(
        run.model,
        layout=run.layout,
        dtype=run.runner.compute_dtype,
        policy=run.runner.module,
        device=run.strategy.device,
    )
    weights = export_weights(run, rounds, state, canary, began) if run.strategy.rank == 0 else None
    rounds.follow(run.strategy.broadcast(weights))


def export_weights(run: Run, rounds: Rounds, state: State, canary: tuple[float, ...], began: float) -> Weights:
    """Send the policy, write it where it must outlive this process, and say what was sent."""
    renamed = is_renamed(run.model)
    weights = Weights(
        step=run.step,
        attempt=run.checkpointer.attempt,
        digest=state_digest(state),
        directory=rounds.weights_folder(run.step, run.checkpointer.attempt, written=renamed),
        canary=canary,
        num_bytes=num_bytes(state),
    )
    if weights.directory is not None:
        with working(weights.directory) as folder:
            save_pretrained(run.model, run.tokenizer, folder, stop_ids=run.spec.stop_ids, state=state)
        commit(weights.directory, {"step": run.step, "attempt": weights.attempt, "digest": weights.digest})
    if not renamed:
        rounds.send(weights, state)
    return replace(weights, seconds_sending=time.perf_counter() - began)


def state_to_export(run: Run, *, copied: bool = False) -> tuple[State, Callable[[Path], None]]:
    """The policy's whole state on rank 0, any adapter merged, and what writes that adapter into a model's folder.

    All ranks call this alike. ``copied``: in the host's memory, where no later step changes it.
    """
    state, spec = run.strategy.full_state(run.model), run.spec.model
    if copied and run.strategy.rank == 0:
        state = copy_to_host(state, of=run.model)
    if spec.config.lora is None or run.strategy.rank != 0:
        return state, lambda directory: None
    write = partial(write_adapter, spec.config.lora, run.model, state, base=spec.name)
    return state_with_adapter_merged(run.model, state), lambda directory: write(directory / ADAPTER)


def copy_to_host(state: State, *, of: nn.Module | None = None) -> State:
    """``state`` in the host's memory; of what is tied there is one copy.

    Tensors there that share no memory with ``of`` are taken as they are.
    """
    owned = [*of.parameters(), *of.buffers()] if of is not None else []
    theirs = {memory_of(tensor)[0] for tensor in owned}
    made: dict[Any, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        place = memory_of(tensor)
        if tensor.device.type == "cpu" and of is not None and place[0] not in theirs:
            return tensor
        if place not in made:
            made[place] = tensor.detach().to("cpu", copy=True)
        return made[place]

    return {name: copy(tensor) for name, tensor in state.items()}


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Which memory a tensor, or this rank's part of it, views, and how; parts without content are compared by shape."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr(), local.storage_offset(), local.dtype, tensor.shape, local.stride()


def num_bytes(state: State) -> int:
    """Bytes of all tensors; those that are tied count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in state.values()}.values())
