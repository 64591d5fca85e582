"""What the drawing of rounds asks of the processes that do the work, wherever they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from rayalign.errors import UserError

MAX_ATTEMPTS = 4
"""At one piece of work: what kills every process that touches it is not a lost node."""


class ItemKilled(UserError):
    """Every process that worked on an item died."""


class PoolClosed(Exception):
    """The work was given up: no caller waits for its answer any more."""


class Workers(Protocol):
    """The processes that make chunks: a :class:`rayalign.runtime.pool.Pool`, or one process that does it alone."""

    def call(self, item: Any, attempts: int = MAX_ATTEMPTS) -> Any:
        """The :class:`ChunkReport` of a (spec, chunk)."""
        ...

    def map(self, items: Iterable[Any], rescue: Callable[[Any, ItemKilled], Any] | None = None) -> Iterator[Any]:
        """The :class:`ChunkReport` of every (spec, chunk), in order; ``rescue`` answers for one that killed all."""
        ...

    def tell(self, item: Any) -> None:
        """Let every idle process work on ``item``."""
        ...

    def release(self) -> None:
        """End processes that have had nothing to do for long."""
        ...
