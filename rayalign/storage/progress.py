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

POLL_SECONDS = 0.5
LOG_NAME = "train.log"


class Tail:
    """The whole lines that appear in a growing file from now on; after a replacement, all lines of the new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode = 0
        self.offset = 0
        self.lines()

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


@contextlib.contextmanager
def watching(
    directory: Path, *, row: Callable[[Mapping[str, Any]], None], note: Callable[[str], None]
) -> Iterator[None]:
    """While the block runs, hand the newest row of the run's metrics to ``row`` and workers' warnings to ``note``."""
    metrics, log = Tail(directory / "metrics.jsonl"), Tail(directory / LOG_NAME)
    stop = threading.Event()

    def show() -> None:
        for line in log.lines():
            note(line.decode())
        newest = metrics.lines()[-1:]
        for line in newest:
            row(json.loads(line))

    def poll() -> None:
        while not stop.wait(POLL_SECONDS):
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
def logging_to(directory: Path | None) -> Iterator[None]:
    """While the block runs, append this process's warnings to the run's log, where the driver reads them."""
    if directory is None:
        yield
        return
    handler = logging.FileHandler(directory / LOG_NAME, encoding="utf-8", delay=True)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("rayalign")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
