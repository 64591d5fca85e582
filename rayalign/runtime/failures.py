"""Who is to blame for a failure in another process: the person who wrote something, the code, or the cluster."""

from __future__ import annotations

import ray
from ray.train.v2._internal.exceptions import RayTrainError

from rayalign.engine.checkpoint import IncompatibleCheckpoint
from rayalign.engine.first_step import PolicyMismatch
from rayalign.engine.step import NonFiniteStep
from rayalign.errors import UserError
from rayalign.manifest import TornDirectory

PERMANENT = (UserError, PolicyMismatch, NonFiniteStep, IncompatibleCheckpoint, TornDirectory)
"""Errors whose message says everything, and which another attempt would only repeat."""

BROKEN_COLLECTIVE = ("connection closed", "connection reset", "broken pipe", "timed out", "nccl", "gloo")
"""How the death of one worker reads to the others (RuntimeError)."""


def root_cause(error: BaseException) -> BaseException:
    """The exception that the remote code raised, under Ray's wrappers."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        return root_cause(error.cause)
    return error


def is_lost(error: BaseException) -> bool:
    """Whether a worker's failure is that of a process, node or connection: another attempt may succeed."""
    if isinstance(error, RayTrainError | ray.exceptions.RayError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in BROKEN_COLLECTIVE)
