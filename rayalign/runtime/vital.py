"""The processes without which Ray is none: where we started it and one of them ends, the command says so and ends too.

Left alone, training would continue for a minute after Ray's GCS has died, and Ray's C++ would then end the process with
a line of its own; the death of a raylet is told by pages of its log.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

VITAL = {"raylet": "raylet", "gcs_server": "GCS"}
"""Names of programs → what Ray's documentation calls them."""
LOOK_SECONDS = 0.1
SOON_SECONDS = 0.01
"""Between looks while some of them are still to start."""
GRACE_SECONDS = 1.0
"""For a run whose last file is written to be told of, which needs no GCS."""
FAILED = 1
SHOW_CURSOR = "\x1b[?25h"
_LOG_DIR = re.compile(rb"--log[_-]dir=([^\0]+)")


@dataclass(frozen=True, slots=True)
class Child:
    """A vital process."""

    pid: int
    name: str
    logs: str
    """Where Ray's logs are."""

    def ending(self) -> str | None:
        """How it ended, in a word; None: it lives. Ray can still collect it."""
        try:
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # Ray has
            return "its exit code is not known"
        if found is None:
            return None
        if found.si_code == os.CLD_EXITED:
            return f"exit code {found.si_status}"
        return signal.Signals(found.si_status).name


@dataclass(slots=True)
class Vital:
    """Watches those of this process's children that start from now on.

    The kernel of Linux tells of children and of their ends in this way; elsewhere nothing is watched.
    """

    settled: threading.Event = field(default_factory=threading.Event)
    """What the command is for is done and told: a death from here on does not make it a failure."""
    released: threading.Event = field(default_factory=threading.Event)
    """Ray may end: it was asked to."""
    watched: dict[int, Child] = field(default_factory=dict)

    def watch(self) -> None:
        others = {child.pid for child in children()}
        threading.Thread(target=self._look, args=(others,), daemon=True).start()

    def _look(self, others: set[int]) -> None:
        ends = select.poll()
        while not self.released.is_set():
            starting = len(self.watched) < len(VITAL)
            if starting:
                for child in children():
                    if child.pid not in others:
                        others.add(child.pid)
                        self.watched[child.pid] = child
                        ends.register(os.pidfd_open(child.pid), select.POLLIN)
            if ends.poll(1000 * (SOON_SECONDS if starting else LOOK_SECONDS)) and not self.released.is_set():
                for child in self.watched.values():
                    if (how := child.ending()) is not None:
                        self._leave(child, how)

    def _leave(self, dead: Child, how: str) -> None:
        """End this process at once: what waits for Ray cannot be woken, and the files are such that nothing is lost."""
        if (
            dead.name == "raylet"
        ):  # Ray itself ends this process within moments, and tells it in its way through its GCS
            for child in self.watched.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
        patience = GRACE_SECONDS if dead.name == "gcs_server" else 0.0
        code, line = (0, "") if self.settled.wait(patience) else last_words(dead, how)
        for stream in (sys.__stdout__, sys.__stderr__):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    end = line if stream is sys.__stderr__ else ""
                    stream.write(f"{SHOW_CURSOR}{end}" if stream.isatty() else end)
                    stream.flush()
        os._exit(code)


def last_words(dead: Child, how: str) -> tuple[int, str]:
    """(exit code, line): a process that was asked to end is no failure, as when a job is cancelled."""
    then = f"the same command continues from what is saved. Ray's logs: {dead.logs}\n"
    if how in ("exit code 0", "SIGTERM"):
        return 128 + signal.SIGTERM, f"stopped: Ray's {VITAL[dead.name]} was asked to end ({how}); {then}"
    why = ", as when memory runs out" if how == "SIGKILL" else ""
    return FAILED, f"error: Ray's {VITAL[dead.name]} ended ({how}{why}) while this command ran; {then}"


def children() -> Iterator[Child]:
    """The vital ones among this process's children; none where the kernel does not say."""
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in map(int, listed.read_text().split()):
                if (child := vital_child(pid)) is not None:
                    yield child


def vital_child(pid: int) -> Child | None:
    folder = Path("/proc", str(pid))
    with contextlib.suppress(OSError):
        name = (folder / "comm").read_text().strip()
        if name in VITAL:
            words = (folder / "cmdline").read_bytes()
            logs = _LOG_DIR.search(words)
            child = Child(pid, name, logs[1].decode() if logs else str(newest_logs()))
            # The kernel tells the name a moment before the command line, which it forgets at the end.
            return child if words or child.ending() else None
    return None


def newest_logs() -> Path:
    """Where the Ray that was started last on this machine writes its logs."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")
