"""The workers of one shape: a worker group of Ray Train, its mailbox, and what becomes of them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR
from ray.util.placement_group import remove_placement_group

from rayalign.config.training import StrategyConfig
from rayalign.errors import Stopped
from rayalign.placement import Share
from rayalign.runtime.jobs import RemoteNotes
from rayalign.runtime.worker import POLL_SECONDS, Mailbox, TrainJob, worker_main
from rayalign.storage.place import Place

log = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0
T = TypeVar("T")


class NotBegun(Stopped):
    """The end was asked for before the workers had a job: they have nothing to save."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What jobs must have in common to be trained by the same workers."""

    strategy: StrategyConfig
    workers: int
    share: Share

    @classmethod
    def of(cls, job: TrainJob) -> Shape:
        return cls(job.strategy, job.workers, job.share)


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Running workers, their mailbox, and what becomes of them."""

    shape: Shape
    folder: Path
    """Ray Train's own; nothing in it is needed later."""
    notes: RemoteNotes
    ended: Future[ray.train.Result]

    @property
    def mailbox(self) -> Mailbox:
        return Mailbox(self.notes)

    @classmethod
    def start(cls, job: TrainJob, max_failures: int) -> WorkerGroup:
        token = secrets.token_hex(4)
        folder = ray_folder(job.spec.directory) / token
        folder.mkdir(parents=True)
        notes = RemoteNotes.start(f"mailbox-{token}")
        # Ray Train reads this one setting from the environment only, of the process that calls fit().
        os.environ[WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(job.strategy.timeout_seconds)
        trainer = TorchTrainer(
            worker_main,
            train_loop_config={"mailbox": f"mailbox-{token}"},
            torch_config=TorchConfig(
                backend=collective_backend(job), timeout_s=math.ceil(job.strategy.timeout_seconds)
            ),
            scaling_config=ScalingConfig(
                num_workers=job.workers, use_gpu=bool(job.share.gpus), resources_per_worker=job.share.resources()
            ),
            run_config=RunConfig(
                name=token,
                storage_path=str(folder),
                failure_config=FailureConfig(
                    max_failures=max_failures, max_preemption_failures=max_failures, controller_failure_limit=0
                ),
                worker_runtime_env=deepspeed_environment(job),
            ),
        )
        return cls(shape=Shape.of(job), folder=folder, notes=notes, ended=in_thread(trainer.fit))

    def train(self, job: TrainJob, why_stop: Callable[[bool], str | None]) -> Place:
        """Hand a job to the workers and wait for the answer; raises what ended the workers before, and Stopped."""
        number = self.mailbox.post(job)
        told = False
        while (final := self.mailbox.answered(number)) is None:
            if not told and (reason := why_stop(self.mailbox.is_taken(number))):
                log.warning("%s: %s", job.run, reason)
                self.mailbox.ask_to_stop()
                told = True
            if told and not self.mailbox.is_taken(number):
                raise NotBegun("stopped before it began")
            concurrent.futures.wait([self.ended], timeout=POLL_SECONDS)
            if self.ended.done() and (final := self.mailbox.answered(number)) is None:
                raise self.ended.exception() or self.unanswered(job)
        return final

    def unanswered(self, job: TrainJob) -> Exception:
        """Why the workers ended as if they had nothing to do; a mailbox that is lost is worth another attempt."""
        if not self.notes.is_there():
            lost: Exception = ray.exceptions.RayActorError(error_msg=f"the mailbox of {job.run} died")
            return lost
        return RuntimeError(f"the workers of {job.run} ended without an answer")

    def close(self) -> None:
        """End the workers, which have nothing to do, and free what they reserved."""
        self.mailbox.close()
        concurrent.futures.wait([self.ended], timeout=CLOSE_SECONDS)
        self.abandon()

    def abandon(self) -> None:
        """Free what workers that began have, and remove the mailbox: those that still live end with their job.

        A controller that was killed frees nothing, and what should free it instead (Ray's PlacementGroupCleaner) fails
        where the machine has a second Ray.
        """
        room = self.mailbox.reserved()
        if room is not None:
            with contextlib.suppress(ray.exceptions.RayError):  # where Ray itself is gone, so is the room
                remove_placement_group(room)
        with contextlib.suppress(ray.exceptions.RayError):
            self.notes.end()
        shutil.rmtree(self.folder.parent, ignore_errors=True)


def ray_folder(directory: Place) -> Path:
    """Where Ray Train may write for a run: beside it on a disk, else on this node; it goes with the worker group."""
    return directory / ".ray" if isinstance(directory, Path) else Path(tempfile.mkdtemp(prefix="rayalign-"))


def deepspeed_environment(job: TrainJob) -> dict[str, dict[str, str]] | None:
    """DeepSpeed asks the environment which device it has, once, when it is first imported."""
    if job.strategy.name != "deepspeed":
        return None
    return {"env_vars": {"DS_ACCELERATOR": "cuda" if job.share.gpus else "cpu"}}


def collective_backend(job: TrainJob) -> str:
    """What carries collectives; tensors that wait in the host's memory need one of their own."""
    if not job.share.gpus:
        return "gloo"
    return "cpu:gloo,cuda:nccl" if job.strategy.cpu_offload else "nccl"


def in_thread(work: Callable[[], T]) -> Future[T]:
    """``work()`` in a thread of its own, which is not waited for at the end of the process.

    In the main thread Ray Train takes over SIGINT for good, and ends the process as if it had succeeded.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome
