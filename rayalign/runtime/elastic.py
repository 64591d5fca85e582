"""Elastic runs: as many workers as find room, from the fewest to the most that the run may have.

A run goes on with another number of workers from a checkpoint; the groups of its steps stay the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import ray
from ray._private.state import available_resources_per_node, state

from rayalign.errors import Stopped, UserError
from rayalign.runtime.placement import Share
from rayalign.runtime.stop import Stop
from rayalign.runtime.worker import TrainJob

LOOK_SECONDS = 5.0
LOOKS = 3
"""Times in a row that there must be room for more workers: a restart costs more than a short wait."""
SETTLE_SECONDS = 30.0
"""What a lost worker held is free after a while; until then fewer seem to fit than do."""
ROOM_SECONDS = 600.0


def room(share: Share) -> int:
    """Processes of ``share`` that fit into what nobody has reserved on the nodes that stay."""
    going = state.get_draining_nodes()
    return sum(fitting(share, free) for node, free in available_resources_per_node().items() if node not in going)


def capacity(share: Share) -> int:
    """Processes of ``share`` that the nodes that stay hold when nothing else runs on them."""
    going = state.get_draining_nodes()
    staying = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going)
    return sum(fitting(share, node["Resources"]) for node in staying)


def fitting(share: Share, free: dict[str, float]) -> int:
    """Ray counts in ten-thousandths."""
    return min(round(free.get(name, 0) * 10_000) // round(need * 10_000) for name, need in share.resources().items())


def wait_for_workers(job: TrainJob, *, taken: int, stop: Stop) -> int:
    """How many workers ``job`` begins with, ``taken`` of the places being for others.

    Raises:
        UserError: not even the fewest find room within ten minutes.
        Stopped: that was asked for meanwhile.
    """
    assert job.fewest is not None
    began = time.monotonic()
    while True:
        if stop.asked:
            raise Stopped("stopped while it waited for workers")
        found = min(job.workers, room(job.share) - taken)
        waited = time.monotonic() - began
        settled = waited > SETTLE_SECONDS or found >= min(job.workers, capacity(job.share) - job.beside)
        if found >= job.fewest and settled:
            return found
        if waited > ROOM_SECONDS:
            raise UserError(
                f"{job.run} waited {ROOM_SECONDS:.0f} s for {job.fewest} workers with {job.share.cpus:g} CPUs and "
                f"{job.share.gpus:g} GPUs each; free in the cluster: {ray.available_resources()}"
            )
        time.sleep(1)


@dataclass(slots=True, kw_only=True)
class Growth:
    """Notices that a run could have more workers than it has, and that this lasts."""

    job: TrainJob
    workers: int
    """That it has."""
    looks: int = 0
    looked: float = field(default_factory=time.monotonic)

    def is_due(self, *, taken: int) -> bool:
        """Looks at the cluster every few seconds, whenever it is called."""
        if self.job.fewest is None or self.workers == self.job.workers:
            return False
        if time.monotonic() - self.looked < LOOK_SECONDS:
            return False
        self.looked = time.monotonic()
        more = min(self.job.workers - self.workers, room(self.job.share) - taken)
        self.looks = self.looks + 1 if more > 0 else 0
        return self.looks >= LOOKS
