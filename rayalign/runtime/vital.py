"""The processes without which Ray is none: where we started it and one of them ends, the command says so and ends too.

Left alone, training would continue for a minute after the death of Ray's GCS. Ray's C++ would then end the process
with a line of its own. Ray reports the death of a raylet by pages of its log.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rayalign.runtime import witness
from rayalign.stop import Stop

VITAL = {"raylet": "raylet", "gcs_server": "GCS"}
"""Names of programs → what Ray's documentation calls them."""
LOOK_SECONDS = 0.1
CALL_SECONDS = 1.0
"""Between calls of the GCS's port. A GCS that got a SIGTERM closes it at once, and lives on for more than a minute."""
SOON_SECONDS = 0.01
"""Between looks while some of them are still to start."""
GRACE_SECONDS = 1.0
"""For a run whose last file is written to be told of, which needs no GCS."""
FAILED = 1
STOPPED = 128 + signal.SIGTERM
_LOG_DIR = re.compile(rb"--log[_-]dir=([^\0]+)")


@dataclass(frozen=True, slots=True)
class Child:
    """A vital process."""

    pid: int
    name: str
    logs: str
    """Where Ray's logs are."""


@dataclass(slots=True)
class Vital:
    """Watches those of this process's children that start from now on.

    The kernel of Linux tells of children and of their ends in this way; elsewhere nothing is watched.
    """

    settled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    watched: dict[int, Child] = field(default_factory=dict)
    """Numbers of the open handles on them."""
    gcs: tuple[str, int] | None = None
    """Host and port of the GCS, from when it serves."""
    stop: Stop | None = None
    """Whether the command was asked to end: a death from then on does not make it a failure."""
    _witness: subprocess.Popen[str] | None = None
    _told_stop: bool = False

    def watch(self) -> None:
        others = {child.pid for child in vital_children()}
        threading.Thread(target=self._look, args=(others,), daemon=True).start()

    def settle(self) -> None:
        """What the command is for is done and told: a death from here on does not make it a failure."""
        self.settled.set()
        self._say(witness.TOLD)

    def release(self) -> None:
        """Ray may end: it was asked to."""
        self.released.set()
        self._say(witness.TOLD)
        if self._witness is not None:
            self._witness.wait()

    def _look(self, others: set[int]) -> None:
        ends = select.poll()
        called = time.monotonic()
        while not self.released.is_set():
            starting = len(self.watched) < len(VITAL)
            if starting:
                for child in vital_children():
                    if child.pid not in others:
                        others.add(child.pid)
                        number = os.pidfd_open(child.pid)
                        ends.register(number, select.POLLIN)
                        self.watched[number] = child
                        self._say(f"{child.pid} {VITAL[child.name]} {child.logs}")
            wait_seconds = SOON_SECONDS if starting else LOOK_SECONDS
            ended = [self.watched[number] for number, _ in ends.poll(1000 * wait_seconds)]
            if ended and not self.released.is_set():
                # The witness ends the GCS where the raylet has ended: that is no news.
                self._leave(next((child for child in ended if child.name == "raylet"), ended[0]))
            # Who asks this command to end may ask Ray too: then its end is near.
            if self._is_stopping() or time.monotonic() - called > CALL_SECONDS:
                called = time.monotonic()
                self._call()

    def _call(self) -> None:
        """End this process where the GCS serves no longer, whether its process lives or not."""
        dead = next((child for child in self.watched.values() if child.name == "gcs_server"), None)
        if self.gcs is not None and dead is not None and refuses_connection(self.gcs) and not self.released.is_set():
            self._leave(dead)

    def _leave(self, dead: Child) -> None:
        """End this process at once: what waits for Ray cannot be woken, and the files are such that nothing is lost."""
        how = witness.ending(dead.pid) if witness.has_ended(dead.pid) else "SIGTERM"
        stopping = self._is_stopping()
        patience = GRACE_SECONDS if dead.name == "gcs_server" and not stopping else 0.0
        settled = self.settled.wait(patience)
        self._say(witness.TOLD)
        witness.show_cursor()
        if not settled:
            witness.print_to_stderr(witness.last_words(VITAL[dead.name], how, logs=dead.logs, stopping=stopping))
        witness.kill([dead.pid])  # a GCS that was asked to end
        os._exit(0 if settled else STOPPED if stopping or witness.was_asked_to_end(how) else FAILED)

    def _is_stopping(self) -> bool:
        """Whether the command was asked to end, which the witness learns."""
        if self.stop is None or not self.stop.asked:
            return False
        if not self._told_stop:
            self._told_stop = True
            self._say(witness.STOPPING)
        return True

    def _say(self, line: str) -> None:
        """To the process that tells of a death where Ray ends this process first."""
        if self._witness is None:
            if line == witness.TOLD:
                return
            command = [sys.executable, "-I", "-S", witness.__file__]
            self._witness = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self._witness.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._witness.stdin.write(f"{line}\n")
            self._witness.stdin.flush()


def refuses_connection(address: tuple[str, int]) -> bool:
    """Whether nothing listens there; one that is slow to answer does listen."""
    try:
        socket.create_connection(address, timeout=CALL_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def vital_children() -> Iterator[Child]:
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
            return child if words or witness.has_ended(pid) else None
    return None


def newest_logs() -> Path:
    """Where the Ray that was started last on this machine writes its logs."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")
