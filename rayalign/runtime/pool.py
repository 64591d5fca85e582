"""Actors that do one kind of work, each one item at a time; what dies with its actor is done again by a new one."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import ray
import torch

from rayalign.errors import UserError, first_line
from rayalign.runtime.failures import root_cause
from rayalign.runtime.placement import Share

log = logging.getLogger(__name__)

START_SECONDS = 300.0
ITEM_SECONDS = 3600.0
MAX_ATTEMPTS = 4
"""Of one item: what kills every process that touches it is not a lost node."""


class Workshop:
    """One actor: makes its function with the first item."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], threads: int) -> None:
        torch.set_num_threads(threads)
        self.make = make
        self.arguments = arguments
        self.function: Callable[[Any], Any] | None = None

    def work(self, item: Any) -> Any:
        # Making it here and not above: of an error in an actor's constructor Ray keeps the text only.
        self.function = self.function or self.make(*self.arguments)
        return self.function(item)


class Pool:
    """``count`` actors around ``make(*arguments)``; safe to use from several threads.

    An item waits for an idle actor, so that no more is under way than there are actors. Actors start with the first
    item. Used as a context manager, or closed by hand.
    """

    def __init__(
        self, name: str, make: Callable[..., Callable[[Any], Any]], *arguments: Any, share: Share, count: int
    ) -> None:
        self.name = name
        self.make = make
        self.arguments = arguments
        self.share = share
        self.count = count
        self.idle: queue.Queue[ray.actor.ActorHandle | None] = queue.Queue()
        for _ in range(count):
            self.idle.put(None)

    def call(self, item: Any) -> Any:
        """The function's answer to ``item``.

        Raises:
            UserError: the function raised one; there is no room for the actors; or an item killed its actor, or took
                an hour, every time.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            actor = self.idle.get()
            try:
                actor = actor or self._start()
                return ray.get(actor.work.remote(item), timeout=ITEM_SECONDS)
            except ray.exceptions.RayActorError as error:
                actor = None
                if attempt == MAX_ATTEMPTS:
                    raise UserError(
                        f"{self.name}: a process died in each of {attempt} attempts at {described(item)}, as it does "
                        f"when memory runs out: {first_line(error)}"
                    ) from error
                log.warning("%s: a process died (%s); doing its work again", self.name, first_line(error))
            except ray.exceptions.GetTimeoutError as error:
                ray.kill(actor)
                actor = None
                raise UserError(
                    f"{self.name}: {described(item)} was not finished within {ITEM_SECONDS / 60:.0f} minutes"
                ) from error
            except ray.exceptions.RayTaskError as error:
                cause = root_cause(error)
                raise (cause if isinstance(cause, UserError) else error) from error
            finally:
                self.idle.put(actor)
        raise AssertionError("unreachable: the loop returns or raises")

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """Answers to ``items``, in order; the first error ends the work."""
        with ThreadPoolExecutor(self.count) as threads:
            waiting: list[Future[Any]] = [threads.submit(self.call, item) for item in items]
            try:
                for done in waiting:
                    yield done.result()
            finally:
                for future in waiting:
                    future.cancel()

    def close(self) -> None:
        """End the actors that are idle."""
        while not self.idle.empty():
            actor = self.idle.get()
            if actor is not None:
                ray.kill(actor)
        for _ in range(self.count):
            self.idle.put(None)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> ray.actor.ActorHandle:
        share = self.share
        refuse_impossible(self.name, share)
        workshop = ray.remote(Workshop).options(
            num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0, max_task_retries=0
        )
        actor = workshop.remote(self.make, self.arguments, share.threads)
        if not ray.wait([actor.__ray_ready__.remote()], timeout=START_SECONDS)[0]:
            ray.kill(actor)
            raise UserError(
                f"{self.name} waited {START_SECONDS:.0f} s for a process with {share.cpus:g} CPUs and {share.gpus:g} "
                f"GPUs; free in the cluster: {ray.available_resources()}"
            )
        return actor


def refuse_impossible(name: str, share: Share) -> None:
    """Raise UserError where no node, busy or not, is large enough for one actor."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= share.cpus and node.get("GPU", 0) >= share.gpus for node in nodes):
        return
    largest = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    raise UserError(
        f"{name} needs a node with {share.cpus:g} CPUs and {share.gpus:g} GPUs for each of its processes; "
        f"the nodes have {largest}"
    )


def described(item: Any) -> str:
    return str(getattr(item, "name", None) or type(item).__name__)
