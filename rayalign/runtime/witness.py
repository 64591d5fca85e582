"""A process beside the command that outlives it for a moment, and says why it ended where the command could not.

Ray's C++ ends a process that uses its object store as soon as the raylet's sockets close: before Python can print.
This file runs alone, by ``python -I -S``: it imports the standard library only.

Its standard input has a line ``<process id> <title> <folder of logs>`` per process of Ray. The line ``stopping`` says
that the command was asked to end, and ``told`` that it has said what there is to say. The input's end without ``told``
is the command's own end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TOLD = "told"
STOPPING = "stopping"
RAYLET = "raylet"
SHOW_CURSOR = "\x1b[?25h"


class Watched(NamedTuple):
    """A process of Ray."""

    pid: int
    title: str
    logs: str


def process_facts(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on; nothing of one that was collected."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def has_ended(pid: int) -> bool:
    return process_facts(pid)[:1] == ["Z"]


def ending(pid: int) -> str:
    """How the process ended, in words. The kernel knows it until Ray collects the process."""
    known = process_facts(pid)
    if known[:1] != ["Z"]:
        return "its exit code is not known"
    status = int(known[-1])
    if os.WIFEXITED(status):
        return f"exit code {os.WEXITSTATUS(status)}"
    return signal.Signals(os.WTERMSIG(status)).name


def was_asked_to_end(how: str) -> bool:
    """A process that was asked to end is no failure, as when a job is cancelled."""
    return how in ("exit code 0", "SIGTERM")


def last_words(title: str, how: str, *, logs: str, stopping: bool = False) -> str:
    """The line that tells the user of the end of a process of Ray; ``stopping``: the command was asked to end, too."""
    then = f"the same command continues from what is saved. Ray's logs: {logs}\n"
    if was_asked_to_end(how):
        return f"stopped: Ray's {title} was asked to end ({how}); {then}"
    if stopping:
        return f"stopped: Ray's {title} ended ({how}) before this command, which was asked to end; {then}"
    why = ", as when memory runs out" if how == "SIGKILL" else ""
    return f"error: Ray's {title} ended ({how}{why}) while this command ran; {then}"


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stand_by() -> str:
    """Wait for the command's end; the line to print, which is empty where nothing is left to say."""
    source = sys.stdin.fileno()
    ends = select.poll()
    ends.register(source, select.POLLIN)
    watched: dict[int, Watched] = {}
    line = ""
    stopping = False
    while True:
        ready = {number for number, _ in ends.poll()}
        # The command's own end takes Ray with it: a death counts only where it was seen before that end.
        if source in ready:
            words = os.read(source, 65536).decode()
            if not words or TOLD in words.splitlines():
                return "" if words else line
            lines = words.splitlines()
            stopping = stopping or STOPPING in lines
            for said in lines:
                if said == STOPPING:
                    continue
                pid, title, logs = said.split(" ", 2)
                with contextlib.suppress(OSError):
                    number = os.pidfd_open(int(pid))
                    watched[number] = Watched(int(pid), title, logs)
                    ends.register(number, select.POLLIN)
        for number in ready & watched.keys():
            ends.unregister(number)
            dead = watched.pop(number)
            line = line or last_words(dead.title, ending(dead.pid), logs=dead.logs, stopping=stopping)
            if dead.title == RAYLET:  # its agents print pages of its log through the GCS
                kill(other.pid for other in watched.values())


def show_cursor() -> None:
    """Progress bars hide it."""
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            if stream is not None and stream.isatty():
                stream.write(SHOW_CURSOR)
                stream.flush()


def print_to_stderr(line: str) -> None:
    """Print on standard error, of which the reader may be gone."""
    with contextlib.suppress(OSError, ValueError):
        if sys.__stderr__ is not None:
            sys.__stderr__.write(line)
            sys.__stderr__.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command
    if line := stand_by():
        show_cursor()
        print_to_stderr(line)


if __name__ == "__main__":
    main()
