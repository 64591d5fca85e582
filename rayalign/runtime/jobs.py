"""What the driver and its training workers tell one another, in an actor's memory.

A job is a pickle, and loading one runs what it says. It travels as every object between Ray's processes does. It never
lies in a file, where anyone who may write to the storage could put another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SECONDS = 600.0


class Notes(Protocol):
    """Bytes by name."""

    def write(self, name: str, content: bytes) -> None: ...

    def read(self, name: str) -> bytes | None:
        """None where nothing was written under that name, or nothing can be read any more."""
        ...

    def names(self) -> list[str]:
        """All of them; none where nothing can be read any more."""
        ...

    def is_there(self) -> bool:
        """Whether who made them still holds them."""
        ...


class NoteTable:
    """Keeps the notes; it unpickles none of them."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def write(self, name: str, content: bytes) -> None:
        self.held[name] = content

    def read(self, name: str) -> bytes | None:
        return self.held.get(name)

    def names(self) -> list[str]:
        return sorted(self.held)

    def is_there(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class RemoteNotes:
    """A :class:`NoteTable` in an actor; it lives as long as the process that made it holds the handle."""

    actor: ray.actor.ActorHandle

    @classmethod
    def start(cls, name: str) -> RemoteNotes:
        """A table on this process's node, so that no other node's loss takes it away."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(NoteTable).options(name=name, num_cpus=0, scheduling_strategy=here).remote())

    @classmethod
    def find(cls, name: str) -> RemoteNotes:
        """The table that another process of this Ray job started under ``name``."""
        return cls(ray.get_actor(name))

    def write(self, name: str, content: bytes) -> None:
        ray.get(self.actor.write.remote(name, content), timeout=SECONDS)

    def read(self, name: str) -> bytes | None:
        try:
            content: bytes | None = ray.get(self.actor.read.remote(name), timeout=SECONDS)
        except ray.exceptions.RayError:
            return None
        return content

    def names(self) -> list[str]:
        try:
            found: list[str] = ray.get(self.actor.names.remote(), timeout=SECONDS)
        except ray.exceptions.RayError:
            return []
        return found

    def is_there(self) -> bool:
        try:
            return bool(ray.get(self.actor.is_there.remote(), timeout=SECONDS))
        except ray.exceptions.RayError:
            return False

    def end(self) -> None:
        """End the table: workers that look into it find it gone."""
        ray.kill(self.actor)
