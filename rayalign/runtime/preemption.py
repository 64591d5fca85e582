"""Notices that a node will be taken back, as Ray Train passes them on to the workers of a run."""

from __future__ import annotations

import time
from dataclasses import dataclass

import ray.train

ASK_SECONDS = 2.0
"""Ray makes all workers meet for the answer, and looks at the nodes itself every five seconds."""


@dataclass(slots=True)
class DrainNotices:
    """One worker's ears: each node is reported once. See :class:`rayalign.engine.state.Notices`."""

    asked: float = float("-inf")
    known: frozenset[str] = frozenset()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self.asked < ASK_SECONDS:
            return False
        self.asked = now
        return True

    def heard(self) -> str | None:
        """Called by every worker after the same step, since Ray lets none pass alone."""
        info = ray.train.get_preemption_info()
        nodes = frozenset(info.preempted_node_ids) if info is not None else frozenset()
        if info is None or nodes <= self.known:
            return None
        self.known |= nodes
        ranks = ", ".join(map(str, info.preempted_ranks))
        left = "" if info.deadline_ms is None else f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
        return f"the cluster takes back the node of worker {ranks}{left}"
