"""Who may write to a directory, on a disk and on what has no rename and no append.

Owners are real processes; time passes by setting a file's modification time.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rayalign.storage import lease as module
from rayalign.storage.lease import PREFIX, Held, claims, holder_in_words, lease, newest, owner_identity
from rayalign.storage.place import Place, create, place_of, write_whole

ELSEWHERE = {"token": "theirs", "host": "another-machine", "pid": 1, "since": "2026-01-01 00:00:00 UTC"}
OLD = module.EXPIRE_SECONDS + 5


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.02)


@pytest.fixture(params=["disk", "objects"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" if request.param == "disk" else place_of(f"file://{tmp_path}/run")


def local(place: Place) -> Path:
    return place if isinstance(place, Path) else Path(place.path)


@functools.cache
def dead_owner() -> dict[str, Any]:
    """What a process of this machine said of itself that has ended."""
    code = "import json; from rayalign.storage.lease import owner_identity; print(json.dumps(owner_identity()))"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {**json.loads(told.stdout), "token": "dead", "since": "once"}


def write(directory: Place, owner: dict[str, Any], *, number: int = 1, age: float = 0.0) -> Path:
    path = directory / f"{PREFIX}{number:06d}"
    write_whole(path, json.dumps(owner).encode())
    os.utime(local(path), (time.time() - age, time.time() - age))
    return local(path)


def owner(directory: Place) -> dict[str, Any]:
    found = newest(directory)
    return dict(found.owner) if found is not None else {}


def test_a_claim_is_there_while_the_block_runs(directory: Place) -> None:
    with lease(directory / "new"):
        assert owner(directory / "new")["pid"] == os.getpid()
    assert not list((directory / "new").iterdir())


def test_a_living_owner_of_this_machine_is_named_at_once(directory: Place) -> None:
    with (
        lease(directory),
        pytest.raises(Held, match=rf"run is being written by process {os.getpid()} on \S+ since \d{{4}}-"),
    ):
        lease(directory).__enter__()


def test_a_dead_owner_of_this_machine_is_replaced_at_once(directory: Place) -> None:
    write(directory, dead_owner())
    with lease(directory):
        assert owner(directory)["pid"] == os.getpid()
        assert [claim.name for claim in claims(directory)] == [".lease-000002"]


@pytest.mark.parametrize(
    ("changed", "certain"),
    [
        ({}, True),
        ({"pid": os.getpid(), "begun": "1"}, True),  # the number was given again
        ({"namespace": "pid:[1]"}, False),
        ({"boot": "another"}, False),
        ({"host": "another"}, False),
        ({"boot": "", "namespace": "", "begun": ""}, False),
    ],
)
def test_only_a_certainly_dead_owner_is_replaced_before_its_minute(changed: dict[str, Any], certain: bool) -> None:
    assert module.is_dead({**dead_owner(), **changed}) is certain


def test_an_owner_elsewhere_is_replaced_when_its_claim_is_old(directory: Place) -> None:
    write(directory, ELSEWHERE, age=OLD)
    with lease(directory):
        assert owner(directory)["pid"] == os.getpid()


@pytest.mark.parametrize("changed", [{}, {**owner_identity(), "namespace": "pid:[1]", "pid": 2**22 + 1}])
def test_an_owner_that_renews_is_not_replaced(directory: Place, changed: dict[str, Any]) -> None:
    """Also one of a container with this machine's name, whose process number means nothing here."""
    claim = write(directory, {**ELSEWHERE, **changed}, age=30)
    renewal = threading.Timer(0.1, os.utime, args=[claim])
    renewal.start()
    with pytest.raises(Held, match=r"process \d+ on .* since 2026-01-01"):
        lease(directory).__enter__()
    renewal.join()
    assert owner(directory)["token"] == "theirs"


def test_a_container_restarted_in_place_is_not_told_that_it_has_the_run_itself(directory: Place) -> None:
    """Its process has the number of the one before, and lives; the claim is another's, and old after a minute."""
    mine = owner_identity()
    before = {**mine, "namespace": "pid:[1]", "token": "before", "since": "once"}
    assert not module.is_dead(before) and not module.is_alive(before)
    write(directory, before, age=OLD)
    with lease(directory):
        assert owner(directory)["token"] != "before"


def test_waiting_tells_once_for_whom_and_then_continues(directory: Place) -> None:
    told: list[str] = []
    began = threading.Event()

    def hold() -> None:
        with lease(directory):
            began.set()
            while not told:
                began.wait(0.01)

    first = threading.Thread(target=hold)
    first.start()
    began.wait()
    with lease(directory, wait=told.append):
        assert owner(directory)["pid"] == os.getpid()
    first.join()
    assert len(told) == 1 and told[0].startswith(f"waiting: {directory} is being written by process {os.getpid()}")


@pytest.mark.parametrize("left", ["nothing", "dead", "old", "ended"])
def test_of_many_successors_one_at_a_time_has_the_lease(directory: Place, left: str) -> None:
    if left != "nothing":
        owners = {"dead": dead_owner(), "old": ELSEWHERE, "ended": {**ELSEWHERE, "ended": True}}
        write(directory, owners[left], number=7, age=OLD if left == "old" else 0)
    inside, most, entered = [0], [0], [0]
    lock = threading.Lock()

    def work() -> None:
        with lease(directory, wait=lambda line: None):
            with lock:
                inside[0] += 1
                entered[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0)
            with lock:
                inside[0] -= 1

    successors = [threading.Thread(target=work) for _ in range(4)]
    for successor in successors:
        successor.start()
    for successor in successors:
        successor.join()
    assert (most, entered) == ([1], [4])


def test_a_number_that_was_taken_over_is_never_used_again(directory: Place) -> None:
    """The owner of 7 was silent. It wakes up after its successor ended, and must not find itself the newest."""
    write(directory, ELSEWHERE, number=7, age=OLD)
    with lease(directory):
        pass
    assert [claim.name for claim in claims(directory)] == [".lease-000008"] and holder_in_words(directory) == ""
    write(directory, ELSEWHERE, number=7)  # its renewal
    assert holder_in_words(directory) == ""
    with lease(directory):
        assert [claim.name for claim in claims(directory)] == [".lease-000009"]


def test_a_late_creation_below_the_newest_claim_is_taken_back(directory: Place) -> None:
    """It listed the claims, was stopped, and meanwhile two others had been there."""
    late = module.Lease(directory)
    write(directory, ELSEWHERE, number=9)
    assert not late.claim(8)
    assert [claim.name for claim in claims(directory)] == [".lease-000009"]


def test_an_owner_renews(directory: Place) -> None:
    with lease(directory):
        claim = local(claims(directory)[-1])
        os.utime(claim, (0, 0))
        while claim.stat().st_mtime == 0:
            time.sleep(0.01)


@pytest.mark.parametrize("ignored", [False, True])
def test_an_owner_that_finds_a_higher_claim_is_interrupted(directory: Place, ignored: bool) -> None:
    """Also in the background: a job started with nohup or & ignores SIGINT."""
    before = signal.getsignal(signal.SIGINT)
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        message = "did not move for a minute, and now .* by process 1 on another-machine"
        with pytest.raises(Held, match=message), lease(directory):
            write(directory, ELSEWHERE, number=2)
            while True:
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, before)
    assert owner(directory) == ELSEWHERE


def test_a_users_interrupt_stays_one(directory: Place) -> None:
    with pytest.raises(KeyboardInterrupt), lease(directory):
        raise KeyboardInterrupt


def test_a_claim_that_is_not_written_yet_counts(directory: Place) -> None:
    """Its owner lies between creating and writing it, or died there."""
    assert create(directory / f"{PREFIX}000001", b"")
    path = local(directory / f"{PREFIX}000001")
    os.utime(path, (time.time() - 30, time.time() - 30))
    renewal = threading.Timer(0.1, os.utime, args=[path])
    renewal.start()
    with pytest.raises(Held):
        lease(directory).__enter__()
    renewal.join()
    os.utime(path, (time.time() - OLD, time.time() - OLD))
    with lease(directory):
        assert [claim.name for claim in claims(directory)] == [".lease-000002"]


OWNER = """
import sys
from pathlib import Path
from rayalign.storage import lease as module
module.RENEW_SECONDS = 0.05
with module.lease(Path(sys.argv[1])):
    print("began", flush=True)
    sys.stdin.read()
"""


def in_namespace(*command: str) -> list[str]:
    return ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child", *command]


def has_namespaces() -> bool:
    try:
        return subprocess.run(in_namespace("true"), capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not has_namespaces(), reason="this machine lets no user make a PID namespace")
def test_a_living_owner_in_another_pid_namespace_keeps_its_lease(tmp_path: Path) -> None:
    """Two containers of one machine, one host name, and process numbers that mean nothing to one another."""
    with subprocess.Popen(
        in_namespace(sys.executable, "-c", OWNER, str(tmp_path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as there:
        assert there.stdin is not None and there.stdout is not None
        assert there.stdout.readline() == b"began\n"
        assert owner(tmp_path)["host"] == owner_identity()["host"] and not module.is_known(owner(tmp_path))
        with pytest.raises(Held, match="is being written by process"):
            lease(tmp_path).__enter__()
        there.stdin.close()
        assert there.wait(30) == 0
    with lease(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()
