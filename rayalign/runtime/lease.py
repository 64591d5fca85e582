"""One writer per run directory: a lease that a living owner renews and that a dead one's successor takes over."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from rayalign.errors import UserError

RENEW_SECONDS = 5.0
EXPIRE_SECONDS = 60.0
POLL_SECONDS = 1.0


class Held(UserError):
    """Another living process writes to this directory."""


@contextlib.contextmanager
def lease(directory: Path, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold ``directory/.lease`` while the block runs.

    The file is created with O_EXCL, so of two processes one gets it. Its owner touches it every few seconds; one that
    belongs to a dead process of this machine, or that was not renewed for a minute, is taken over.

    With ``wait`` the caller queues behind a living owner and is told once for whom; without it a living owner raises
    :class:`Held` with its host, process and start.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lease"
    token = uuid.uuid4().hex
    acquire(path, token, wait)
    stop = threading.Event()
    renewer = threading.Thread(target=renew, args=(path, stop), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        stop.set()
        renewer.join()
        if read_owner(path).get("token") == token:
            path.unlink(missing_ok=True)


def acquire(path: Path, token: str, wait: Callable[[str], None] | None) -> None:
    owner = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    told = False
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            try:
                take_over_or_refuse(path)
            except Held as held:
                if wait is None:
                    raise
                if not told:
                    wait(f"waiting: {held}")
                    told = True
                time.sleep(POLL_SECONDS)
            continue
        with os.fdopen(descriptor, "w") as file:
            json.dump(owner, file)
        return


def take_over_or_refuse(path: Path) -> None:
    """Remove a dead owner's lease, or raise :class:`Held`. The rename makes one of several successors the remover."""
    owner = read_owner(path)
    try:
        idle = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return
    if idle < EXPIRE_SECONDS and not is_dead_here(owner):
        since = owner.get("since")
        raise Held(
            f"{path.parent} is being written by process {owner.get('pid')} on {owner.get('host')} since {since}. "
            "Wait for it, stop it, or give this run another name."
        )
    with contextlib.suppress(FileNotFoundError):
        grave = path.with_name(f".lease.{uuid.uuid4().hex}")
        os.rename(path, grave)
        grave.unlink()


def is_dead_here(owner: dict[str, object]) -> bool:
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def read_owner(path: Path) -> dict[str, object]:
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def renew(path: Path, stop: threading.Event) -> None:
    while not stop.wait(RENEW_SECONDS):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
