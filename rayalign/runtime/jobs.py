"""Jobs on their way from the driver to training workers, in an actor's memory.

A job is a pickle, and loading one runs what it says. It travels as every object between Ray's processes does. It never
lies in a file, where anyone who may write to the storage could put another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SECONDS = 600.0


class Jobs(Protocol):
    """Pickled jobs by number."""

    def post(self, number: int, job: bytes) -> None: ...

    def get(self, number: int) -> bytes | None: ...


class JobTable:
    """Keeps the jobs; the actor unpickles none of them."""

    def __init__(self) -> None:
        self.held: dict[int, bytes] = {}

    def post(self, number: int, job: bytes) -> None:
        self.held[number] = job

    def get(self, number: int) -> bytes | None:
        return self.held.get(number)


@dataclass(frozen=True, slots=True)
class RemoteJobs:
    """A :class:`JobTable` in an actor; it lives as long as the process that made it holds the handle."""

    actor: ray.actor.ActorHandle

    @classmethod
    def start(cls, name: str) -> RemoteJobs:
        """A table on this process's node, so that no other node's loss takes it away."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(JobTable).options(name=name, num_cpus=0, scheduling_strategy=here).remote())

    @classmethod
    def find(cls, name: str) -> RemoteJobs:
        """The table that another process of this Ray job started under ``name``."""
        return cls(ray.get_actor(name))

    def post(self, number: int, job: bytes) -> None:
        ray.get(self.actor.post.remote(number, job), timeout=SECONDS)

    def get(self, number: int) -> bytes | None:
        job: bytes | None = ray.get(self.actor.get.remote(number), timeout=SECONDS)
        return job
