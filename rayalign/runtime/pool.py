"""Actors that do one kind of work, each one item at a time; what dies with its actor is done again by a new one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

import ray
import torch

from rayalign.errors import UserError, blocked_path_error
from rayalign.placement import Share
from rayalign.rounds.workers import MAX_ATTEMPTS, ItemKilled, PoolClosed
from rayalign.runtime.failures import retry_lost_actors, root_cause

Actor: TypeAlias = ray.actor.ActorHandle

START_SECONDS = 600.0
"""How long a pool waits for its first actor, by default."""
ITEM_SECONDS = 3600.0
IDLE_SECONDS = 60.0
POLL_SECONDS = 0.02
LONGEST_TITLE = 200


class PoolActor:
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
    """Up to ``most`` actors around ``make(*arguments)``; safe to use from several threads.

    An item waits for an idle actor, so that no more is under way than there are actors. Actors start with the items; a
    cluster with room for some of them is used as far as it goes. Those above ``least`` end when they have had nothing
    to do for a minute, so that an autoscaler can take their nodes back. Used as a context manager, or closed by hand.
    """

    def __init__(
        self,
        name: str,
        make: Callable[..., Callable[[Any], Any]],
        *arguments: Any,
        share: Share,
        most: int,
        least: int | None = None,
        python: str | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.name = name
        self.make = make
        self.arguments = arguments
        self.share = share
        self.most = most
        self.least = most if least is None else least
        self.python = python
        self.start_seconds = start_seconds
        self.lock = threading.Lock()
        self.actors: list[Actor] = []
        self.idle: list[Actor] = []
        self.pending: list[tuple[Actor, ray.ObjectRef]] = []
        """Asked for, and without a place so far; each with what is there once it has one."""
        self.closed = False
        self.waiting = 0
        """Callers without an actor."""
        self.last_used = time.monotonic()

    def call(self, item: Any, attempts: int = MAX_ATTEMPTS) -> Any:
        """The function's answer to ``item``; one that dies of it is replaced, until ``attempts`` have.

        Raises:
            ItemKilled: every actor that was given the item died.
            UserError: the function raised one; there is no room for an actor; or the item took an hour.
        """
        return retry_lost_actors(self.name, partial(self._call_once, item), attempts=attempts, what=item_in_words(item))

    def _call_once(self, item: Any) -> Any:
        actor = self._take()
        try:
            return ray.get(actor.work.remote(item), timeout=ITEM_SECONDS)
        except ray.exceptions.RayActorError as error:
            if self.closed:
                raise PoolClosed from error
            self._bury(actor)
            raise
        except ray.exceptions.GetTimeoutError as error:
            self._bury(actor)
            raise UserError(
                f"{self.name}: {item_in_words(item)} was not finished within {ITEM_SECONDS / 60:.0f} minutes"
            ) from error
        except ray.exceptions.RayTaskError as error:
            cause = root_cause(error)
            raise (cause if isinstance(cause, UserError) else blocked_path_error(cause) or error) from error
        finally:
            self._give_back(actor)

    def map(self, items: Iterable[Any], rescue: Callable[[Any, ItemKilled], Any] | None = None) -> Iterator[Any]:
        """Answers to ``items``, in order; the first error ends the work.

        ``rescue`` answers in the place of actors for an item that killed them all.
        """

        def answer(item: Any) -> Any:
            try:
                return self.call(item)
            except ItemKilled as error:
                if rescue is None:
                    raise
                return rescue(item, error)

        with ThreadPoolExecutor(self.most) as threads:
            waiting: list[Future[Any]] = [threads.submit(answer, item) for item in items]
            try:
                for done in waiting:
                    yield done.result()
            finally:
                for future in waiting:
                    future.cancel()

    def tell(self, item: Any) -> None:
        """Let every actor that is alive and idle work on ``item``, whose answer is not needed."""
        with self.lock:
            told = [actor.work.remote(item) for actor in self.idle]
        ray.wait(told, num_returns=len(told), timeout=ITEM_SECONDS) if told else None

    def close(self) -> None:
        """End the actors; who waits for one, or for its answer, gets :class:`PoolClosed`."""
        self.closed = True
        self._end_actors()

    def _end_actors(self) -> None:
        with self.lock:
            for actor in [*self.actors, *(actor for actor, _ in self.pending)]:
                ray.kill(actor)
            self.actors, self.pending, self.idle = [], [], []

    def release(self) -> None:
        """End the idle actors above ``least`` if none of them has had work for a minute."""
        with self.lock:
            if self.waiting or time.monotonic() - self.last_used < IDLE_SECONDS:
                return
            for actor, _ in self.pending:
                ray.kill(actor)
            self.pending = []
            while self.idle and len(self.actors) > self.least:
                actor = self.idle.pop()
                self.actors.remove(actor)
                ray.kill(actor)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> Actor:
        """An idle actor; starts one while there may be more, and waits for whichever is free first."""
        began = time.monotonic()
        with self.lock:
            self.waiting += 1
        try:
            while (actor := self._free_actor()) is None:
                if not self.actors and time.monotonic() - began > self.start_seconds:
                    self._end_actors()
                    raise UserError(
                        f"{self.name} waited {self.start_seconds:.0f} s for a process with {self.share.cpus:g} CPUs "
                        f"and {self.share.gpus:g} GPUs; free in the cluster: {ray.available_resources()}"
                    )
                time.sleep(POLL_SECONDS)
            return actor
        finally:
            with self.lock:
                self.waiting -= 1

    def _free_actor(self) -> Actor | None:
        with self.lock:
            if self.closed:
                raise PoolClosed
            for pending in list(self.pending):
                if ray.wait([pending[1]], timeout=0)[0]:
                    self.pending.remove(pending)
                    self.actors.append(pending[0])
                    self.idle.append(pending[0])
            if self.idle:
                return self.idle.pop()
            if len(self.pending) < self.waiting and len(self.actors) + len(self.pending) < self.most:
                self.pending.append(self._launch())
            return None

    def _give_back(self, actor: Actor) -> None:
        with self.lock:
            self.last_used = time.monotonic()
            if actor in self.actors:
                self.idle.append(actor)

    def _bury(self, actor: Actor) -> None:
        with self.lock:
            ray.kill(actor)
            if actor in self.actors:
                self.actors.remove(actor)

    def _launch(self) -> tuple[Actor, ray.ObjectRef]:
        share = self.share
        if self.least == self.most:  # an elastic pool may be what makes the cluster grow
            refuse_impossible(self.name, share)
        options: dict[str, Any] = {"num_cpus": share.cpus, "num_gpus": share.gpus}
        if self.python is not None:
            options["runtime_env"] = {"py_executable": self.python}
        made = ray.remote(PoolActor).options(**options, max_restarts=0, max_task_retries=0)
        actor = made.remote(self.make, self.arguments, share.threads)
        return actor, actor.__ray_ready__.remote()


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


def item_in_words(item: Any) -> str:
    """An item in words; of a job with its settings, the job."""
    thing = item[-1] if isinstance(item, tuple) and item else item
    return str(getattr(thing, "in_words", None) or getattr(thing, "name", None) or thing)[:LONGEST_TITLE]
