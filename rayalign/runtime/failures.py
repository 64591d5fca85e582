"""Who is to blame for a failure in another process: the person who wrote something, the code, or the cluster."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import ray
from ray.train.v2._internal.exceptions import RayTrainError, WorkerHealthCheckFailedError

from rayalign.engine.checkpoint.checkpoint import IncompatibleCheckpoint
from rayalign.engine.first_step import PolicyMismatch
from rayalign.engine.step import NonFiniteStep
from rayalign.errors import UserError, first_line
from rayalign.rounds.workers import MAX_ATTEMPTS, ItemKilled
from rayalign.storage.manifest import TornDirectory

log = logging.getLogger(__name__)
T = TypeVar("T")

PERMANENT = (UserError, PolicyMismatch, NonFiniteStep, IncompatibleCheckpoint, TornDirectory)
"""Errors whose message says everything, and which another attempt would only repeat."""

BROKEN_COLLECTIVE = ("connection closed", "connection reset", "broken pipe", "timed out", "nccl", "gloo")
"""How the death of one worker reads to the others (RuntimeError)."""

MEMORY = re.compile(r"\boom\b|out of memory|running low on memory|memory pressure|sigkill", re.IGNORECASE)
NODE = re.compile(
    r"node (has|was|is|which).{0,40}(died|dead|terminated|lost|removed|preempted)|its node|node preemption",
    re.IGNORECASE,
)
TIME = re.compile(r"timed out|hanging", re.IGNORECASE)
PLACE = re.compile(r"^\s*ip: (\S+)", re.MULTILINE)

WHAT_TO_DO = {
    "memory": "If its node is short of memory, lower optim.tokens_per_micro_batch, train fewer workers on a node, or "
    "write model.gradient_checkpointing: true or strategy: fsdp2",
    "node": "Look at that machine, or at why the cluster took it back",
    "time": "If nothing was wrong with it, raise strategy.timeout_seconds",
    "process": "See train.log in the run's folder and Ray's logs of that process",
}
"""Kind of loss → what a person can do about it."""


def root_cause(error: BaseException) -> BaseException:
    """The exception that the remote code raised, under Ray's wrappers."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        return root_cause(error.cause)
    return error


def retry_lost_actors(
    name: str,
    attempt: Callable[[], T],
    *,
    what: str,
    attempts: int = MAX_ATTEMPTS,
    progress: Callable[[], int] = int,
) -> T:
    """The result of ``attempt``, which is made again when an actor died of it.

    ``progress`` counts what is finished for good: losses are counted from the last attempt that finished something.

    Raises:
        ItemKilled: actors died in ``attempts`` attempts in a row at ``what``, as they do when memory runs out.
    """
    losses, done = 0, progress()
    while True:
        try:
            return attempt()
        except ray.exceptions.RayActorError as error:
            reached = progress()
            losses, done = (losses if reached == done else 0) + 1, reached
            if losses == attempts:
                raise ItemKilled(
                    f"{name}: a process died in each of {losses} attempts at {what}, as it does when memory runs out: "
                    f"{first_line(error)}"
                ) from error
            log.warning("%s: a process died (%s); doing its work again", name, first_line(error))


def is_lost(error: BaseException) -> bool:
    """Whether a worker's failure is that of a process, node or connection: another attempt may succeed."""
    if isinstance(error, RayTrainError | ray.exceptions.RayError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and is_broken_collective(error)


def is_broken_collective(error: BaseException) -> bool:
    """Whether a worker failed because another one did not answer."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in BROKEN_COLLECTIVE)


def loss_kind(error: BaseException) -> str:
    """Which entry of :data:`WHAT_TO_DO` fits the loss of a worker."""
    found = (kind for kind, words in (("node", NODE), ("memory", MEMORY), ("time", TIME)) if words.search(str(error)))
    return "memory" if isinstance(error, ray.exceptions.OutOfMemoryError) else next(found, "process")


def describe_loss(lost: Mapping[int, BaseException], places: Mapping[int, str]) -> str:
    """Which workers were lost, where, and what can be done; ``places`` says where each rank was.

    A worker whose collective broke is no culprit: it waited for another one, which is named where it is known.
    """
    culprits = {rank: error for rank, error in lost.items() if not is_broken_collective(error)}
    silent = {rank: place for rank, place in places.items() if rank not in lost}
    told = [f"{worker_name(rank, places, error)}: {failure_reason(error)}" for rank, error in sorted(culprits.items())]
    if not culprits:
        waited = ", ".join(worker_name(rank, places) for rank in sorted(lost))
        words = failure_reason(next(iter(lost.values())))
        told = [
            f"{waited} waited in vain for {', '.join(worker_name(rank, places) for rank in sorted(silent)) or 'others'}"
        ]
        told[0] += f": {words}"
    kinds = {loss_kind(error) for error in (culprits or lost).values()}
    return ". ".join(["; ".join(told), *(WHAT_TO_DO[kind] for kind in sorted(kinds))])


def failure_reason(error: BaseException) -> str:
    """In one line; under Ray Train's word of a failed health check stands what really happened."""
    said = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error
    return first_line(said).rstrip(".")


def worker_name(rank: int, places: Mapping[int, str], error: BaseException | None = None) -> str:
    """A worker as a person can find it."""
    found = PLACE.search(str(error)) if error is not None else None
    place = places.get(rank) or (f"node {found.group(1)}" if found else "")
    return f"worker {rank} ({place})" if place else f"worker {rank}"
