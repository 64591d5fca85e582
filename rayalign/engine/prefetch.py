"""The next step's groups are read and packed in a thread, while this one is trained on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from rayalign.engine.batches import Batches, StreamWork, map_tensors

Work = tuple[StreamWork, ...]


class Prefetched:
    """The same :class:`Batches`, one step ahead; what is read for a GPU lies in pinned memory.

    ``is_there(step)`` says whether the groups of a step can be read without a wait, so that a thread may do it.
    Errors of a step are raised where the step is asked for.
    """

    def __init__(self, batches: Batches, *, steps: int, device: torch.device, is_there: Callable[[int], bool]) -> None:
        self.batches = batches
        self.steps = steps
        self.pins = device.type == "cuda"
        self.is_there = is_there
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self.ahead: tuple[int, Future[Work]] | None = None

    def get(self, step: int) -> Work:
        ahead, self.ahead = self.ahead, None
        work = ahead[1].result() if ahead is not None and ahead[0] == step else self._read(step)
        following = step + 1
        if following < self.steps and self.is_there(following):
            self.ahead = (following, self.reader.submit(self._read, following))
        return work

    def _read(self, step: int) -> Work:
        work = self.batches.get(step)
        return tuple(map(pinned, work)) if self.pins else work


def pinned(part: StreamWork) -> StreamWork:
    """The work in memory that a GPU copies from while it computes."""
    moved = [map_tensors(batch, torch.Tensor.pin_memory) for batch in part.micro_batches]
    return replace(part, micro_batches=tuple(moved))


def same_round(place: Callable[[int], tuple[int, int]]) -> Callable[[int], bool]:
    """Whether a step reads the round that the step before it reads.

    ``place`` is that of :class:`rayalign.engine.batches.Rounds`.
    """
    return lambda step: place(step)[0] == place(step - 1)[0]


def at_any_time(step: int) -> bool:
    """Stored groups can be read at any time."""
    return True
