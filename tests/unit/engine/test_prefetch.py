"""Reading one step ahead changes neither what is trained on nor where an error is raised."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
import torch

from rayalign.data.micro_batches import StepCounts
from rayalign.engine.batches import StreamWork
from rayalign.engine.prefetch import Prefetched, at_any_time, same_round

CPU = torch.device("cpu")


def work_of(step: int) -> tuple[StreamWork, ...]:
    counts = StepCounts(pairs=0, groups=1, sequences=1, tokens=1)
    return (
        StreamWork(stream="main", micro_batches=(), counts=counts, groups_per_step=1, epoch=float(step), num_tokens=1),
    )


@dataclass
class Read:
    """Batches that note who reads what; ``bad`` is a step that cannot be read."""

    bad: int | None = None
    by: list[tuple[int, str]] = field(default_factory=list)
    done: dict[int, threading.Event] = field(default_factory=dict)

    def get(self, step: int) -> tuple[StreamWork, ...]:
        self.by.append((step, threading.current_thread().name))
        self.done.setdefault(step, threading.Event()).set()
        if step == self.bad:
            raise OSError("a shard is gone")
        return work_of(step)


def test_every_step_is_read_once_and_the_next_one_in_a_thread() -> None:
    read = Read()
    batches = Prefetched(read, steps=4, device=CPU, is_there=at_any_time)
    assert [batches.get(step)[0].epoch for step in range(4)] == [0.0, 1.0, 2.0, 3.0]
    assert [step for step, _ in read.by] == [0, 1, 2, 3]
    assert [name.startswith("prefetch") for _, name in read.by] == [False, True, True, True]


def test_a_step_out_of_order_is_read_where_it_is_asked_for() -> None:
    read = Read()
    batches = Prefetched(read, steps=9, device=CPU, is_there=at_any_time)
    assert batches.get(5)[0].epoch == 5.0
    assert batches.get(2)[0].epoch == 2.0
    assert batches.get(3)[0].epoch == 3.0


def test_an_error_is_raised_in_its_own_step() -> None:
    read = Read(bad=2)
    batches = Prefetched(read, steps=4, device=CPU, is_there=at_any_time)
    batches.get(0)
    assert batches.get(1)[0].epoch == 1.0
    with pytest.raises(OSError, match="a shard is gone"):
        batches.get(2)


def test_a_round_that_is_not_drawn_is_not_waited_for_in_the_thread() -> None:
    """Steps 0 to 2 read round 0, and steps 3 to 5 read round 1."""
    read = Read()
    is_there = same_round(lambda step: (step // 3, 0))
    batches = Prefetched(read, steps=6, device=CPU, is_there=is_there)
    for step in range(6):
        batches.get(step)
    assert [step for step, name in read.by if not name.startswith("prefetch")] == [0, 3]
