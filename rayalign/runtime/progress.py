"""Rows of metrics on their way from a worker to the person who waits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray

POLL_SECONDS = 0.5


class Mailbox:
    """Workers put the newest row of each run, the driver takes what is new."""

    def __init__(self) -> None:
        self.latest: dict[str, dict[str, Any]] = {}

    def put(self, run: str, row: dict[str, Any]) -> None:
        self.latest[run] = row

    def take(self) -> dict[str, dict[str, Any]]:
        latest, self.latest = self.latest, {}
        return latest


@contextlib.contextmanager
def watching(show: Callable[[str, Mapping[str, Any]], None]) -> Iterator[ray.actor.ActorHandle]:
    """A mailbox whose newest rows are handed to ``show(run, row)`` while the block runs."""
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(POLL_SECONDS):
            for run, row in ray.get(mailbox.take.remote()).items():
                show(run, row)

    poller = threading.Thread(target=poll, daemon=True)
    poller.start()
    try:
        yield mailbox
    finally:
        stop.set()
        poller.join()
        for run, row in ray.get(mailbox.take.remote()).items():
            show(run, row)
        ray.kill(mailbox)
