"""Faults on a real Ray: each is answered by another attempt or by a message, and the run ends in the same bits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
import ray
from faulty_modules import compared, faulty
from incidents import Incident
from workspaces import (
    Workspace,
    kill_workers,
    metrics,
    num_rows,
    processes,
    rayalign,
    started,
    wait_until,
    weights,
)

from rayalign.engine.checkpoint import step_of
from rayalign.manifest import MANIFEST, verify
from rayalign.runtime.session import Session

FIXTURES = Path(__file__).parents[1] / "fixtures"
TWO: dict[str, Any] = {"strategy": {"name": "ddp", "workers": 2, "timeout_seconds": 30}}
FSDP2: dict[str, Any] = {"strategy": {"name": "fsdp2", "workers": 2, "timeout_seconds": 30}}

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def alone(workspace: Workspace, session: Session) -> Path:
    """A run of one worker that nobody touches."""
    done = rayalign("train", workspace.run("alone", method=faulty()))
    assert done.code == 0, done.printed
    return workspace.directory("alone")


@pytest.fixture(scope="module")
def two(workspace: Workspace, session: Session) -> dict[str, Path]:
    """Runs of two workers that nobody touches."""
    for name, blocks in {"ddp": TWO, "fsdp2": FSDP2}.items():
        done = rayalign("train", workspace.run(name, method=faulty(), **blocks))
        assert done.code == 0, done.printed
    return {name: workspace.directory(name) for name in ("ddp", "fsdp2")}


@pytest.mark.parametrize(("name", "blocks", "rank"), [("ddp", TWO, 0), ("ddp", TWO, 1), ("fsdp2", FSDP2, 1)])
def test_a_worker_dies_inside_a_step(
    name: str,
    blocks: dict[str, Any],
    rank: int,
    two: dict[str, Path],
    workspace: Workspace,
    incidents: list[Incident],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = f"{name}-{rank}"
    done = rayalign("train", workspace.run(run, method=faulty("die", run, at=7, rank=rank), **blocks))
    assert done.code == 0, done.printed
    assert f"attempt 1 was lost after step 7 (worker {rank} (process " in caplog.text
    compared(workspace, run, two[name], incidents, f"worker {rank} of {name} killed inside a step")


def test_a_worker_dies_while_its_checkpoint_is_written_beside_training(
    alone: Path, workspace: Workspace, incidents: list[Incident]
) -> None:
    checkpoint = {"every": 5, "keep": 2, "asynchronous": True}
    done = rayalign("train", workspace.run("late", method=faulty("save", "late", at=10), checkpoint=checkpoint))
    assert done.code == 0 and "continues from step_000005" in done.printed, done.printed
    compared(workspace, "late", alone, incidents, "worker killed, checkpoint written beside training")


def test_the_controller_of_training_dies(
    alone: Path, workspace: Workspace, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    directory = workspace.directory("controller")

    def kill() -> None:
        wait_until(lambda: num_rows(directory) >= 6, "6 steps")
        kill_workers("TrainController")

    killer = threading.Thread(target=kill)
    killer.start()
    done = rayalign("train", workspace.run("controller", method=faulty()))
    killer.join()
    assert done.code == 0 and "attempt 1 was lost" in caplog.text, done.printed
    compared(workspace, "controller", alone, incidents, "Ray Train's controller killed")


@pytest.mark.parametrize(("number", "code"), [(SIGKILL, -SIGKILL), (SIGTERM, 143), (SIGINT, 130)])
def test_the_driver_is_ended_and_started_again(
    number: Signals, code: int, alone: Path, workspace: Workspace, incidents: list[Incident]
) -> None:
    """A signal that can be heard lets the step end and be saved; none loses a row."""
    path, directory = workspace.run(number.name, method=faulty()), workspace.directory(number.name)
    with started("train", path, environment={"RAY_ADDRESS": ray.get_runtime_context().gcs_address}) as process:
        wait_until(lambda: num_rows(directory) >= 6, "6 steps")
        process.send_signal(number)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == code, printed
    if number != SIGKILL:
        [told] = re.findall(r"stopped after step (\d+) of 24", printed)
        assert int(told) == num_rows(directory) and not (directory / ".lease").exists()
    done = rayalign("train", path)
    assert done.code == 0 and "continues from step_0000" in done.printed, done.printed
    compared(workspace, number.name, alone, incidents, f"{number.name} to the driver, the same command again")


def test_a_loss_that_is_not_finite_ends_the_run_and_the_next_command_goes_on(
    alone: Path, workspace: Workspace, incidents: list[Incident]
) -> None:
    path = workspace.run("spoilt", method=faulty("spoil", "spoilt", at=7))
    failed = rayalign("train", path)
    assert failed.code == 2 and "Nothing of this step is kept" in failed.printed.replace("\n", " "), failed.printed
    saved = workspace.directory("spoilt") / "nonfinite" / "step_000008" / "rank_0.json"
    assert len(json.loads(saved.read_text())["groups"]) == 8
    done = rayalign("train", path)
    assert done.code == 0 and "continues from step_000005" in done.printed, done.printed
    compared(workspace, "spoilt", alone, incidents, "a loss that is not finite, once; the same command again")


def test_a_step_that_is_not_finite_is_skipped_where_that_is_asked_for(
    alone: Path, workspace: Workspace, incidents: list[Incident]
) -> None:
    optim = {"lr": 1e-3, "steps": 24, "groups_per_step": 8, "tokens_per_micro_batch": 2048, "on_nonfinite": "skip"}
    done = rayalign("train", workspace.run("skipped", method=faulty("spoil", "skipped", at=7), optim=optim))
    assert done.code == 0, done.printed
    rows, whole = metrics(workspace.directory("skipped")), metrics(alone)
    assert [row.pop("skipped_steps") for row in rows] == [0] * 7 + [1] * 17
    assert rows[:7] == whole[:7] and [row["epoch"] for row in rows] == [row["epoch"] for row in whole]
    incidents.append(Incident(fault="Ray: a loss that is not finite, skipped", injected=1, recoveries=1, equal=None))


def test_the_newest_checkpoint_is_damaged_and_the_worker_dies(
    alone: Path, workspace: Workspace, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    done = rayalign("train", workspace.run("damaged", method=faulty("damage", "damaged", at=12)))
    assert done.code == 0, done.printed
    assert "attempt 1 was lost after step 12 (worker 0 (process " in caplog.text
    assert "skipping a checkpoint that is not whole" in done.printed and "continues from step_000005" in done.printed
    compared(workspace, "damaged", alone, incidents, "newest checkpoint damaged, worker killed")


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
    compared(workspace, "full", alone, incidents, "disk full (largest file 20 kB)")


def test_a_worker_that_hangs_is_given_up(
    two: dict[str, Path], workspace: Workspace, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped by SIGSTOP: alive for the operating system, and silent."""
    done = rayalign("train", workspace.run("hanging", method=faulty("hang", "hanging", at=7, rank=1), **TWO))
    assert done.code == 0, done.printed
    assert "attempt 1 was lost after step 7" in caplog.text and "strategy.timeout_seconds" in caplog.text
    assert "worker 1 (process " in caplog.text
    compared(workspace, "hanging", two["ddp"], incidents, "worker stopped (SIGSTOP), 30 s time-out")


def test_the_driver_dies_while_a_stage_is_committed(
    alone: Path, workspace: Workspace, incidents: list[Incident]
) -> None:
    """The stage is made again as far as it is missing, under a folder that did not count."""
    workspace = replace(workspace, runs="others")
    path = workspace.run("committed", method=faulty())
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, FIXTURES / "dying_driver.py", "reference", "train", path]
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert died.returncode == -9, died.stdout + died.stderr
    [torn] = (workspace.storage / "artifacts").glob("reference-*")
    assert not (torn / MANIFEST).exists()
    done = rayalign("train", path)
    assert done.code == 0, done.printed
    verify(torn)
    fault = "driver killed while committing a stage"
    compared(workspace, "committed", alone, incidents, fault)


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
