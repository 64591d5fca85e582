"""What the driver shows while workers train: it reads the files that they write anyway, so nothing can be lost."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rayalign.storage.place import Facts, ObjectPath, Place, StorageFailed

POLL_SECONDS, OBJECTS_POLL_SECONDS = 0.5, 5.0
LOG_NAME = "train.log"
STORE_LOGGER = "rayalign.storage.place"


class Tail:
    """The whole lines that appear in a growing file from now on; after a replacement, all lines of the new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode = 0
        self.offset = 0
        self.lines()

    def rewind(self) -> None:
        """The next call gives all lines."""
        self.offset = 0

    def lines(self) -> list[bytes]:
        """Lines since the last call."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self.inode:
                self.inode, self.offset = inode, 0
            file.seek(self.offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + len(end)
        return whole.split(b"\n") if end else []


class ObjectTail:
    """The same of an object, which is replaced by a longer one as it grows; after a shorter one, all lines of that."""

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self.seen: Facts | None = None
        self.content = b""
        self.lines()

    def rewind(self) -> None:
        """The next call gives all lines."""
        self.seen, self.content = None, b""

    def lines(self) -> list[bytes]:
        """Lines since the last call."""
        try:
            found = self.path.stat()
            if found == self.seen:
                return []
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        new = content.removeprefix(self.content)
        self.seen, self.content = found, content
        return new.splitlines()


def tail_of(path: Place) -> Tail | ObjectTail:
    return ObjectTail(path) if isinstance(path, ObjectPath) else Tail(path)


@contextlib.contextmanager
def watching(
    directory: Place, *, row: Callable[[Mapping[str, Any]], None], note: Callable[[str], None]
) -> Iterator[None]:
    """While the block runs, hand the newest row of the run's metrics to ``row`` and workers' warnings to ``note``."""
    metrics, log = tail_of(directory / "metrics.jsonl"), tail_of(directory / LOG_NAME)
    pause = POLL_SECONDS if isinstance(directory, Path) else OBJECTS_POLL_SECONDS
    stop = threading.Event()

    def show() -> None:
        for line in log.lines():
            note(line.decode())
        newest = metrics.lines()[-1:]
        for line in newest:
            row(json.loads(line))

    def poll() -> None:
        while not stop.wait(pause):
            show()

    poller = threading.Thread(target=poll, daemon=True)
    poller.start()
    try:
        yield
    finally:
        stop.set()
        poller.join()
        show()


@contextlib.contextmanager
def logging_to(directory: Place | None) -> Iterator[None]:
    """While the block runs, append this process's warnings to the run's log, where the driver reads them."""
    if directory is None:
        yield
        return
    path = directory / LOG_NAME
    handler: logging.Handler
    if isinstance(path, ObjectPath):
        handler = ObjectHandler(path)
    else:
        handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("rayalign")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class ObjectHandler(logging.Handler):
    """Writes the whole log with every line, for an object cannot be appended to; warnings are few."""

    def __init__(self, path: ObjectPath) -> None:
        super().__init__()
        self.path = path
        self.content = path.read_bytes() if path.exists() else b""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == STORE_LOGGER:
            return  # what is said of the store is not written to it
        self.content += self.format(record).encode() + b"\n"
        with contextlib.suppress(StorageFailed):
            self.path.put(self.content)
