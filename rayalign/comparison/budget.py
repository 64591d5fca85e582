"""What the training of a comparison has used of its budget, from the rows that its runs write anyway."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from rayalign.config.budget import BudgetConfig
from rayalign.stop import StopRequest
from rayalign.storage.place import Place
from rayalign.storage.progress import ObjectTail, Tail, tail_of

HOUR = 3600.0
READ_SECONDS = 0.5
"""Files on a network are not read more often."""


@dataclass(slots=True)
class Meter:
    """What one run has used: the rows of its ``metrics.jsonl``, those of earlier attempts included."""

    tail: Tail | ObjectTail
    devices: int
    """Devices of one worker: GPUs, or CPU cores where there is none."""
    seconds: dict[int, float] = field(default_factory=dict)
    """By step: one that is trained again after a restart counts once."""
    device_seconds: dict[int, float] = field(default_factory=dict)
    tokens: int = 0

    @classmethod
    def of(cls, directory: Place, devices: int) -> Meter:
        tail = tail_of(directory / "metrics.jsonl")
        tail.rewind()  # what is there counts
        return cls(tail, devices)

    def read(self) -> None:
        for line in self.tail.lines():
            row = json.loads(line)
            self.seconds[row["step"]] = row["seconds"]
            self.device_seconds[row["step"]] = row["seconds"] * row["workers"] * self.devices
            self.tokens = max(self.tokens, row["num_tokens"])


@dataclass(slots=True)
class Budget:
    """The limits of a comparison and the meters of its runs. Safe to use from several threads."""

    limits: BudgetConfig | None
    """None: there is no limit."""
    meters: dict[Place, Meter] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    read_every: float = READ_SECONDS
    read_at: float = float("-inf")
    exceeded: str = ""
    """The limit that was reached first, with what was used then."""

    def add(self, directory: Place, devices: int) -> None:
        """Count what the run in ``directory`` has used and uses, on so many devices per worker."""
        if self.limits is not None:
            with self.lock:
                self.meters.setdefault(directory, Meter.of(directory, devices))

    @property
    def asked(self) -> bool:
        """Whether training is to end. Once it is, it stays so."""
        if self.limits is None or self.exceeded:
            return bool(self.exceeded)
        with self.lock:
            if time.monotonic() - self.read_at < self.read_every:
                return bool(self.exceeded)
            self.read_at = time.monotonic()
            for meter in self.meters.values():
                meter.read()
            self.exceeded = limit_reached(self.limits, self.used())
        return bool(self.exceeded)

    def used(self) -> Mapping[str, float]:
        """By the names of the limits."""
        meters = self.meters.values()
        return {
            "device_hours": sum(sum(meter.device_seconds.values()) for meter in meters) / HOUR,
            "seconds": sum(sum(meter.seconds.values()) for meter in meters),
            "tokens_trained": sum(meter.tokens for meter in meters),
        }


def limit_reached(limits: BudgetConfig, used: Mapping[str, float]) -> str:
    """``tokens_trained: 1,024 of 1,000``, of the first limit that is reached; empty where none is."""
    for name, amount in used.items():
        limit = getattr(limits, name)
        if limit is not None and amount >= limit:
            shown = f"{amount:.3f}" if name == "device_hours" else f"{amount:,.0f}"
            return f"{name}: {shown} of {limit:,}"
    return ""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why training may end before its last step: somebody asks, or the budget is used up."""

    signals: StopRequest
    budget: Budget

    @property
    def asked(self) -> bool:
        return self.signals.asked or self.budget.asked

    @property
    def by_budget(self) -> bool:
        """Whether the budget, and nothing else, ended it."""
        return self.budget.asked and not self.signals.asked

    def patience(self) -> AbstractContextManager[None]:
        return self.signals.patience()
