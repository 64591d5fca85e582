"""The files of a store that this process has mapped: few at a time, and from an object store one by one."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayalign.storage.cache import TRANSFERS, local_file
from rayalign.storage.manifest import FileFacts
from rayalign.storage.place import Place

MOST_FILES = 32
"""Files that are open at a time; the one that was asked for longest ago is closed first."""


class File(NamedTuple):
    """A committed file, and what its manifest says of it."""

    place: Place
    facts: FileFacts


class OpenFiles:
    """Files, mapped when they are first read. One that lies on an object store is fetched into this node's cache."""

    def __init__(self) -> None:
        self._mapped: OrderedDict[Place, tuple[NDArray[np.uint8], ExitStack]] = OrderedDict()
        self._ahead: set[Place] = set()
        self._fetching: ThreadPoolExecutor | None = None

    def bytes_of(self, file: File) -> NDArray[np.uint8]:
        """Raises TornDirectory where a file on an object store is missing, or is another one."""
        if file.place in self._mapped:
            self._mapped.move_to_end(file.place)
            return self._mapped[file.place][0]
        if len(self._mapped) >= MOST_FILES:
            _, (_, held) = self._mapped.popitem(last=False)
            held.close()
        with ExitStack() as stack:
            path = stack.enter_context(local_file(file.place, size=file.facts["bytes"], sha256=file.facts["sha256"]))
            found = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
            self._mapped[file.place] = found, stack.pop_all()
        return found

    def fetch_ahead(self, files: Iterable[File]) -> list[Future[None]]:
        """Fetch files that will be read soon, in threads of their own; nothing is done for those on a disk.

        Returns what has begun with this call: files that were named in the last one are not asked for again.
        """
        wanted = {file.place: file for file in files if not isinstance(file.place, Path)}
        new = [file for place, file in wanted.items() if place not in self._ahead]
        self._ahead = set(wanted)
        if new and self._fetching is None:
            self._fetching = ThreadPoolExecutor(TRANSFERS, "fetch-ahead")
        return [self._fetching.submit(_fetch, file) for file in new] if self._fetching is not None else []


def _fetch(file: File) -> None:
    # Who reads the file meets the same failure, and says so.
    with contextlib.suppress(Exception), local_file(file.place, size=file.facts["bytes"], sha256=file.facts["sha256"]):
        pass
