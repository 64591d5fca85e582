"""Ray Train around the engine's loop: workers, restarts, and who is to blame for a failure.

Ray never learns of checkpoints: a restarted worker group finds the newest whole one itself. Its own run directory holds
nothing that a later attempt needs, so every worker group gets a fresh one.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

import ray
import ray.train
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from rayalign.engine.checkpoint.checkpoint import newest_step
from rayalign.engine.metrics import last_logged_step
from rayalign.errors import Stopped, UserError, blocked_path_error
from rayalign.rounds.chunk import ChunkMaker
from rayalign.rounds.service import RolloutJob
from rayalign.runtime.elastic import Growth, Queue, wait_for_workers
from rayalign.runtime.failures import (
    PERMANENT,
    WHAT_TO_DO,
    describe_loss,
    failure_reason,
    is_lost,
    loss_kind,
    root_cause,
)
from rayalign.runtime.group import NotBegun, Shape, WorkerGroup
from rayalign.runtime.pool import Pool
from rayalign.runtime.weights import ObjectStore, make_board
from rayalign.runtime.worker import TrainJob
from rayalign.stop import Stop, StopRequest
from rayalign.storage.cache import node_cache
from rayalign.storage.disk import free_bytes, full_disk
from rayalign.storage.place import Place

log = logging.getLogger(__name__)


class TrainingFailed(UserError):
    """Training stopped for a reason that another attempt would repeat."""


class Trainer:
    """A worker group that trains one job after the other; it is started with the first and ends with the block.

    ``max_failures`` lets Ray restart workers within one attempt as well, whatever their failure. One thread at a time
    may use a trainer. Once ``stop`` is asked, the run that is under way ends after its step and no other one begins.
    """

    def __init__(self, *, max_failures: int = 0, stop: Stop | None = None) -> None:
        self.max_failures = max_failures
        self.stop: Stop = stop or StopRequest()
        self.group: WorkerGroup | None = None
        self.rollouts: tuple[RolloutJob, Pool] | None = None
        self.board: ray.actor.ActorHandle | None = None
        self.board_name = f"weights-{secrets.token_hex(4)}"
        """Its own: an actor lives as long as its maker's handle, and another trainer may end first."""
        self.places: dict[int, str] = {}
        """Where the workers of the attempt that failed last were."""

    def rollout_pool(self, job: RolloutJob) -> Pool:
        """The actors that draw for this trainer's runs; they stay while runs start from the same model."""
        if self.board is None:
            self.board = make_board(self.board_name)
        if self.rollouts is None or pool_key(self.rollouts[0]) != pool_key(job):
            self.close_rollouts()
            self.rollouts = (job, make_pool(replace(job, board=self.board_name)))
        return self.rollouts[1]

    def close_rollouts(self) -> None:
        if self.rollouts is not None:
            self.rollouts[1].close()
            self.rollouts = None

    def fit(self, job: TrainJob, lost: Callable[[str], None] = lambda reason: None) -> Place:
        """Train to the end and return the exported directory; ``lost`` gets the reason of every lost attempt.

        A lost worker, node or controller is answered by another attempt, which continues from the newest whole
        checkpoint; an error of the run itself (bad data, a NaN loss, the user's own code) ends it at once.

        Raises:
            TrainingFailed: the run failed by itself, or the cluster lost it ``job.retries`` + 1 times without a new
                checkpoint between them.
            Stopped: that was asked for before the last step was done.
        """
        name, checkpoints, in_vain = job.spec.directory.name, job.spec.directory / "checkpoints", 0
        reached = newest_step(checkpoints)
        attempt = 0
        while True:
            attempt += 1
            try:
                return self.placed_attempt(job)
            except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as failure:
                blame_run(job, failure)
                done = last_logged_step(job.spec.directory / "metrics.jsonl")
                what = cluster_reason(failure, self.places)
                lost(what)
                before, reached = reached, newest_step(checkpoints)
                in_vain = 0 if reached > before else in_vain + 1
                if in_vain > job.retries:
                    raise TrainingFailed(
                        f"{name}: gave up after {attempt} attempts, of which the last {in_vain} left no checkpoint; "
                        f"the last one was lost after step {done}: {what}. The same command continues from the newest "
                        f"checkpoint\n{failure}"
                    ) from failure
                log.warning("%s: attempt %d was lost after step %d (%s); trying again", name, attempt, done, what)
                # A node that is going may take the next attempt too; more and more patience where none gets further.
                time.sleep(2**in_vain)

    def placed_attempt(self, job: TrainJob) -> Place:
        """An attempt, once others leave room for it: until then nothing has begun that could be lost.

        Raises:
            UserError: there was no room for a day.
        """
        queue = Queue(job=job, workers=job.workers)
        while True:
            try:
                return self.attempt(job)
            except ray.train.ControllerError as failure:
                if not isinstance(failure.controller_failure, WorkerGroupStartupTimeoutError):
                    raise
                queue.wait_on()

    def attempt(self, job: TrainJob) -> Place:
        """Train once, with the workers of the job before if they have the right shape; any failure ends them."""
        while True:
            if self.stop.asked:
                raise Stopped("stopped at its newest checkpoint")
            sized = self.posted(self.sized(job))
            if self.group is None or self.group.shape != Shape.of(sized):
                self.close()
                self.group = WorkerGroup.start(sized, self.max_failures)
            growth = Growth(job=job, workers=sized.workers)
            try:
                return self.group.train(sized, partial(self.why_stop, growth))
            except NotBegun:  # workers that are starting look into their mailbox when they have, which takes long
                self.abandon()
                raise
            except Stopped:
                self.close()
                if self.stop.asked:
                    raise
            except BaseException:
                self.places = self.group.mailbox.places()
                self.abandon()
                raise

    def posted(self, job: TrainJob) -> TrainJob:
        """The job as its workers get it: they tell this trainer's board what they send."""
        if job.rollouts is None:
            return job
        return replace(job, rollouts=replace(job.rollouts, board=self.board_name))

    def sized(self, job: TrainJob) -> TrainJob:
        """The job with the number of workers that it has now: as configured, or as many as fit."""
        if job.fewest is None:
            return job
        if self.group is not None:
            kept = replace(job, workers=self.group.shape.workers)
            if job.fewest <= kept.workers <= job.workers and self.group.shape == Shape.of(kept):
                return kept
            self.close()
        return replace(job, workers=wait_for_workers(job, taken=self.taken(job), stop=self.stop))

    def taken(self, job: TrainJob) -> int:
        """Places that the job's rollout actors need and do not have so far."""
        return max(0, job.beside - (len(self.rollouts[1].actors) if self.rollouts else 0))

    def why_stop(self, growth: Growth, begun: bool) -> str | None:
        """Why the workers should end after their step, if they should; those that have not begun hold nothing yet."""
        if self.stop.asked:
            return "asked to stop: ends after this step; a second signal ends it at once"
        return "makes way for more workers" if begun and growth.is_due(taken=self.taken(growth.job)) else None

    def close(self) -> None:
        if self.group is not None:
            self.group.close()
            self.group = None

    def abandon(self) -> None:
        """Wait for no worker: those that live end with their job."""
        if self.group is not None:
            self.group.abandon()
            self.group = None

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End everything that was started."""
        self.close()
        self.close_rollouts()
        self.board = None


def make_pool(job: RolloutJob) -> Pool:
    """The actors that draw a run's rounds; they start with the first chunk."""
    return Pool(
        "rollouts",
        ChunkMaker,
        ObjectStore(board=job.board),
        share=job.share,
        most=job.most,
        least=job.least,
        python=job.drawing.rollout.python,
    )


def pool_key(job: RolloutJob) -> tuple[object, ...]:
    """What runs must have in common to be drawn for by the same actors: an engine takes weights of one shape only."""
    return job.share, job.most, job.least, job.drawing.rollout.python, job.spec.engine, job.spec.policy


def local_part(directory: Place) -> Path:
    """The disk that a run writes to first."""
    return directory if isinstance(directory, Path) else node_cache().root


def blame_run(job: TrainJob, failure: BaseException) -> None:
    """Raise :class:`TrainingFailed` if any worker failed through the run itself rather than through the cluster."""
    causes = {rank: root_cause(error) for rank, error in sorted(worker_failures(failure).items())}
    for cause in causes.values():
        if isinstance(cause, PERMANENT):
            raise TrainingFailed(f"{job.spec.directory.name}: {cause}") from cause
    for rank, cause in causes.items():
        if (full := full_disk(cause)) is not None:
            raise TrainingFailed(
                f"{job.spec.directory.name}: worker {rank} could not write ({full}); {job.spec.directory} has "
                f"{free_bytes(local_part(job.spec.directory)):,} bytes left. Free some space; the same command "
                "continues"
            ) from cause
        if (told := blocked_path_error(cause)) is not None:
            raise TrainingFailed(f"{job.spec.directory.name}: worker {rank}: {told}") from cause
        if not is_lost(cause):
            raise TrainingFailed(
                f"{job.spec.directory.name}: worker {rank} raised {type(cause).__name__}: {cause}\n{failure}"
            ) from cause


def cluster_reason(failure: BaseException, places: Mapping[int, str]) -> str:
    """What happened to the cluster, to which workers and where, and what to do."""
    lost = worker_failures(failure)
    if isinstance(failure, ray.train.ControllerError):
        failure = failure.controller_failure
    if lost:
        return describe_loss({rank: root_cause(error) for rank, error in lost.items()}, places)
    return f"{failure_reason(failure)}. {WHAT_TO_DO[loss_kind(failure)]}"


def worker_failures(failure: BaseException) -> dict[int, Exception]:
    return failure.worker_failures if isinstance(failure, ray.train.WorkerGroupError) else {}
