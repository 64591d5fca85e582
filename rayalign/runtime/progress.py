"""Rows of metrics on their way from a worker to the person who waits."""

from __future__ import annotations

from typing import Any

import ray


@ray.remote(num_cpus=0)
class Progress:
    """A mailbox: workers put the newest row of each run, the driver takes what is new."""

    def __init__(self) -> None:
        self.latest: dict[str, dict[str, Any]] = {}

    def put(self, run: str, row: dict[str, Any]) -> None:
        self.latest[run] = row

    def take(self) -> dict[str, dict[str, Any]]:
        latest, self.latest = self.latest, {}
        return latest
