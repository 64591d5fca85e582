"""One writer per directory: a lease that a living owner renews and that a dead one's successor takes over.

Claims are numbered files, ``.lease-000017``, each created by one process alone: ``O_EXCL`` on a disk, a conditional PUT
on an object store. The highest number owns the directory. A number that was
taken over from a silent owner is never used again. So such an owner finds a higher one when it wakes up.
"""

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayalign.errors import Stopped, UserError
from rayalign.storage.place import Place, create, write_whole

RENEW_SECONDS = 5.0
EXPIRE_SECONDS = 60.0
POLL_SECONDS = 1.0
PREFIX = ".lease-"
FIRST = 1


class Held(UserError):
    """Another living process writes to this directory."""


@contextlib.contextmanager
def lease(directory: Place, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold ``directory`` while the block runs.

    The owner renews its claim every few seconds. A claim is taken over at once if its owner is certainly dead: a
    process of this very machine and PID namespace that is gone. Any other one is taken over after a minute without
    renewal, by the storage's own clock. An owner that was stopped for so long and wakes up is interrupted.

    With ``wait`` the caller queues behind a living owner and is told once for whom; without it a living owner raises
    :class:`Held` with its host, process and start.
    """
    directory.mkdir(parents=True, exist_ok=True)
    mine = Lease(directory)
    mine.acquire(wait)
    renewer = threading.Thread(target=mine.renew, daemon=True)
    renewer.start()
    try:
        yield
    except (KeyboardInterrupt, Stopped):
        if mine.lost:
            raise Held(f"this process did not move for a minute, and now {lease_in_words(directory)}") from None
        raise
    finally:
        mine.stop.set()
        renewer.join()
        mine.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim as another process sees it."""

    number: int
    owner: Mapping[str, Any]
    """What the owner wrote; empty where it has not written yet."""
    renewed: float
    """When, by the storage's clock."""

    @property
    def ended(self) -> bool:
        return bool(self.owner.get("ended"))


@dataclass(slots=True)
class Lease:
    """This process's claim on one directory."""

    directory: Place
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    stop: threading.Event = field(default_factory=threading.Event)
    lost: bool = False
    number: int = 0
    since: str = ""
    clock: Callable[[], float] | None = None
    """The storage's."""

    @property
    def path(self) -> Place:
        return self.directory / f"{PREFIX}{self.number:06d}"

    def acquire(self, wait: Callable[[str], None] | None) -> None:
        """Claim the next number once no living process has the newest one.

        An owner elsewhere that was silent for less than a minute may live, or its machine may be gone: its claim is
        watched until it is renewed, or old.
        """
        first: dict[int, float] = {}
        told = False
        while True:
            found = newest(self.directory)
            if found is None or self.is_free(found):
                if self.claim(found.number + 1 if found else FIRST):
                    return
                continue
            seen = first.setdefault(found.number, found.renewed)
            if wait is None and (is_alive(found.owner) or seen != found.renewed):
                raise Held(f"{lease_in_words(self.directory)}. Wait for it, stop it, or give this run another name.")
            if wait is not None and not told:
                wait(f"waiting: {lease_in_words(self.directory)}")
                told = True
            time.sleep(POLL_SECONDS)

    def is_free(self, found: Claim) -> bool:
        """Whether no living process has the newest claim any more."""
        if found.ended or is_dead(found.owner):
            return True
        if self.clock is None:
            self.clock = storage_clock(self.directory)
        return self.clock() - found.renewed > EXPIRE_SECONDS

    def claim(self, number: int) -> bool:
        """Whether ``number`` became this process's, and is the highest; lower ones go."""
        self.number, self.since = number, time.strftime("%Y-%m-%d %H:%M:%S %Z")
        if create(self.path, self.content()):
            others = {claim: number_of(claim) for claim in claims(self.directory)}
            if max(others.values(), default=number) == number:
                for path, other in others.items():
                    if other < number:
                        path.unlink(missing_ok=True)
                return True
            self.path.unlink(missing_ok=True)  # who created it late: others had been here meanwhile
        self.number = 0
        return False

    def content(self, **more: Any) -> bytes:
        return json.dumps({"token": self.token, **owner_identity(), "since": self.since, **more}).encode()

    def renew(self) -> None:
        """Renew the claim until told to stop; interrupt the process when another one has the directory."""
        while not self.stop.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError, UserError):  # a storage that is away for a moment does not end the lease
                found = newest(self.directory)
                if found is not None and found.owner.get("token", self.token) != self.token:
                    self.lost = True
                    interrupt_main(self.stop)
                    return
                if isinstance(self.path, Path):
                    os.utime(self.path)
                else:
                    write_whole(self.path, self.content())

    def release(self) -> None:
        """Leave the directory to others; nothing remains of a first claim, for it was not taken over from another."""
        found = newest(self.directory)
        if found is None or found.owner.get("token") != self.token:
            return
        if self.number == FIRST:
            self.path.unlink(missing_ok=True)
        else:
            write_whole(self.path, self.content(ended=True))


def claims(directory: Place) -> list[Place]:
    """The claims on a directory, the newest last."""
    found: list[Place] = [*directory.glob(f"{PREFIX}[0-9]*")]
    return sorted(found, key=number_of)


def number_of(claim: Place) -> int:
    return int(claim.name.removeprefix(PREFIX))


def newest(directory: Place) -> Claim | None:
    """The claim that counts; None where there is none."""
    while paths := claims(directory):
        with contextlib.suppress(FileNotFoundError):  # a successor has just removed it
            owner = lease_record(paths[-1].read_bytes())
            return Claim(number=number_of(paths[-1]), owner=owner, renewed=paths[-1].stat().st_mtime)
    return None


def lease_record(text: bytes) -> dict[str, Any]:
    """What a claim says; empty where its owner has not written yet."""
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def storage_clock(directory: Place) -> Callable[[], float]:
    """The time by the clock that dates what lies in ``directory``: those of two machines may differ."""
    probe = directory / f".clock-{uuid.uuid4().hex}"
    write_whole(probe, b"")
    try:
        offset = probe.stat().st_mtime - time.monotonic()
    finally:
        probe.unlink(missing_ok=True)
    return lambda: offset + time.monotonic()


def lease_in_words(directory: Place) -> str:
    found = newest(directory)
    owner = found.owner if found is not None else {}
    return (
        f"{directory} is being written by process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
    )


def holder_in_words(directory: Place) -> str:
    """Who writes to ``directory`` now, in words; empty where no process does. Nothing is written to find out."""
    found = newest(directory)
    if found is None or found.ended or is_dead(found.owner) or time.time() - found.renewed > EXPIRE_SECONDS:
        return ""
    return lease_in_words(directory)


def silent_seconds(directory: Place) -> float | None:
    """Since when the owner has not renewed its claim, by this machine's clock; None where there is none."""
    found = newest(directory)
    return None if found is None or found.ended else time.time() - found.renewed


def forget(directory: Place) -> None:
    """Remove what past owners left; of a directory that is itself removed."""
    for path in claims(directory):
        path.unlink(missing_ok=True)


# Which process this is. A host's name says little: containers share it, and process 1 is in each of them.


def owner_identity() -> dict[str, Any]:
    """What tells this process from any other, as far as the system says it: Linux says all of it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": said_by(Path("/proc/sys/kernel/random/boot_id")),
        "namespace": namespace(),
        "begun": begun(os.getpid()),
    }


def said_by(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def namespace() -> str:
    """The PID namespace, in which the number of a process means this process."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def begun(pid: int) -> str:
    """When a process began, in the system's ticks: a later one of the same number began later."""
    _, _, rest = said_by(Path(f"/proc/{pid}/stat")).rpartition(")")
    fields = rest.split()
    return fields[19] if len(fields) > 19 else ""


def is_known(owner: Mapping[str, Any]) -> bool:
    """Whether the owner's process number certainly means a process that this one would see."""
    mine = owner_identity()
    return bool(owner.get("boot") and owner.get("namespace") and owner.get("begun")) and all(
        owner.get(name) == mine[name] for name in ("host", "boot", "namespace")
    )


def is_dead(owner: Mapping[str, Any]) -> bool:
    """Whether the owner certainly was a process that is gone."""
    if not is_known(owner):
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return begun(int(owner["pid"])) not in ("", owner["begun"])


def is_alive(owner: Mapping[str, Any]) -> bool:
    """Whether the owner certainly is a process that lives."""
    return is_known(owner) and begun(int(owner["pid"])) == owner["begun"]


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
