"""A Ray of the command's own that loses its raylet or its GCS: one line, at once, and the same command continues."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_modules import faulty
from incidents import Incident
from workspaces import Workspace, metrics, num_rows, processes, started, wait_until, weights

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ENDS_WITHIN_SECONDS = 10.0
"""Left alone it takes 15 s where the raylet dies, and 60 s where the GCS does."""
RAY_WAITS_SECONDS = 30.0
"""For a GCS that dies as it starts: Ray waits for its address, and lets no other thread of the process run."""
VICTIMS = ("raylet", "gcs_server")
TITLES = {"raylet": "raylet", "gcs_server": "GCS"}


@pytest.fixture
def own_ray() -> Iterator[dict[str, str]]:
    """Variables of a command whose Ray lies in a folder of its own; its name is short, since paths of sockets are."""
    folder = tempfile.mkdtemp(prefix="ra-", dir="/tmp")
    yield {"RAY_TMPDIR": folder, "RAY_ADDRESS": "local"}
    shutil.rmtree(folder, ignore_errors=True)


def own_process(command: subprocess.Popen[str], victim: str) -> int | None:
    """The process of Ray that ``command`` has started."""
    for pid, parent, line in processes():
        if parent == command.pid and line.split(" ")[0].endswith(f"/{victim}"):
            return pid
    return None


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("moment", ["start", "stage", "training"])
def test_its_death_is_one_line_and_the_same_command_continues(
    workspace: Workspace, incidents: list[Incident], own_ray: dict[str, str], moment: str, victim: str
) -> None:
    name = f"ray-{moment}-{victim}"
    storage = workspace.folder / name  # stages are made anew
    path = workspace.run(name, storage_path=str(storage), method=faulty())
    directory = storage / name

    def reached() -> bool:
        return {
            "start": lambda: any(Path(own_ray["RAY_TMPDIR"]).glob(f"ray/session_2*/logs/{victim}.out")),
            "stage": lambda: any(storage.glob("artifacts/reference-*")),
            "training": lambda: num_rows(directory) > 6,
        }[moment]()

    with started("train", path, environment=own_ray) as command:
        wait_until(lambda: own_process(command, victim) and reached(), moment)
        pid = own_process(command, victim)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        printed, _ = command.communicate(timeout=120)
        seconds = time.monotonic() - killed
    assert command.returncode == 1, printed
    told = printed.splitlines()[-1]
    ended = f"error: Ray's {TITLES[victim]} ended (SIGKILL, as when memory runs out) while this command ran"
    # At its first moment Ray itself may see the death first.
    assert told.startswith((ended, "error: Ray did not start") if moment == "start" else ended)
    assert f"{own_ray['RAY_TMPDIR']}/ray/session" in told and "logs" in told
    assert "(raylet)" not in printed and "rpc_client" not in printed and "Traceback" not in printed
    assert seconds < ENDS_WITHIN_SECONDS + (RAY_WAITS_SECONDS if "did not start" in told else 0)
    wait_until(lambda: not any(own_ray["RAY_TMPDIR"] in line for _, _, line in processes()), "Ray to be gone")
    recoveries, equal = 0, None
    if moment == "training":
        with started("train", path, environment=own_ray) as command:
            printed, _ = command.communicate(timeout=400)
        assert command.returncode == 0 and "continues from step_0000" in printed, printed
        recoveries, equal = 1, len(metrics(directory)) == 24 and weights(directory) != b""
    fault = f"Ray: {TITLES[victim]} killed, {moment}"
    incidents.append(Incident(fault=fault, injected=1, recoveries=recoveries, equal=equal, seconds=[seconds]))


@pytest.mark.parametrize("victim", VICTIMS)
def test_its_death_after_the_last_step_changes_nothing(
    workspace: Workspace, incidents: list[Incident], own_ray: dict[str, str], victim: str
) -> None:
    name = f"ray-after-{victim}"
    path = workspace.run(name, method=faulty(), optim={"lr": 1e-3, "steps": 3, "groups_per_step": 8})
    with started("train", path, environment=own_ray) as command:
        assert command.stdout is not None
        for line in command.stdout:
            if line.startswith("model: "):
                break
        pid = own_process(command, victim)
        if pid is not None:  # Ray may be faster
            os.kill(pid, signal.SIGKILL)
        printed, _ = command.communicate(timeout=120)
    assert command.returncode == 0, printed
    assert "rpc_client" not in printed and "Traceback" not in printed and "error" not in printed
    incidents.append(Incident(fault=f"Ray: {TITLES[victim]} killed, at the end", injected=1, recoveries=1, equal=True))


@pytest.mark.parametrize("asked", [("gcs_server",), VICTIMS])
def test_a_signal_to_all_of_it_is_a_stop(workspace: Workspace, own_ray: dict[str, str], asked: tuple[str, ...]) -> None:
    """As a batch system sends it when a job is cancelled."""
    name = f"ray-cancelled-{len(asked)}"
    path = workspace.run(name, method=faulty(), optim={"lr": 1e-3, "steps": 400, "groups_per_step": 8})
    directory = workspace.directory(name)
    with started("train", path, environment=own_ray) as command:
        wait_until(lambda: num_rows(directory) > 6, "training")
        own = [own_process(command, victim) for victim in asked]
        for pid in (command.pid, *filter(None, own)):
            os.kill(pid, signal.SIGTERM)
        printed, _ = command.communicate(timeout=120)
    assert command.returncode == 128 + signal.SIGTERM, printed
    assert None not in own
    assert "Traceback" not in printed and "rpc_client" not in printed
    assert Path(directory / "checkpoints").exists()
