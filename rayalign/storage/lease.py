"""One writer per directory: a lease that a living owner renews and that a dead one's successor takes over."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayalign.errors import Stopped, UserError

RENEW_SECONDS = 5.0
EXPIRE_SECONDS = 60.0
POLL_SECONDS = 1.0
GUARD_SECONDS = 0.01


class Held(UserError):
    """Another living process writes to this directory."""


@contextlib.contextmanager
def lease(directory: Path, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold ``directory/.lease`` while the block runs.

    The file is created with O_EXCL, so of two processes one gets it, on one machine as on a shared file system. Its
    owner touches it every few seconds; one that belongs to a dead process of this machine, or that was not renewed for
    a minute, is taken over. An owner that was stopped for so long and wakes up is interrupted.

    With ``wait`` the caller queues behind a living owner and is told once for whom; without it a living owner raises
    :class:`Held` with its host, process and start.
    """
    directory.mkdir(parents=True, exist_ok=True)
    mine = Lease(directory / ".lease")
    mine.acquire(wait)
    renewer = threading.Thread(target=mine.renew, daemon=True)
    renewer.start()
    try:
        yield
    except (KeyboardInterrupt, Stopped):
        if mine.lost:
            raise Held(f"this process did not move for a minute, and now {lease_in_words(mine.path)}") from None
        raise
    finally:
        mine.stop.set()
        renewer.join()
        mine.release()


@dataclass(slots=True)
class Lease:
    """This process's claim on one lease file."""

    path: Path
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    stop: threading.Event = field(default_factory=threading.Event)
    lost: bool = False

    def acquire(self, wait: Callable[[str], None] | None) -> None:
        """Create the file, once no living process has it.

        A lease from elsewhere that is not old yet may be that of a machine which is gone: it is watched until it is
        renewed, or old.
        """
        first = last_renewal(self.path)
        told = False
        while not self.create():
            owner = read_owner(self.path)
            if is_abandoned(self.path, owner):
                take_over(self.path, owner)
                continue
            if wait is None and (is_here(owner) or last_renewal(self.path) != first):
                raise Held(f"{lease_in_words(self.path)}. Wait for it, stop it, or give this run another name.")
            if wait is not None and not told:
                wait(f"waiting: {lease_in_words(self.path)}")
                told = True
            time.sleep(POLL_SECONDS)

    def create(self) -> bool:
        owner = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump(owner, file)
        return True

    def renew(self) -> None:
        """Touch the file until told to stop; interrupt the process when the file is another's."""
        while not self.stop.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):  # a file system that is away for a moment does not end the lease
                if read_owner(self.path).get("token", self.token) != self.token:
                    self.lost = True
                    interrupt_main(self.stop)
                    return
                os.utime(self.path)

    def release(self) -> None:
        if read_owner(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)


def interrupt_main(ended: threading.Event) -> None:
    """Raise KeyboardInterrupt in the main thread, also in a job in the background (``nohup``, ``&``).

    Such a job ignores SIGINT, and ``_thread.interrupt_main`` with it. A handler that lets a step end first takes the
    second SIGINT as the last, and here the first is too many: unless the block has ``ended``, it gets both.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler not in (signal.SIG_IGN, None):
        _thread.interrupt_main()
        if handler is not signal.default_int_handler and not ended.wait(POLL_SECONDS):
            _thread.interrupt_main()
        return
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))


def read_owner(path: Path) -> dict[str, Any]:
    """What the owner wrote; empty where there is no owner, or it has not written yet."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def lease_in_words(path: Path) -> str:
    owner = read_owner(path)
    return (
        f"{path.parent} is being written by process {owner.get('pid')} on {owner.get('host')} "
        f"since {owner.get('since')}"
    )


def holder_in_words(directory: Path) -> str:
    """Who writes to ``directory`` now, in words; empty where no process does. Nothing is written to find out."""
    path = directory / ".lease"
    owner = read_owner(path)
    is_old = time.time() - last_renewal(path) > EXPIRE_SECONDS
    return "" if not owner or is_old or is_dead_here(owner) else lease_in_words(path)


def is_here(owner: dict[str, Any]) -> bool:
    return bool(owner.get("host") == socket.gethostname())


def is_dead_here(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is gone."""
    if not is_here(owner):
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def last_renewal(path: Path) -> float:
    """When the file was touched last; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def is_abandoned(path: Path, owner: dict[str, Any]) -> bool:
    return is_dead_here(owner) or seconds_since_renewal(path) > EXPIRE_SECONDS


def seconds_since_renewal(path: Path) -> float:
    """Seconds since the last renewal by the file system's own clock: those of two machines may differ.

    0 where there is no file: it was released a moment ago.
    """
    clock = path.with_name(f".clock-{uuid.uuid4().hex}")
    clock.touch()
    try:
        return clock.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        clock.unlink()


def take_over(path: Path, owner: dict[str, Any]) -> None:
    """Remove the lease that ``owner`` left behind, and no other.

    Of all successors only the one that creates the guard may remove, so that what it reads then stays until it does.
    """
    guard = path.with_name(f".takeover-{owner.get('token')}")
    try:
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        if seconds_since_renewal(guard) > EXPIRE_SECONDS:  # the process that made it died before the removal
            guard.unlink(missing_ok=True)
        time.sleep(GUARD_SECONDS)
        return
    try:
        if read_owner(path) == owner and is_abandoned(path, owner):
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)
