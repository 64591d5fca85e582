"""The running cluster as ``rayalign doctor`` sees it: its nodes, the folder that all of them see, their clocks."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayalign.errors import UserError, first_line
from rayalign.placement import Node
from rayalign.runtime.session import Session, connect, running_cluster

ANSWER_SECONDS = 60.0
CONNECT_SECONDS = 3.0
SAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What one connection told."""

    started_here: bool
    nodes: tuple[Node, ...]
    storage: str
    """The folder that ``storage_path`` means on every node; empty where there is none."""
    storage_error: str
    offsets: Mapping[str, tuple[float, float]]
    """Other node → (its clock minus this one's, uncertainty), seconds."""


def address_to_join() -> str | None:
    """The cluster that a run would join; None where it would start Ray itself. Raises UserError where none answers.

    Ray itself waits for a minute and longer before it says so.
    """
    address = running_cluster()
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise UserError(f"the Ray cluster at {address} does not answer ({error.strerror or error})") from error
    return address


def look_at_cluster(storage_path: str) -> Cluster:
    """Join the running cluster, or start Ray here, and look at its nodes.

    Raises UserError where it cannot be joined, or where a node is lost meanwhile.
    """
    try:
        with connect() as session:
            return look_at_nodes(session, storage_path)
    except RayError as error:  # without the token, for example
        raise UserError(first_line(error)) from error


def look_at_nodes(session: Session, storage_path: str) -> Cluster:
    storage, problem = "", ""
    try:
        storage = str(session.storage(storage_path))
    except UserError as error:
        problem = str(error)
    return Cluster(
        started_here=session.started_here,
        nodes=session.nodes,
        storage=storage,
        storage_error=problem,
        offsets=clock_offsets(nodes_beside(session.nodes)),
    )


def nodes_beside(nodes: Sequence[Node]) -> list[Node]:
    here = ray.get_runtime_context().get_node_id()
    return [node for node in nodes if node.id != here]


def clock_offsets(nodes: Sequence[Node]) -> dict[str, tuple[float, float]]:
    """Node → (its clock minus this one's, half the shortest round trip), seconds; silent nodes are left out."""
    actor = ray.remote(num_cpus=0)(NodeClock)
    clocks = {
        f"{node.name} ({node.id[:6]})": actor.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote()
        for node in nodes
    }
    started = {clock.now.remote(): name for name, clock in clocks.items()}
    if not started:
        return {}
    answered, _ = ray.wait(list(started), num_returns=len(started), timeout=ANSWER_SECONDS)
    return {started[answer]: offset_of(clocks[started[answer]]) for answer in answered}


def offset_of(clock: ray.actor.ActorHandle) -> tuple[float, float]:
    """As Cristian (1989): of several round trips the shortest, and the clock's time against its middle."""
    samples = []
    for _ in range(SAMPLES):
        before = time.time()
        there = ray.get(clock.now.remote())
        after = time.time()
        samples.append(((after - before) / 2, there - (before + after) / 2))
    uncertainty, offset = min(samples)
    return offset, uncertainty


class NodeClock:
    """A process on another node."""

    def now(self) -> float:
        return time.time()
