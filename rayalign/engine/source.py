"""What the training loop consumes: the groups of one step, already packed for this worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rayalign.data.plan import StepCounts
from rayalign.types import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamWork:
    """One stream's part of one step on one worker."""

    stream: str
    micro_batches: tuple[PackedBatch, ...]
    """This worker's; every worker has the same number, dummies included."""
    counts: StepCounts
    """Of the whole step over all workers: the denominators of the loss."""
    groups_per_step: int
    epoch: float
    """Epochs of this stream finished when the step ends."""
    num_tokens: int
    """Tokens of the step's groups over all workers, each prompt counted once."""
    describe: Callable[[int], str] = "position {} of the stream".format
    """Names the group at a position of the stream in errors, such as its file and line."""


@runtime_checkable
class GroupSource(Protocol):
    """Yields the groups of any step, in any order of asking: nothing is consumed, so nothing is lost at a restart."""

    def get(self, step: int) -> tuple[StreamWork, ...]:
        """Work of step ``step`` (from 0). May wait, outside any collective."""
        ...
