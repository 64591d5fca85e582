"""Which failures end a run and which are answered by another attempt."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
import ray.train
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from rayalign.config.errors import ConfigError, Problem
from rayalign.data.records import EmptyFile
from rayalign.engine.checkpoint.checkpoint import IncompatibleCheckpoint
from rayalign.engine.first_step import PolicyMismatch
from rayalign.engine.step import NonFiniteStep
from rayalign.errors import MissingExtra, UserError
from rayalign.placement import Share
from rayalign.runtime.failures import WHAT_TO_DO, describe_loss, is_lost, loss_kind, root_cause
from rayalign.runtime.trainer import Trainer, TrainingFailed
from rayalign.runtime.worker import TrainJob
from rayalign.storage.disk import DiskFull
from rayalign.storage.manifest import MANIFEST, TornDirectory

JOB = cast(
    TrainJob,
    SimpleNamespace(
        spec=SimpleNamespace(directory=Path("runs/dpo-hh")),
        retries=2,
        run="dpo-hh",
        workers=2,
        share=Share(cpus=1, gpus=0, threads=1),
    ),
)
NO_ROOM = ray.train.ControllerError(WorkerGroupStartupTimeoutError(2))


def worker_failure(**by_rank: Exception) -> ray.train.WorkerGroupError:
    return ray.train.WorkerGroupError(
        "Traceback: my_losses.py, line 7", {int(rank[1:]): error for rank, error in by_rank.items()}
    )


LOST = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError())


@pytest.mark.parametrize(
    "error",
    [
        LOST,
        WorkerGroupStartupTimeoutError(2),
        ConnectionResetError("peer"),
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"),
        RuntimeError("NCCL error: unhandled system error"),
        ray.exceptions.ObjectStoreFullError("store"),
    ],
)
def test_failures_of_the_cluster(error: BaseException) -> None:
    assert is_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("margin"),
        OSError(28, "No space left on device"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        UserError("a collective timed out, says a user's method"),
        NonFiniteStep("step 3"),
    ],
)
def test_failures_of_the_run(error: BaseException) -> None:
    assert not is_lost(error)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each attempt does: an error that it raises, or what it returns, or what it calls for one of them."""
    outcomes: list[Any] = []

    def once(self: Trainer, job: TrainJob) -> Path:
        outcome = outcomes.pop(0)
        if callable(outcome):
            outcome = outcome()
        if isinstance(outcome, BaseException):
            raise outcome
        return Path(outcome)

    monkeypatch.setattr(Trainer, "attempt", once)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return outcomes


def test_a_lost_worker_and_a_lost_controller_are_answered(
    attempts: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    attempts += [worker_failure(r0=LOST), ray.exceptions.ActorDiedError(), "final"]
    assert Trainer().fit(JOB) == Path("final")
    assert "dpo-hh: attempt 1 was lost after step 0 (worker 0: The actor died unexpectedly" in caplog.text
    assert "attempt 2 was lost" in caplog.text


def test_attempts_end(attempts: list[Any]) -> None:
    attempts += [worker_failure(r0=LOST)] * 3 + ["final"]
    with pytest.raises(
        TrainingFailed,
        match="dpo-hh: gave up after 3 attempts, of which the last 3 left no checkpoint; "
        "the last one was lost after step 0: worker 0",
    ):
        Trainer().fit(JOB)
    assert attempts == ["final"]


def test_attempts_that_leave_a_checkpoint_do_not_end(attempts: list[Any], tmp_path: Path) -> None:
    """Two more in a row are allowed; a folder without a manifest is none."""

    def losing(step: int, *, committed: bool = True) -> Callable[[], BaseException]:
        def attempt() -> BaseException:
            folder = tmp_path / "checkpoints" / f"step_{step:06d}-a1"
            folder.mkdir(parents=True, exist_ok=True)
            if committed:
                (folder / MANIFEST).touch()
            return worker_failure(r0=LOST)

        return attempt

    job = replace_directory(JOB, tmp_path)
    attempts += [*[losing(5)] * 3, losing(10), *[losing(15)] * 3, losing(20), "final"]
    assert Trainer().fit(job) == Path("final")
    attempts += [losing(25), losing(30, committed=False), *[losing(25)] * 2, "final"]
    with pytest.raises(TrainingFailed, match="gave up after 4 attempts, of which the last 3 left no checkpoint"):
        Trainer().fit(job)
    assert attempts == ["final"]


def replace_directory(job: TrainJob, directory: Path) -> TrainJob:
    return cast(TrainJob, SimpleNamespace(**{**vars(job), "spec": SimpleNamespace(directory=directory)}))


def test_waiting_for_room_loses_no_attempt(
    attempts: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr("rayalign.runtime.elastic.TELL_SECONDS", 0.0)
    attempts += [NO_ROOM] * 4 + ["final"]
    assert Trainer().fit(JOB) == Path("final")
    assert "attempt" not in caplog.text
    waits = "dpo-hh: has waited 0 minutes for 2 workers with 1 CPUs and 0 GPUs each; free in the cluster: 1 CPUs and 0"
    assert caplog.text.count(waits) == 4
    monkeypatch.setattr("rayalign.runtime.elastic.ROOM_SECONDS", -1.0)
    attempts.append(NO_ROOM)
    with pytest.raises(UserError, match="dpo-hh waited 0 hours for 2 workers"):
        Trainer().fit(JOB)


PLACES = {0: "process 12 on red", 1: "process 34 on blue"}
KILLED = (
    "The actor is dead because its worker process has died. There are some potential root causes. (1) The process is "
    "killed by SIGKILL by OOM killer due to high memory usage."
)


def test_a_loss_names_worker_place_and_remedy() -> None:
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    died = WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError(KILLED))
    told = describe_loss({0: gloo, 1: died}, PLACES)
    assert told.startswith(f"worker 1 (process 34 on blue): {KILLED} If its node is short of memory, lower optim.tok")
    assert "worker 0" not in told  # it waited for the other


def test_a_silent_worker_is_named_by_the_one_that_waited() -> None:
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation")
    told = describe_loss({0: late}, PLACES)
    assert told.startswith("worker 0 (process 12 on red) waited in vain for worker 1 (process 34 on blue): [gloo")
    assert told.endswith("raise strategy.timeout_seconds")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), "memory"),
        (RuntimeError("The actor died because its node has died. Node Id: 12"), "node"),
        (RuntimeError("The node which this task was running on was terminated"), "node"),
        (WorkerHealthCheckTimeoutError("A worker health check has been hanging for 20 seconds."), "time"),
        (RuntimeError("Connection closed by peer"), "process"),
    ],
)
def test_kinds_of_loss(error: Exception, kind: str) -> None:
    assert loss_kind(error) == kind and kind in WHAT_TO_DO


def test_a_disk_that_is_full_for_a_row_is_told_with_its_folder(attempts: list[Any]) -> None:
    attempts += [worker_failure(r0=OSError(28, "No space left on device")), "final"]
    with pytest.raises(TrainingFailed, match=r"worker 0 could not write \(No space .*\); runs/dpo-hh has [\d,]+ bytes"):
        Trainer().fit(JOB)


def test_a_message_wins_over_what_it_broke_elsewhere(attempts: list[Any]) -> None:
    """A worker that finds its folder removed by one whose disk was full is no bug."""
    attempts += [worker_failure(r0=FileNotFoundError("optimizer"), r1=DiskFull("no room")), "final"]
    with pytest.raises(TrainingFailed, match="^dpo-hh: no room$"):
        Trainer().fit(JOB)


@pytest.mark.parametrize(
    "error",
    [
        UserError("scorer: no model there"),
        PolicyMismatch("before the first step"),
        NonFiniteStep("step 3: loss nan"),
        IncompatibleCheckpoint("another run"),
        TornDirectory("MANIFEST.json"),
    ],
)
def test_a_message_stands_alone(error: Exception, attempts: list[Any]) -> None:
    attempts += [worker_failure(r0=error), "final"]
    with pytest.raises(TrainingFailed) as failed:
        Trainer().fit(JOB)
    assert str(failed.value) == f"dpo-hh: {error}"
    assert attempts == ["final"]


def test_a_bug_is_shown_with_its_place(attempts: list[Any]) -> None:
    attempts += [worker_failure(r1=KeyError("margin")), "final"]
    with pytest.raises(TrainingFailed, match=r"worker 1 raised KeyError: 'margin'\n.*\n.*my_losses.py, line 7"):
        Trainer().fit(JOB)
    assert attempts == ["final"]


def test_the_culprit_is_found_among_broken_collectives(attempts: list[Any]) -> None:
    broken = RuntimeError("Connection closed by peer")
    attempts += [worker_failure(r0=broken, r1=broken, r2=NonFiniteStep("step 3"), r3=LOST), "final"]
    with pytest.raises(TrainingFailed, match="dpo-hh: step 3"):
        Trainer().fit(JOB)


def test_root_cause_under_every_wrapper() -> None:
    cause = ValueError("inside")
    remote = ray.exceptions.RayTaskError("measure", "traceback", cause)
    assert root_cause(remote) is cause
    assert root_cause(cause) is cause


@pytest.mark.parametrize(
    "error",
    [
        UserError("plain"),
        MissingExtra("tensorboard", "tracking"),
        EmptyFile("rows.jsonl"),
        ConfigError([Problem("run.yaml:3", "method.beta", "must be positive")]),
    ],
)
def test_messages_cross_processes(error: UserError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))
