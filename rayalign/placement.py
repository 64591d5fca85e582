"""Shares of the machine: how many CPUs, GPUs and threads each of several processes gets. Pure arithmetic."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rayalign.errors import UserError

MOST_PER_CPU = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine of the cluster and what Ray may use of it."""

    id: str
    name: str
    cpus: float
    gpus: float


class Machine(Protocol):
    """What processes are placed on."""

    @property
    def nodes(self) -> tuple[Node, ...]: ...

    @property
    def num_gpus(self) -> float:
        """Sum over all nodes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process reserves."""

    cpus: float
    gpus: float
    threads: int

    @property
    def devices(self) -> int:
        """What is counted and paid for: GPUs, a shared one as a whole, or cores where there is none."""
        return 1 if self.gpus else self.threads

    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


GUEST = 0.1
"""Share of a GPU that an actor reserves: a worker's part leaves room for one such, and for no second worker."""


def host_share(each: Share) -> Share:
    """The part of a training worker that shares its device with a rollout actor, in turns."""
    return replace(each, gpus=round((1 - GUEST) * each.gpus, 4))


def guest_share(each: Share) -> Share:
    """The part of that actor: the worker's cores, which are idle then, and what is left of its GPU."""
    return replace(each, cpus=0.0, gpus=round(GUEST * each.gpus, 4))


def even_share(machine: Machine, processes: int, *, workers: int = 1) -> Share:
    """Equal shares for ``processes`` that run at the same time, of which runs of ``workers`` train together.

    Everything fits, on fractions of a CPU or a GPU if it must, except that the workers of one run never share a GPU:
    NCCL refuses that.

    Raises UserError naming what the cluster lacks.
    """
    if machine.num_gpus:
        return gpu_share([node for node in machine.nodes if node.gpus], processes, workers)
    cpus = [node.cpus for node in machine.nodes]
    sizes = [*range(int(max(cpus)), 0, -1), *(tenths / 10 for tenths in range(9, 0, -1))]
    for size in sizes:
        if num_fitting(cpus, size) >= processes:
            return Share(cpus=size, gpus=0.0, threads=max(1, int(size)))
    raise UserError(
        f"{processes} processes at the same time are more than {MOST_PER_CPU} for each of the cluster's "
        f"{sum(cpus):g} CPUs: lower strategy.workers, or add nodes"
    )


def elastic_share(machine: Machine, others: int, *, fewest: int, most: int) -> Share:
    """The share of each worker of a run that may have ``fewest`` to ``most``, and of each of ``others`` beside it.

    Where the most do not find a core (or a GPU) each, a worker has one all the same, so that nodes which join bring
    more workers; the fewest must find room.
    """
    if fewest == most:
        return even_share(machine, others + most, workers=most)
    with contextlib.suppress(UserError):
        roomy = even_share(machine, others + most, workers=most)
        if roomy.cpus >= 1 or roomy.gpus == 1:
            return roomy
    least = even_share(machine, others + fewest, workers=max(2, fewest))
    return least if least.gpus else replace(least, cpus=min(1.0, least.cpus), threads=1)


def gpu_share(nodes: Sequence[Node], processes: int, workers: int) -> Share:
    gpus = sum(int(node.gpus) for node in nodes)
    per_gpu = math.ceil(processes / gpus)
    if per_gpu > 1 and workers > 1:
        raise UserError(
            f"{processes} processes need a GPU each, the cluster has {gpus}: lower strategy.workers, add nodes, or "
            "let an autoscaler add them for rollouts: rollout: {actors: [0, 8], placement: separate}"
        )
    # Rounding down keeps the shares of one GPU together at most 1.
    fraction = 1.0 if per_gpu == 1 else math.floor(100 / per_gpu) / 100
    cpus = min(round_cpus(node.cpus / (int(node.gpus) * per_gpu)) for node in nodes)
    return Share(cpus=cpus, gpus=fraction, threads=max(1, int(cpus)))


def num_fitting(cpus: Sequence[float], size: float) -> int:
    """Processes of ``size`` CPUs that nodes with ``cpus`` hold; Ray counts in ten-thousandths of a CPU."""
    return sum(round(node * 10_000) // round(size * 10_000) for node in cpus)


def round_cpus(cpus: float) -> float:
    """Whole CPUs, or tenths of one."""
    return float(math.floor(cpus)) if cpus >= 1 else math.floor(cpus * 10) / 10
