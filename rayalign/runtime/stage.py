"""A stage of Ray Data: items through a pool of actors, with progress, deadlines and errors that people can read."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError
from ray.util.annotations import RayDeprecationWarning

from rayalign.errors import UserError, blocked_path_error

STALL_SECONDS = 3600.0
NO_RESTARTS = {"max_restarts": 0, "max_task_retries": 0}
"""Ray Data would start a process that runs out of memory again for ever."""


class StageWorker:
    """One actor: makes its function with the first item, and returns UserErrors, which Ray Data would turn to text."""

    def __init__(self, make: Callable[..., Callable[[Any], Iterator[Any]]], *arguments: Any) -> None:
        self.make = make
        self.arguments = arguments
        self.function: Callable[[Any], Iterator[Any]] | None = None

    def __call__(self, row: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
        try:
            if self.function is None:
                self.function = self.make(*self.arguments)
            for result in self.function(pickle.loads(row["item"])):
                yield pickle_item(result)
        except UserError as error:
            yield pickle_item(error)
        except OSError as error:
            told = blocked_path_error(error)
            if told is None:
                raise
            yield pickle_item(told)


def dataset_of_items(items: Sequence[Any]) -> ray.data.Dataset:
    """Items that are handed out one by one."""
    quiet_ray_data()
    found = ray.data.from_items([pickle_item(item) for item in items], override_num_blocks=len(items))
    found.context.target_max_block_size = 1  # what a process yields is yielded at once
    return found


def pickle_item(item: Any) -> dict[str, bytes]:
    return {"item": pickle.dumps(item)}


def apply_to_items(
    name: str,
    items: ray.data.Dataset,
    make: Callable[..., Callable[[Any], Iterator[Any]]],
    *arguments: Any,
    actors: int,
    cpus: float,
) -> Iterator[Any]:
    """What ``make(*arguments)`` yields for every item, in any order, from ``actors`` of ``cpus`` each.

    Raises:
        UserError: one that an actor raised, or that nothing was yielded for an hour.
        ray.exceptions.RayActorError: an actor died.
    """
    with warnings.catch_warnings():
        # Deprecated until Ray 2.64, and so far the only way to say how often a process may be started again.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        outcomes = items.flat_map(
            StageWorker,
            fn_constructor_args=(make, *arguments),
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=cpus,
            ray_remote_args_fn=lambda: NO_RESTARTS,
        )
    try:
        for result in unpickle_items(outcomes.iter_rows()):
            if isinstance(result, UserError):
                raise result
            yield result
    except ExecutionTimeoutError as error:
        raise UserError(
            f"{name}: nothing was finished for {STALL_SECONDS / 60:.0f} minutes. It waits for {actors} processes "
            f"with {cpus:g} CPUs each; free in the cluster: {ray.available_resources()}"
        ) from error


def unpickle_items(rows: Iterable[dict[str, bytes]]) -> Iterable[Any]:
    return (pickle.loads(row["item"]) for row in rows)


def quiet_ray_data() -> None:
    """Ray Data's own words go to its log file only, and a stage that stands still ends."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = STALL_SECONDS
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)
