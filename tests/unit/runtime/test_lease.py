"""Who may write to a directory. Owners are real processes; time passes by setting a file's modification time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rayalign.storage import lease as module
from rayalign.storage.lease import Held, lease, take_over

ELSEWHERE = {"token": "theirs", "host": "another-machine", "pid": 1, "since": "2026-01-01 00:00:00"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.02)


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def write(directory: Path, owner: dict[str, object], *, age: float = 0.0) -> Path:
    path = directory / ".lease"
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def owner(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text()))


def test_lease_is_there_while_the_block_runs(tmp_path: Path) -> None:
    with lease(tmp_path / "new"):
        found = owner(tmp_path / "new" / ".lease")
        assert (found["pid"], found["host"]) == (os.getpid(), socket.gethostname())
    assert not list((tmp_path / "new").iterdir())


def test_living_owner_of_this_machine_is_named(tmp_path: Path) -> None:
    with lease(tmp_path), pytest.raises(Held, match=f"{tmp_path} is being written by process {os.getpid()} on"):
        lease(tmp_path).__enter__()


def test_dead_owner_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    write(tmp_path, {**ELSEWHERE, "host": socket.gethostname(), "pid": dead_process()})
    with lease(tmp_path):
        assert owner(tmp_path / ".lease")["pid"] == os.getpid()


def test_owner_elsewhere_is_replaced_when_its_lease_is_old(tmp_path: Path) -> None:
    write(tmp_path, ELSEWHERE, age=module.EXPIRE_SECONDS + 5)
    with lease(tmp_path):
        assert owner(tmp_path / ".lease")["pid"] == os.getpid()


def test_owner_elsewhere_that_renews_is_not_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, ELSEWHERE, age=30)
    renewal = threading.Timer(0.1, os.utime, args=[path])
    renewal.start()
    with pytest.raises(Held, match="process 1 on another-machine since 2026-01-01"):
        lease(tmp_path).__enter__()
    renewal.join()
    assert owner(path) == ELSEWHERE


def test_waiting_tells_once_for_whom_and_then_goes_on(tmp_path: Path) -> None:
    told: list[str] = []
    began = threading.Event()

    def hold() -> None:
        with lease(tmp_path):
            began.set()
            while not told:
                began.wait(0.01)

    holder = threading.Thread(target=hold)
    holder.start()
    began.wait()
    with lease(tmp_path, wait=told.append):
        assert owner(tmp_path / ".lease")["pid"] == os.getpid()
    holder.join()
    assert len(told) == 1 and told[0].startswith(f"waiting: {tmp_path} is being written by process {os.getpid()}")


@pytest.mark.parametrize("repeat", range(5))
def test_of_many_successors_one_gets_a_dead_owners_lease(tmp_path: Path, repeat: int) -> None:
    write(tmp_path, {**ELSEWHERE, "host": socket.gethostname(), "pid": dead_process()})
    inside, most = [0], [0]
    lock = threading.Lock()

    def work() -> None:
        with lease(tmp_path, wait=lambda line: None):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0)
            with lock:
                inside[0] -= 1

    successors = [threading.Thread(target=work) for _ in range(8)]
    for successor in successors:
        successor.start()
    for successor in successors:
        successor.join()
    assert most == [1]


def test_a_successor_of_the_dead_owner_keeps_its_lease(tmp_path: Path) -> None:
    path = write(tmp_path, {**ELSEWHERE, "token": "successor"})
    take_over(path, ELSEWHERE)
    assert owner(path)["token"] == "successor"
    assert [file.name for file in tmp_path.iterdir()] == [".lease"]


def test_a_guard_that_nobody_removed_does_not_stay(tmp_path: Path) -> None:
    write(tmp_path, {**ELSEWHERE, "host": socket.gethostname(), "pid": dead_process()})
    guard = tmp_path / f".takeover-{ELSEWHERE['token']}"
    guard.touch()
    os.utime(guard, (0, 0))
    with lease(tmp_path):
        assert owner(tmp_path / ".lease")["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_owner_renews(tmp_path: Path) -> None:
    with lease(tmp_path):
        path = tmp_path / ".lease"
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:
            time.sleep(0.01)


def test_owner_that_lost_its_lease_is_interrupted(tmp_path: Path) -> None:
    message = "did not move for a minute, and now .* by process 1 on another-machine"
    with pytest.raises(Held, match=message), lease(tmp_path):
        write(tmp_path, ELSEWHERE)
        while True:
            time.sleep(0.01)
    assert owner(tmp_path / ".lease") == ELSEWHERE


def test_owner_in_the_background_is_interrupted_too(tmp_path: Path) -> None:
    """A job started with nohup or & ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(Held, match="did not move for a minute"), lease(tmp_path):
            write(tmp_path, ELSEWHERE)
            while True:
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_users_interrupt_stays_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), lease(tmp_path):
        raise KeyboardInterrupt
