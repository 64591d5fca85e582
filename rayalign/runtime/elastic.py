"""Elastic runs: as many workers as fit, from the fewest to the most that the run may have.

A run resumes with another number of workers from a checkpoint; the groups of its steps stay the same.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import ray
from ray._private.state import available_resources_per_node, state

from rayalign.errors import Stopped, UserError
from rayalign.placement import Share
from rayalign.runtime.worker import TrainJob
from rayalign.stop import Stop

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
LOOKS = 3
"""Times in a row that there must be room for more workers: a restart costs more than a short wait."""
SETTLE_SECONDS = 30.0
"""What a lost worker held is free after a while; until then fewer seem to fit than do."""
ROOM_SECONDS = 86400.0
"""A run waits for room as others on the cluster end or nodes are added, and gives up after a day."""
TELL_SECONDS = 300.0


def num_fitting_now(share: Share) -> int:
    """Processes of ``share`` that fit into what is free on the nodes that stay."""
    going = state.get_draining_nodes()
    return sum(
        num_fitting_node(share, free) for node, free in available_resources_per_node().items() if node not in going
    )


def capacity(share: Share) -> int:
    """Processes of ``share`` that the nodes that stay hold when nothing else runs on them."""
    going = state.get_draining_nodes()
    staying = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going)
    return sum(num_fitting_node(share, node["Resources"]) for node in staying)


def num_fitting_node(share: Share, free: dict[str, float]) -> int:
    """Ray counts in ten-thousandths."""
    return min(round(free.get(name, 0) * 10_000) // round(need * 10_000) for name, need in share.resources().items())


def wait_for_workers(job: TrainJob, *, taken: int, stop: Stop) -> int:
    """How many workers ``job`` begins with, ``taken`` of the places being for others.

    Raises:
        UserError: not even the fewest fit within a day.
        Stopped: that was asked for meanwhile.
    """
    assert job.fewest is not None
    queue = Queue(job=job, workers=job.fewest)
    while True:
        if stop.asked:
            raise Stopped("stopped while it waited for workers")
        found = min(job.workers, num_fitting_now(job.share) - taken)
        settled = queue.waited > SETTLE_SECONDS or found >= min(job.workers, capacity(job.share) - job.beside)
        if found >= job.fewest and settled:
            return found
        queue.wait_on()
        time.sleep(1)


@dataclass(slots=True, kw_only=True)
class Queue:
    """A run's wait for the room that it needs, told every few minutes."""

    job: TrainJob
    workers: int
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)

    @property
    def waited(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.began

    def wait_on(self) -> None:
        """Raise UserError after a day; before, say now and then who waits for what."""
        job = self.job
        what = (
            f"for {self.workers} workers with {job.share.cpus:g} CPUs and {job.share.gpus:g} GPUs each; "
            f"free in the cluster: {free_resources()}"
        )
        if self.waited > ROOM_SECONDS:
            raise UserError(f"{job.run} waited {self.waited / 3600:.0f} hours {what}")
        if time.monotonic() - self.told >= TELL_SECONDS:
            self.told = time.monotonic()
            log.warning("%s: has waited %.0f minutes %s", job.run, self.waited / 60, what)


def free_resources() -> str:
    """CPUs and GPUs that are free."""
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"


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
        more = min(self.job.workers - self.workers, num_fitting_now(self.job.share) - taken)
        self.looks = self.looks + 1 if more > 0 else 0
        return self.looks >= LOOKS
