"""Faults on a real Ray: each is answered by another attempt or by a message, and the run ends in the same bits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any

import pytest
import ray
from faulty_modules import compared, faulty
from incidents import Incident
from workspaces import (
    Workspace,
    metrics,
    num_rows,
    rayalign,
    started,
    wait_until,
    weights,
)

from rayalign.engine.checkpoint.checkpoint import step_of
from rayalign.runtime.session import Session
from rayalign.storage.lease import holder_in_words
from rayalign.storage.manifest import MANIFEST, verify

FIXTURES = Path(__file__).parents[1] / "fixtures"
TWO: dict[str, Any] = {"strategy": {"name": "ddp", "workers": 2, "timeout_seconds": 20}}

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def alone(workspace: Workspace, session: Session) -> Path:
    """A run of one worker that nobody touches."""
    done = rayalign("train", workspace.run("alone", method=faulty()))
    assert done.code == 0, done.printed
    return workspace.directory("alone")


@pytest.fixture(scope="module")
def two(workspace: Workspace, session: Session) -> Path:
    """A run of two workers that nobody touches."""
    done = rayalign("train", workspace.run("two", method=faulty(), **TWO))
    assert done.code == 0, done.printed
    return workspace.directory("two")


def test_a_run_goes_on_as_often_as_it_comes_further(
    alone: Path, workspace: Workspace, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    """Four lost attempts, which is one more than a run has between two checkpoints; these are written beside it."""
    method = faulty("lost", {"die": 2, "controller": 7, "damage": 13, "save": 20})
    checkpoint = {"every": 5, "keep": 2, "asynchronous": True}
    done = rayalign("train", workspace.run("lost", method=method, checkpoint=checkpoint))
    assert done.code == 0, done.printed
    lost = re.findall(r"attempt (\d) was lost after step (\d+) \((.*)", caplog.text)
    assert [int(number) for number, _, _ in lost] == [1, 2, 3, 4] and lost[0][1] == "2"
    assert all(lost[number][2].startswith("worker 0 (process ") for number in (0, 2, 3))
    assert "skipping a checkpoint that is not whole" in done.printed
    faults = {
        "die": "worker killed inside a step",
        "controller": "Ray Train's controller killed",
        "damage": "newest checkpoint damaged, worker killed",
        "save": "worker killed before it commits a checkpoint, beside training",
    }
    compared(workspace, "lost", alone, incidents, faults)


def test_whatever_ends_the_command_the_same_command_goes_on(
    alone: Path, workspace: Workspace, incidents: list[Incident]
) -> None:
    """A mistake that is told, a full disk, and signals to the driver, one after the other."""
    faults = {"spoil": 2, "fill": 6, "SIGKILL": 11, "SIGTERM": 16, "SIGINT": 20}
    path, directory = workspace.run("ended", method=faulty("ended", faults)), workspace.directory("ended")

    told = rayalign("train", path)
    assert told.code == 2 and "Nothing of this step is kept" in told.printed.replace("\n", " "), told.printed
    saved = directory / "nonfinite" / "step_000003" / "rank_0.json"
    assert len(json.loads(saved.read_text())["groups"]) == 8

    told = rayalign("train", path)
    said = told.printed.replace("\n", " ")
    assert told.code == 2 and f"error: ended: {directory / 'checkpoints' / 'step_000010-a'}" in said, told.printed
    assert "it wants about" in said
    [kept] = (directory / "checkpoints").iterdir()
    assert step_of(kept) == 5 and verify(kept)

    for code, step in ((-SIGKILL, None), (128 + SIGTERM, 17), (128 + SIGINT, 21)):
        with started("train", path, environment={"RAY_ADDRESS": ray.get_runtime_context().gcs_address}) as process:
            (workspace.folder / "driver-ended").write_text(str(process.pid))
            printed, _ = process.communicate(timeout=300)
        assert process.returncode == code, printed
        if step is None:
            worker = int((workspace.folder / "fault-ended-SIGKILL").read_text())
            wait_until(lambda worker=worker: not Path(f"/proc/{worker}").exists(), "the worker to end with its driver")
        else:
            assert f"stopped after step {step} of 24" in printed and num_rows(directory) == step
            assert not holder_in_words(directory)

    done = rayalign("train", path)
    assert done.code == 0 and "continues from step_000021" in done.printed, done.printed
    titles = {
        "spoil": "a loss that is not finite ends the command",
        "fill": "disk full (largest file 20 kB) ends the command",
        **{name: f"{name} to the driver" for name in ("SIGKILL", "SIGTERM", "SIGINT")},
    }
    compared(workspace, "ended", alone, incidents, titles)


def test_a_step_that_is_not_finite_is_skipped_where_that_is_asked_for(
    alone: Path, workspace: Workspace, incidents: list[Incident]
) -> None:
    optim = {"lr": 1e-3, "steps": 24, "groups_per_step": 8, "tokens_per_micro_batch": 2048, "on_nonfinite": "skip"}
    done = rayalign("train", workspace.run("skipped", method=faulty("skipped", {"spoil": 7}), optim=optim))
    assert done.code == 0, done.printed
    rows, whole = metrics(workspace.directory("skipped")), metrics(alone)
    assert [row.pop("skipped_steps") for row in rows] == [0] * 7 + [1] * 17
    assert rows[:7] == whole[:7] and [row["epoch"] for row in rows] == [row["epoch"] for row in whole]
    incidents.append(Incident(fault="Ray: a loss that is not finite, skipped", injected=1, recoveries=1, equal=None))


def test_one_of_two_workers_dies_and_then_hangs(
    two: Path, workspace: Workspace, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped by SIGSTOP it is alive for the operating system, and silent."""
    done = rayalign("train", workspace.run("silent", method=faulty("silent", {"die": 3, "hang": 12}, rank=1), **TWO))
    assert done.code == 0, done.printed
    assert "attempt 1 was lost after step 3" in caplog.text and "worker 1 (process " in caplog.text
    assert "attempt 2 was lost after step 12" in caplog.text and "strategy.timeout_seconds" in caplog.text
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], "all CPUs")
    stopped = int((workspace.folder / "fault-silent-hang").read_text())
    wait_until(lambda: not Path(f"/proc/{stopped}").exists(), "the stopped process to be gone")
    faults = {"die": "worker 1 of 2 killed inside a step", "hang": "worker 1 of 2 stopped (SIGSTOP), 20 s time-out"}
    compared(workspace, "silent", two, incidents, faults)


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
    equal = weights(workspace.directory("committed")) == weights(alone)
    incidents.append(
        Incident(fault="Ray: driver killed while committing a stage", injected=1, recoveries=1, equal=equal)
    )
    assert equal


def test_a_node_is_lost(two: Path, workspace: Workspace, incidents: list[Incident]) -> None:
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
    lost = workspace.directory("lost-node")
    equal = weights(lost) == weights(two) and metrics(lost) == metrics(two)
    incidents.append(
        Incident(fault="Ray: node lost", injected=1, recoveries=1, equal=equal, seconds=[facts["seconds"]])
    )
    assert equal
