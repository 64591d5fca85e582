"""When a run's state is saved, and by whom: by the training thread, or by another one beside training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from rayalign.engine.batches import Rounds
from rayalign.engine.checkpoint.sending import copy_to_host, state_to_export
from rayalign.engine.state import Run
from rayalign.engine.strategy.base import Strategy
from rayalign.errors import Stopped
from rayalign.storage.cache import working
from rayalign.storage.disk import num_training_bytes, room_for
from rayalign.storage.place import ObjectPath, Place

log = logging.getLogger(__name__)
Write = Callable[[Path], None]
"""Writes something into a checkpoint's folder; rank 0 calls it."""
SharedWrite = Callable[[Path, dist.ProcessGroup | None], None]
"""The same, called by every rank, with the group in which they meet; rank 0 returns when all have written."""


@runtime_checkable
class Beside(Protocol):
    """A model that is trained beside the policy, with an optimizer of its own."""

    model: PreTrainedModel

    def written(self, copied: bool) -> SharedWrite:
        """What writes both below a checkpoint, as they are now if ``copied``; all ranks call this alike."""
        ...


class Writer:
    """Writes one checkpoint at a time: at once, or in a thread of its own, which every worker of a team has.

    The threads of a team meet in a group of their own, for a collective of one must not meet the training's. An error
    in the thread is raised by the next call here, and by the end of the block; unless the block ends with another one.
    """

    def __init__(self, *, asynchronous: bool, strategy: Strategy) -> None:
        self.group = dist.new_group(backend="gloo") if asynchronous and strategy.world_size > 1 else None
        self.thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self.pending: Future[None] | None = None

    @property
    def asynchronous(self) -> bool:
        return self.thread is not None

    def submit(self, write: Callable[[], None]) -> None:
        """Have ``write`` done once what was submitted before it is."""
        self.wait()
        if self.thread is None:
            write()
        else:
            self.pending = self.thread.submit(write)

    def check(self) -> None:
        """Raise what went wrong in the thread, if it is known by now."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when everything is written; raises what went wrong."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            log.warning("the checkpoint that was being written is lost: %s", failure)
        finally:
            if self.thread is not None:
                self.thread.shutdown()
            if self.group is not None:
                dist.destroy_process_group(self.group)


def checkpoint_is_due(run: Run) -> bool:
    last = run.step == run.spec.steps
    return last or run.urgent or run.step % run.spec.checkpoint.every == 0 or run.step in run.spec.checkpoint_at


def refuse_stopped(run: Run, writer: Writer, save: Callable[[], None]) -> None:
    """Raise :class:`Stopped` if there are steps left, once all that are done are saved. All ranks call this alike."""
    if run.step == run.spec.steps:
        return
    if run.saved < run.step:
        save()
    writer.wait()
    raise Stopped(f"stopped after step {run.step} of {run.spec.steps}")


def save_checkpoint(
    run: Run,
    writer: Writer,
    rounds: Rounds | None,
    *,
    beside: Beside | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Commit a checkpoint: every rank writes what it alone holds, rank 0 the rest.

    Where that happens beside training, the state is copied into the host's memory first, and this returns then; what
    was being saved before is committed by then. ``beside`` and ``facts`` are what the state of another loop has beyond
    the policy's.
    """
    began = time.perf_counter()
    writer.wait()
    strategy, later = run.strategy, writer.asynchronous
    state, adapter = state_to_export(run, copied=later)
    held = strategy.optimizer_state(run.optimizer)
    run.saved = run.step
    writer.submit(
        partial(
            write_checkpoint,
            run,
            directory=run.checkpointer.directory(run.step),
            step=run.step,
            wanted=sum(num_training_bytes(part.model) for part in (run, beside) if part is not None),
            state=state,
            held=copy_to_host(held) if later else held,
            group=writer.group,
            adapter=adapter,
            beside=beside.written(later) if beside is not None else None,
            facts={**checkpoint_facts(run, rounds), **facts} if strategy.rank == 0 else {},
        )
    )
    if run.urgent:
        writer.wait()  # a worker may be gone before it is written
    run.seconds_saving += time.perf_counter() - began


def write_checkpoint(
    run: Run,
    *,
    directory: Place,
    step: int,
    wanted: int,
    state: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    group: dist.ProcessGroup | None,
    adapter: Write,
    beside: SharedWrite | None,
    facts: Mapping[str, Any],
) -> None:
    """This rank's part of one checkpoint; of ``run`` it reads what no step changes.

    Raises:
        DiskFull: what there was of it is removed.
    """
    with room_for(directory, wanted):
        with working(directory) as folder:
            run.strategy.save_optimizer(held, folder, group=group)
            if beside is not None:
                beside(folder, group)
            if run.strategy.rank == 0:
                adapter(folder)
        if isinstance(directory, ObjectPath) and run.strategy.world_size > 1:
            dist.barrier(group)  # what another worker sends after the commit would not be part of it
        if run.strategy.rank == 0:
            run.checkpointer.save(
                step, model=run.model, tokenizer=run.tokenizer, stop_ids=run.spec.stop_ids, facts=facts, state=state
            )


def checkpoint_facts(run: Run, rounds: Rounds | None) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run at its step."""
    return {
        "num_tokens": run.num_tokens,
        "skipped": (run.skipped_steps, run.skipped_in_a_row),
        "source": rounds.state(run.step) if rounds is not None else {},
        "environment": numeric_environment(run.strategy),
        "metrics": measurements(run),
    }


def numeric_environment(strategy: Strategy) -> dict[str, Any]:
    """What results depend on by rounding."""
    return {
        "strategy": strategy.config.name,
        "workers": strategy.world_size,
        "threads": torch.get_num_threads(),
        "device": strategy.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def measurements(run: Run) -> dict[str, float]:
    """What the row of the newest step says in finite numbers, for telling the best checkpoint."""
    row = run.row if run.row.get("step") == run.step else {}
    numbers = {name: float(value) for name, value in row.items() if type(value) in (int, float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
