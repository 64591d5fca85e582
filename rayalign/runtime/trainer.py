"""Ray Train around the engine's loop: workers, restarts, and who is to blame for a failure.

Ray never learns of checkpoints: a restarted worker group finds the newest whole one itself. Its own run directory holds
nothing that a later attempt needs, so every attempt gets a fresh one.
"""

from __future__ import annotations

import logging
import pickle
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from rayalign.data.rows import Layout
from rayalign.engine.loop import MakeSource, TrainSpec, train
from rayalign.engine.strategy import Strategy, make_strategy
from rayalign.errors import UserError
from rayalign.runtime.failures import PERMANENT, first_line, is_lost, root_cause
from rayalign.runtime.placement import Share
from rayalign.runtime.progress import log_to
from rayalign.sources.off_policy import OffPolicySource, SourceSpec

log = logging.getLogger(__name__)

COLLECTIVE_SECONDS = 600
T = TypeVar("T")


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
    job: TrainJob = pickle.loads(config["job"])
    torch.set_num_threads(job.share.threads)
    strategy = make_strategy(job.strategy, get_device())
    if strategy.rank == 0:
        log_to(job.spec.directory)
    final = train(
        job.spec,
        source_maker(job.source, strategy),
        strategy,
        make_held_out=source_maker(job.held_out, strategy) if job.held_out else None,
    )
    return str(final)


def source_maker(spec: SourceSpec, strategy: Strategy) -> MakeSource:
    """How this worker opens its part of the stored groups, once it knows its model's layout."""

    def make(layout: Layout, pad_id: int) -> OffPolicySource:
        return OffPolicySource(spec, layout=layout, pad_id=pad_id, rank=strategy.rank, world_size=strategy.world_size)

    return make


def fit(job: TrainJob, *, max_failures: int = 0) -> Path:
    """Train to the end and return the exported directory.

    A lost worker, node or controller is answered by another attempt, which continues from the newest whole
    checkpoint; an error of the run itself (bad data, a NaN loss, the user's own code) ends it at once.
    ``max_failures`` lets Ray restart workers within one attempt as well, whatever their failure.

    Raises:
        TrainingFailed: the run failed by itself, or the cluster lost it ``job.retries`` + 1 times.
    """
    name = job.spec.directory.name
    for attempt in range(job.retries + 1):
        try:
            return fit_once(job, max_failures)
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as failure:
            blame_run(job, failure)
            if attempt == job.retries:
                raise TrainingFailed(f"{name}: gave up after {attempt + 1} attempts: {failure}") from failure
            log.warning("%s: attempt %d was lost (%s); trying again", name, attempt + 1, cluster_reason(failure))
            time.sleep(2**attempt)
    raise AssertionError("unreachable: the loop returns or raises")


def fit_once(job: TrainJob, max_failures: int) -> Path:
    ray_directory = job.spec.directory / ".ray" / secrets.token_hex(4)
    trainer = TorchTrainer(
        worker_main,
        train_loop_config={"job": pickle.dumps(job)},  # bytes: Ray's controller has no use for our modules
        torch_config=TorchConfig(backend="nccl" if job.share.gpus else "gloo", timeout_s=COLLECTIVE_SECONDS),
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
        return Path(str(in_thread(trainer.fit).return_value))
    finally:
        shutil.rmtree(ray_directory.parent, ignore_errors=True)


def in_thread(work: Callable[[], T]) -> T:
    """``work()`` in a thread of its own, which is left behind when this one is interrupted.

    In the main thread Ray Train takes over SIGINT for good, and ends the process as if it had succeeded.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result()


def blame_run(job: TrainJob, failure: BaseException) -> None:
    """Raise :class:`TrainingFailed` if any worker failed through the run itself rather than through the cluster."""
    for rank, error in sorted(worker_failures(failure).items()):
        cause = root_cause(error)
        if isinstance(cause, PERMANENT):
            raise TrainingFailed(f"{job.spec.directory.name}: {cause}") from cause
        if not is_lost(cause):
            raise TrainingFailed(
                f"{job.spec.directory.name}: worker {rank} raised {type(cause).__name__}: {cause}\n{failure}"
            ) from cause


def cluster_reason(failure: BaseException) -> str:
    """What happened to the cluster, in one line."""
    lost = worker_failures(failure)
    return "; ".join(f"worker {rank}: {first_line(error)}" for rank, error in sorted(lost.items())) or first_line(
        failure
    )


def worker_failures(failure: BaseException) -> dict[int, Exception]:
    return failure.worker_failures if isinstance(failure, ray.train.WorkerGroupError) else {}
