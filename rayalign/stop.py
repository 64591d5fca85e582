"""Asked to end: the first SIGTERM or Ctrl-C lets what trains end its step and save it, the second ends at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from rayalign.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop(Protocol):
    """Whether training is to end after its step."""

    @property
    def asked(self) -> bool: ...

    def patience(self) -> AbstractContextManager[None]:
        """While the block runs, the training in it watches :attr:`asked`."""
        ...


@dataclass(slots=True)
class StopRequest:
    """Whether this process was asked to end, and by which signal."""

    number: int | None = None
    patient: bool = False
    """The main thread watches :attr:`asked` by itself."""

    @property
    def asked(self) -> bool:
        return self.number is not None

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """While the block runs, the first signal interrupts nothing; the training in it watches :attr:`asked`.

        Signals reach the main thread alone: in another one this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.patient = True
        try:
            yield
        finally:
            self.patient = False

    def take(self, number: int, frame: FrameType | None) -> None:
        """The handler of :data:`SIGNALS`.

        Raises:
            Stopped: at the first signal, where the main thread does nothing that is worth an end.
            KeyboardInterrupt: at the second.
        """
        if self.asked:
            raise KeyboardInterrupt
        self.number = number
        if not self.patient:
            raise Stopped("stopped")


@contextlib.contextmanager
def stopping() -> Iterator[StopRequest]:
    """Take SIGTERM and SIGINT while the block runs; a :class:`Stopped` that leaves it has the signal's exit code.

    What ignores SIGINT, as a job in the background does, still ignores it. Ray sets a handler of its own when it
    connects, so that the block must lie inside of the connection.
    """
    request = StopRequest()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, request.take)
    try:
        yield request
    except Stopped as stopped:
        raise Stopped(str(stopped), exit_code=128 + (request.number or signal.SIGTERM)) from stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
