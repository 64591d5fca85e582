"""What a Ray Train worker does: take the next job out of the mailbox, run the engine's loop, answer, and wait again.

Starting workers costs some twenty seconds of a core, mostly imports, so that they stay for all jobs of one shape.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray.train
import torch
from ray import PlacementGroupID
from ray.train.torch import get_device
from ray.util.placement_group import PlacementGroup, get_current_placement_group

from rayalign.config.training import StrategyConfig
from rayalign.data.rows import Layout
from rayalign.engine import critic as actor_critic
from rayalign.engine.loop import train_policy
from rayalign.engine.prefetch import Prefetched, at_any_time, same_round
from rayalign.engine.state import MakeBatches, TrainSpec
from rayalign.engine.strategy.base import Strategy, make_strategy
from rayalign.errors import Stopped, UserError, first_line
from rayalign.placement import Share
from rayalign.rounds.client import RoundsClient, client_of
from rayalign.rounds.service import RolloutJob
from rayalign.rounds.source import StreamSource
from rayalign.rounds.streams import SourceSpec
from rayalign.runtime.jobs import Notes, RemoteNotes
from rayalign.runtime.preemption import DrainNotices
from rayalign.runtime.weights import ObjectStore
from rayalign.storage.place import Place, place_of
from rayalign.storage.progress import logging_to

POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """One training run as its workers receive it: plain values and paths."""

    spec: TrainSpec
    source: SourceSpec
    held_out: SourceSpec | None
    strategy: StrategyConfig
    workers: int
    """Number of workers; the most of an elastic run."""
    share: Share
    run: str
    """What progress calls this run."""
    rollouts: RolloutJob | None = None
    """How the driver draws the groups that this run trains on; None where all are stored."""
    stages: tuple[Place, ...] = ()
    """The folders of all stages that the run asked for."""
    fewest: int | None = None
    """Fewest workers of an elastic run; None where their number is fixed."""
    beside: int = 0
    """Processes that an elastic run leaves room for."""
    retries: int = 3
    """Attempts after a lost worker, node or controller."""
    zero: str | None = None
    """The text of the file that ``strategy.config`` names."""


@dataclass(frozen=True, slots=True)
class Mailbox:
    """What driver and workers tell one another: jobs go in, numbered, and the folder of each trained model comes out.

    Where the driver asks to stop, what comes out instead is how far the job is, and no further job is taken.
    """

    held: Notes

    def post(self, job: TrainJob) -> int:
        """Leave a job for the workers; returns its number."""
        number = sum(1 for name in self.held.names() if name.endswith(".job"))
        self.held.write(f"{number:06d}.job", pickle.dumps(job))
        return number

    def answer(self, number: int, final: Place) -> None:
        self.held.write(f"{number:06d}.final", str(final).encode())

    def answered(self, number: int) -> Place | None:
        """The answer to a job, once there is one; raises Stopped where it is that the job was stopped."""
        stopped = self.held.read(f"{number:06d}.stopped")
        if stopped is not None:
            raise Stopped(stopped.decode())
        found = self.held.read(f"{number:06d}.final")
        return place_of(found.decode()) if found else None

    def take(self, number: int) -> None:
        """Say that workers have begun with a job."""
        self.held.write(f"{number:06d}.taken", b"")

    def is_taken(self, number: int) -> bool:
        """Whether workers have begun with a job."""
        return self.held.read(f"{number:06d}.taken") is not None

    def ask_to_stop(self) -> None:
        """Let the workers end the job that they have after its step, and take no other one."""
        self.held.write("stop", b"")

    def stop_is_asked(self) -> bool:
        return self.held.read("stop") is not None

    def stopped(self, number: int, message: str) -> None:
        self.held.write(f"{number:06d}.stopped", message.encode())

    def register(self, rank: int) -> None:
        """Say where the worker of ``rank`` is, for messages about its loss."""
        self.held.write(f"{rank:06d}.worker", f"process {os.getpid()} on {socket.gethostname()}".encode())

    def places(self) -> dict[int, str]:
        """Where the workers are that have started."""
        told = {name: self.held.read(name) for name in self.held.names() if name.endswith(".worker")}
        return {int(name.removesuffix(".worker")): (text or b"").decode() for name, text in told.items()}

    def reserve(self, room: PlacementGroup) -> None:
        """Say which part of the cluster the workers are in."""
        self.held.write("room", room.id.hex().encode())

    def reserved(self) -> PlacementGroup | None:
        """The part of the cluster that workers were in, if any have started."""
        found = self.held.read("room")
        return PlacementGroup(PlacementGroupID.from_hex(found.decode())) if found else None

    def close(self) -> None:
        """Let the workers end when they are done with their job."""
        self.held.write("closed", b"")

    def jobs(self) -> Iterator[tuple[int, TrainJob]]:
        """Every job from the first unanswered one on, as they come, until the mailbox is closed or gone."""
        number = 0
        while self.answered(number):
            number += 1
        while True:
            job = self.held.read(f"{number:06d}.job")
            if job is not None:
                yield number, pickle.loads(job)
                number += 1
            elif not self.held.is_there() or self.held.read("closed") is not None:
                return
            else:
                time.sleep(POLL_SECONDS)


def worker_main(config: dict[str, Any]) -> None:
    """One Ray Train worker, from its start to the closing of the mailbox."""
    mailbox = Mailbox(RemoteNotes.find(config["mailbox"]))
    rank, room = ray.train.get_context().get_world_rank(), get_current_placement_group()
    mailbox.register(rank)
    if rank == 0 and room is not None:
        mailbox.reserve(room)
    for number, job in mailbox.jobs():
        torch.set_num_threads(job.share.threads)
        strategy = make_strategy(job.strategy, get_device(), zero=job.zero)
        if strategy.rank == 0:
            mailbox.take(number)
        try:
            with memory_errors(job.spec):
                final = train_job(job, strategy, mailbox.stop_is_asked)
        except Stopped as stopped:
            if strategy.rank == 0:
                mailbox.stopped(number, str(stopped))
            return
        if strategy.rank == 0:
            mailbox.answer(number, final)


@contextlib.contextmanager
def memory_errors(spec: TrainSpec) -> Iterator[None]:
    """Raise UserError, which names the settings to change, where a device's memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        is_lean = spec.model.config.gradient_checkpointing
        more = "" if is_lean else ", or write model.gradient_checkpointing: true"
        raise UserError(
            f"a training process has filled its device's memory: {first_line(error)} Lower "
            f"optim.tokens_per_micro_batch, spread the model with strategy: {{name: fsdp2}}{more}. The same "
            "command with --dry-run says what each part takes"
        ) from error


def train_job(job: TrainJob, strategy: Strategy, stop: Callable[[], bool]) -> Place:
    """This worker's part in one run; returns the exported directory.

    Raises:
        Stopped: ``stop`` said so, and there were steps left.
    """
    channel = weight_channel(job.rollouts) if job.rollouts else None
    rounds = client_of(job.source, rank=strategy.rank, world_size=strategy.world_size, channel=channel)
    make_batches = batch_maker(job.source, strategy, rounds)
    notices = DrainNotices()
    with logging_to(job.spec.directory if strategy.rank == 0 else None):
        if job.spec.critic is not None:
            if rounds is None:
                raise TypeError("a critic values rounds, and this run draws none")
            return actor_critic.train_with_critic(
                job.spec, make_batches, strategy, rounds=rounds, stop=stop, notices=notices
            )
        return train_policy(
            job.spec,
            read_ahead(make_batches, job.spec, strategy, rounds),
            strategy,
            rounds=rounds,
            make_held_out=batch_maker(job.held_out, strategy) if job.held_out else None,
            stop=stop,
            notices=notices,
        )


def read_ahead(
    make_batches: MakeBatches, spec: TrainSpec, strategy: Strategy, rounds: RoundsClient | None
) -> MakeBatches:
    """The same batches, each read while the step before it is trained on, unless its round has yet to be drawn."""
    is_there = at_any_time if rounds is None else same_round(rounds.place)

    def make(layout: Layout, pad_id: int) -> Prefetched:
        return Prefetched(make_batches(layout, pad_id), steps=spec.steps, device=strategy.device, is_there=is_there)

    return make


def weight_channel(rollouts: RolloutJob) -> ObjectStore | None:
    """None leaves the folder: the processes of one engine that share its weights each read their part there."""
    if rollouts.spec.options.tensor_parallel > 1:
        return None
    return ObjectStore(
        board=rollouts.board, keep=rollouts.plan.lag + 1, direct=rollouts.drawing.rollout.transfer == "nixl"
    )


def batch_maker(spec: SourceSpec, strategy: Strategy, rounds: RoundsClient | None = None) -> MakeBatches:
    """How this worker opens its part of the groups, once it knows its model's layout."""

    def make(layout: Layout, pad_id: int) -> StreamSource:
        return StreamSource(
            spec, layout=layout, pad_id=pad_id, rank=strategy.rank, world_size=strategy.world_size, rounds=rounds
        )

    return make
