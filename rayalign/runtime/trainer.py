"""Ray Train around the engine's loop: workers, restarts, and who is to blame for a failure.

Ray never learns of checkpoints: a restarted worker group finds the newest whole one itself. Its own run directory holds
nothing that a later attempt needs, so every attempt gets a fresh one.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from rayalign.data.rows import Layout
from rayalign.engine.checkpoint import IncompatibleCheckpoint
from rayalign.engine.loop import MakeSource, PolicyMismatch, TrainSpec, train
from rayalign.engine.step import NonFiniteStep
from rayalign.engine.strategy import Strategy, make_strategy
from rayalign.errors import UserError
from rayalign.manifest import TornDirectory
from rayalign.runtime.placement import Share
from rayalign.sources.off_policy import OffPolicySource, SourceSpec

log = logging.getLogger(__name__)

PERMANENT = (UserError, PolicyMismatch, NonFiniteStep, IncompatibleCheckpoint, TornDirectory)
"""Errors that another attempt would only repeat."""

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """One training run as its workers receive it: plain values and paths."""

    spec: TrainSpec
    source: SourceSpec
    held_out: SourceSpec | None
    strategy: str
    workers: int
    share: Share
    run: str
    """What progress calls this run."""
    retries: int = 3
    """Attempts after a lost worker, node or controller."""


class TrainingFailed(UserError):
    """Training stopped for a reason that another attempt would repeat."""


def worker_main(config: dict[str, Any]) -> str:
    """One Ray Train worker: build its strategy and its view of the data, then run the engine's loop."""
    job: TrainJob = config["job"]
    progress = config["progress"]
    torch.set_num_threads(job.share.threads)
    strategy = make_strategy(job.strategy, get_device())

    def on_step(row: Mapping[str, Any]) -> None:
        progress.put.remote(job.run, dict(row))

    final = train(
        job.spec,
        source_maker(job.source, strategy),
        strategy,
        make_held_out=source_maker(job.held_out, strategy) if job.held_out else None,
        on_step=on_step,
    )
    return str(final)


def source_maker(spec: SourceSpec, strategy: Strategy) -> MakeSource:
    """How this worker opens its part of the stored groups, once it knows its model's layout."""

    def make(layout: Layout, pad_id: int) -> OffPolicySource:
        return OffPolicySource(spec, layout=layout, pad_id=pad_id, rank=strategy.rank, world_size=strategy.world_size)

    return make


def fit(job: TrainJob, progress: ray.actor.ActorHandle, *, max_failures: int = 0) -> Path:
    """Train to the end and return the exported directory.

    A lost worker, node or controller is answered by another attempt, which continues from the newest whole
    checkpoint; an error of the run itself (bad data, a NaN loss, the user's own code) ends it at once as
    :class:`TrainingFailed`.
    ``max_failures`` lets Ray restart workers within one attempt as well.
    """
    for attempt in range(job.retries + 1):
        ray_directory = job.spec.directory / ".ray" / secrets.token_hex(4)
        trainer = TorchTrainer(
            worker_main,
            train_loop_config={"job": job, "progress": progress},
            torch_config=TorchConfig(backend="nccl" if job.share.gpus else "gloo", timeout_s=600),
            scaling_config=ScalingConfig(
                num_workers=job.workers, use_gpu=bool(job.share.gpus), resources_per_worker=job.share.resources()
            ),
            run_config=RunConfig(
                name=ray_directory.name,
                storage_path=str(ray_directory.parent),
                failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=0),
            ),
        )
        try:
            result = trainer.fit()
            return Path(str(result.return_value))
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as failure:
            blame_run(job, failure)
            if attempt == job.retries:
                raise TrainingFailed(
                    f"{job.spec.directory.name}: gave up after {attempt + 1} attempts: {failure}"
                ) from failure
            log.warning(
                "%s: attempt %d lost (%s); trying again", job.spec.directory.name, attempt + 1, first_line(failure)
            )
            time.sleep(min(30, 2**attempt))
        finally:
            shutil.rmtree(ray_directory.parent, ignore_errors=True)
    raise AssertionError("unreachable: the loop returns or raises")


def blame_run(job: TrainJob, failure: BaseException) -> None:
    """Raise :class:`TrainingFailed` if any worker failed through the run itself rather than through the cluster."""
    for rank, error in sorted(getattr(failure, "worker_failures", {}).items()):
        cause = root_cause(error)
        if isinstance(cause, PERMANENT):
            raise TrainingFailed(f"{job.spec.directory.name}: {cause}") from cause
        if not is_cluster_error(cause):
            raise TrainingFailed(
                f"{job.spec.directory.name}: worker {rank} raised {type(cause).__name__}: {cause}\n{error}"
            )


def root_cause(error: BaseException) -> BaseException:
    """The exception that the worker's own code raised, under Ray's wrappers."""
    inner = getattr(error, "_base_exc", None) or getattr(error, "cause", None)
    return root_cause(inner) if isinstance(inner, BaseException) else error


def is_cluster_error(error: BaseException) -> bool:
    """A process, node or connection went away; a peer's death reaches the others as a broken collective."""
    if isinstance(error, ray.exceptions.RayError | ray.train.TrainingFailedError | ConnectionError):
        return True
    text = str(error).lower()
    broken = ("connection closed", "connection reset", "broken pipe", "timed out", "nccl", "gloo", "process group")
    return isinstance(error, RuntimeError) and any(word in text for word in broken)


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
