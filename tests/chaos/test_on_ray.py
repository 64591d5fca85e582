"""Faults on a real Ray: each is answered by another attempt or by a message, and the run ends in the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from faulty_modules import seconds_to_recover
from incidents import Incident
from workspaces import Workspace, metrics, processes, rayalign, wait_until, weights

from rayalign.engine.checkpoint import step_of
from rayalign.manifest import MANIFEST, verify
from rayalign.runtime.session import Session

FIXTURES = Path(__file__).parents[1] / "fixtures"
TWO: dict[str, Any] = {"strategy": {"name": "ddp", "workers": 2, "timeout_seconds": 30}}
ON_POLICY: dict[str, Any] = {
    "data_policy": {"name": "on_policy", "refresh_every": 2},
    "rollout": {"engine": "hf", "samples": 2, "max_new_tokens": 12},
    "optim": {"lr": 1e-3, "steps": 6, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
    "checkpoint": {"every": 2},
}

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def faulty(fault: str = "none", run: str = "", **where: int) -> dict[str, Any]:
    return {"name": "faulty:METHOD", "beta": 0.1, "fault": fault, "run": run, **where}


@pytest.fixture(scope="module")
def alone(workspace: Workspace, session: Session) -> Path:
    """A run of one worker that nobody touches."""
    done = rayalign("train", workspace.run("alone", method=faulty()))
    assert done.code == 0, done.printed
    return workspace.directory("alone")


def without_clocks(directory: Path) -> list[dict[str, Any]]:
    """Rows without what drawing again changes: refreshes are timed, and who died is not refreshed but started."""
    clocks = ("seconds", "refresh/", "rollout/seconds")
    return [{key: value for key, value in row.items() if not key.startswith(clocks)} for row in metrics(directory)]


def compared(
    workspace: Workspace, directory: Path, whole: Path, incidents: list[Incident], fault: str, *, injected: int = 1
) -> None:
    """Note a row of the table; fails where the run differs from the undisturbed one."""
    equal = weights(directory) == weights(whole) and without_clocks(directory) == without_clocks(whole)
    seconds = seconds_to_recover(workspace.folder, directory.name)
    incidents.append(
        Incident(fault=f"Ray: {fault}", injected=injected, recoveries=injected, equal=equal, seconds=seconds)
    )
    assert equal


def test_the_newest_checkpoint_is_damaged_and_the_worker_dies(
    alone: Path, workspace: Workspace, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    done = rayalign("train", workspace.run("damaged", method=faulty("damage", "damaged", at=12)))
    assert done.code == 0, done.printed
    assert "attempt 1 was lost after step 12 (worker 0 (process " in caplog.text
    assert "skipping a checkpoint that is not whole" in done.printed and "continues from step_000005" in done.printed
    compared(workspace, workspace.directory("damaged"), alone, incidents, "newest checkpoint damaged, worker killed")


def test_a_full_disk_ends_the_run_and_the_next_command_goes_on(
    alone: Path, workspace: Workspace, incidents: list[Incident]
) -> None:
    path, directory = workspace.run("full", method=faulty("fill", "full", at=7)), workspace.directory("full")
    failed = rayalign("train", path)
    assert failed.code == 2 and "Traceback" not in failed.printed, failed.printed
    said = failed.printed.replace("\n", " ")
    assert f"error: full: {directory / 'checkpoints' / 'step_000010-a'}" in said and "it wants about" in said
    [kept] = (directory / "checkpoints").iterdir()
    assert step_of(kept) == 5 and verify(kept)
    done = rayalign("train", path)
    assert done.code == 0 and "continues from step_000005" in done.printed, done.printed
    compared(workspace, directory, alone, incidents, "disk full (largest file 20 kB)")


def test_a_worker_that_hangs_is_given_up(
    workspace: Workspace, session: Session, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped by SIGSTOP: alive for the operating system, and silent."""
    whole = rayalign("train", workspace.run("two", method=faulty(), **TWO))
    assert whole.code == 0, whole.printed
    done = rayalign("train", workspace.run("hanging", method=faulty("hang", "hanging", at=7, rank=1), **TWO))
    assert done.code == 0, done.printed
    assert "attempt 1 was lost after step 7" in caplog.text and "strategy.timeout_seconds" in caplog.text
    assert "worker 1 (process " in caplog.text
    directory = workspace.directory("hanging")
    compared(workspace, directory, workspace.directory("two"), incidents, "worker stopped (SIGSTOP), 30 s time-out")


def test_trainer_and_actor_die_in_a_refresh(
    workspace: Workspace, session: Session, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    """The trainer before it has sent round 2's weights; an actor when it has them in its engine, unchecked."""
    vowels, dying = ({"name": "rule", "function": f"replies:{name}"} for name in ("vowels", "dies_in_refresh"))
    whole = rayalign("train", workspace.run("drawn", method=faulty(), scorer=vowels, **ON_POLICY))
    assert whole.code == 0, whole.printed
    disturbed = workspace.run("refreshed", method=faulty("refresh", "refreshed", at=4), scorer=dying, **ON_POLICY)
    done = rayalign("train", disturbed)
    assert done.code == 0, done.printed
    assert (workspace.folder / "fault-actor").exists() and "attempt 1 was lost after step 4" in caplog.text
    fault = "trainer, and an actor, killed in a weight refresh"
    directory = workspace.directory("refreshed")
    compared(workspace, directory, workspace.directory("drawn"), incidents, fault, injected=2)


def test_the_driver_dies_while_a_stage_is_committed(
    alone: Path, workspace: Workspace, incidents: list[Incident]
) -> None:
    """The stage is made again as far as it is missing, under a folder that did not count."""
    path = workspace.run("committed", method=faulty(), storage_path=str(workspace.folder / "others"))
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, FIXTURES / "dying_driver.py", "reference", "train", path]
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert died.returncode == -9, died.stdout + died.stderr
    [torn] = (workspace.folder / "others" / "artifacts").glob("reference-*")
    assert not (torn / MANIFEST).exists()
    done = rayalign("train", path)
    assert done.code == 0, done.printed
    verify(torn)
    compared(
        workspace, workspace.folder / "others" / "committed", alone, incidents, "driver killed while committing a stage"
    )


def test_no_stopped_process_is_left(session: Session) -> None:
    """What was given up is gone, and its share of the machine is free."""
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], "all CPUs")
    raylets = [pid for pid, parent, command in processes() if parent == os.getpid() and "raylet" in command]
    mine = [pid for pid, parent, command in processes() if parent in raylets and command.startswith("ray::RayTrain")]
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in mine]
    assert "T" not in states


def test_a_node_is_lost(workspace: Workspace, incidents: list[Incident]) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{FIXTURES}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_AUTH_MODE": "disabled",
    }
    environment.pop("RAYALIGN_STORAGE", None)
    done = subprocess.run(
        [sys.executable, FIXTURES / "lost_node.py", workspace.folder],
        capture_output=True, text=True, timeout=580, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert "was lost after step" in done.stderr and "continues from step_0000" in facts["log"]
    lost, whole = (workspace.directory(name) for name in ("lost-node", "both-nodes"))
    equal = weights(lost) == weights(whole) and metrics(lost) == metrics(whole)
    incidents.append(
        Incident(fault="Ray: node lost", injected=1, recoveries=1, equal=equal, seconds=[facts["seconds"]])
    )
    assert equal
