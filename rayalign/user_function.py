"""A user's function in a process of its own: it may hang, exit or crash, and costs its caller one call."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any

from rayalign import user_process
from rayalign.errors import UserError
from rayalign.remarks import Remarks

START_SECONDS = 600.0
GRACE_SECONDS = 2.0
"""After its own timer should have ended a process that hangs."""
LOOK_SECONDS = 0.2
"""Between looks at a process that says nothing: whatever it has started may keep its end of the pipe open."""
REAP_SECONDS = 10.0
MOST_BYTES = 10_000
"""How much of a printed line, and of a trace, is kept."""
_FRAME = re.compile(r'  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>.*)')


class CallFailed(Exception):
    """A call gave nothing; the message says what became of it and where, as the end of a sentence.

    ``fatal``: its process is gone, with whatever the function had remembered.
    """

    def __init__(self, reason: str, *, fatal: bool = False) -> None:
        super().__init__(reason)
        self.fatal = fatal


@dataclass(frozen=True, slots=True)
class Returned:
    """A function's answer: numbers, texts, None and lists as Python's own, and how it was written before."""

    value: Any
    shown: str
    other: str = ""
    """The type of an answer that is none of these, and has no value."""


class UserFunction:
    """``name(*arguments, **keywords)``, called in a process that is made again when a call has ended it.

    It runs in that process's main thread, as functions that set signals need it. One call at a time.

    Args:
        name: ``my_pkg.rewards:helpful`` or ``path/to/rewards.py:helpful``.
        like: arguments as they will be; only their number matters.
        seconds: of one call.
        setting: which setting says so, for errors.

    Raises:
        UserError: there is no such function, it takes other arguments, or its module cannot be imported.
    """

    def __init__(
        self, name: str, like: tuple[object, ...], *, keywords: Mapping[str, Any], seconds: float, setting: str
    ) -> None:
        self.name = name
        self.like = like
        self.keywords = dict(keywords)
        self.seconds = seconds
        self.setting = setting
        self.printed = Printed(Path(name).name)
        self.lock = threading.Lock()
        self.finalizer: weakref.finalize[[], UserFunction] | None = None
        self.process: Process | None = self._started()

    def __call__(self, *arguments: object) -> Returned:
        """The function's answer.

        Raises:
            CallFailed: it raised, took too long, or ended its process.
            UserError: that process is gone, and no other one can be started.
        """
        with self.lock:
            if self.process is None:
                self.process = self._started()
            answer = self._asked(self.process, arguments, self.seconds, self.setting)
            if "raised" in answer:
                raise CallFailed(answer["raised"])
            return Returned(answer.get("returned"), answer["shown"], answer.get("refused", ""))

    def close(self) -> None:
        """End the process, if there is one; another call would start a new one."""
        if self.process is not None:
            self.process.end()
            self.process = None

    def _started(self) -> Process:
        process = Process.start()
        if self.finalizer is not None:
            self.finalizer.detach()
        self.finalizer = weakref.finalize(self, process.end)
        first = {
            "path": sys.path,
            "name": self.name,
            "like": self.like,
            "keywords": self.keywords,
            "seconds": self.seconds,
            "start_seconds": START_SECONDS,
        }
        try:
            answer = self._asked(process, first, START_SECONDS)
        except CallFailed as failure:
            raise UserError(f"{self.name!r}: the import of its module {failure}") from failure
        if "ready" not in answer:
            process.end()
            raised = answer.get("raised")
            raise UserError(f"{self.name!r}: the import of its module {raised}" if raised else answer["problem"])
        process.main_thread = answer["ready"]
        return process

    def _asked(self, process: Process, message: object, seconds: float, setting: str = "") -> dict[str, Any]:
        """The answer to a message; where none comes, the process is ended and CallFailed says why."""
        try:
            process.link.send(message)
            return process.receive(seconds + GRACE_SECONDS, self.printed)
        except (EOFError, OSError, ValueError):
            self.process = None
            raise CallFailed(process.obituary(seconds, setting), fatal=True) from None


class Printed:
    """What a function and its module print, cut into lines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.remarks = Remarks()
        self.rest = b""

    def add(self, data: bytes) -> None:
        *whole, self.rest = (self.rest + data).split(b"\n")
        self.rest = self.rest[:MOST_BYTES]
        for line in whole:
            text = line.decode("utf-8", errors="replace").strip()
            if text:
                self.remarks.add(f"{self.name} printed: {text}")


@dataclass(slots=True)
class Process:
    """A running :mod:`rayalign.user_process`."""

    popen: subprocess.Popen[bytes]
    link: Connection
    output: IO[bytes]
    trace: int
    """Descriptor of a file without a name: where the function was when its time was over."""
    waiting: selectors.BaseSelector
    main_thread: int = 0

    @classmethod
    def start(cls) -> Process:
        ours, theirs = Pipe()
        trace, path = tempfile.mkstemp()
        os.unlink(path)
        popen = subprocess.Popen(
            [sys.executable, "-u", "-P", user_process.__file__, str(theirs.fileno()), str(trace)],
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(), trace),
            start_new_session=True,  # what it starts can be ended with it, and Ctrl-C is not for it
        )
        theirs.close()
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        waiting = selectors.DefaultSelector()
        for end in (ours, popen.stdout):
            waiting.register(end, selectors.EVENT_READ)
        return cls(popen=popen, link=ours, output=popen.stdout, trace=trace, waiting=waiting)

    def receive(self, seconds: float, printed: Printed) -> dict[str, Any]:
        """The next message, as it comes; raises EOFError where none comes in time, or ever."""
        end = time.monotonic() + seconds
        while True:
            ready = [key.fileobj for key, _ in self.waiting.select(LOOK_SECONDS)]
            if self.output in ready and not self.drain(printed):
                self.waiting.unregister(self.output)
            if self.link in ready:
                message = json.loads(self.link.recv_bytes())
                self.drain(printed)
                return dict(message)
            if time.monotonic() > end or (self.popen.poll() is not None and not self.link.poll()):
                self.drain(printed)
                raise EOFError

    def drain(self, printed: Printed) -> bool:
        """Read what is printed; False: nothing will be any more."""
        while data := self.output.read(65_536):
            printed.add(data)
        return data is None

    def end(self) -> None:
        """Kill it and whatever it started, unless that has left its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(REAP_SECONDS)
        if not self.link.closed:
            os.close(self.trace)
        for end in (self.waiting, self.link, self.output):
            end.close()

    def obituary(self, seconds: float, setting: str) -> str:
        """End it, and say why it gave no answer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(LOOK_SECONDS)  # it may be about to end by itself
        code = self.popen.poll()
        found = os.pread(self.trace, MOST_BYTES, 0).decode("utf-8", errors="replace")
        self.end()
        if code is None or found:
            known = "; ".join(filter(None, (setting, where_thread_was(found, self.main_thread))))
            return f"did not return within {seconds:g} s" + (f" ({known})" if known else "")
        if code >= 0:
            return f"ended its process with exit code {code}"
        name = signal.Signals(-code).name
        return f"ended its process by {name}" + (" (as when memory runs out)" if name == "SIGKILL" else "")


def where_thread_was(trace: str, thread: int) -> str:
    """Where a thread was, by what faulthandler wrote; empty where that is not known."""
    for section in re.split(r"\n(?=Thread |Current thread )", "\n" + trace):
        if f"0x{thread:016x}" in section:
            frames = [(found["file"], int(found["line"]), found["name"]) for found in _FRAME.finditer(section)]
            place = user_process.innermost_place(frames)
            return f"it was {place}" if place else ""
    return ""
