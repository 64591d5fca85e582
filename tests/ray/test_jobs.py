"""``ray job submit`` to a real head that asks for a token: refused, stopped, killed, submitted again, two at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from held_runs import hold_file, submit_held, write_run
from local_head import Head, local_head, run_json
from workspaces import Workspace, make_workspace, metrics, num_rows, rayalign, wait_until, weights

from rayalign.storage.lease import holder_in_words, newest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 12
HELD = 6
"""Steps that a held run does before it waits in the next one."""
BLOCKS = {
    "optim": {"lr": 1e-3, "steps": STEPS, "groups_per_step": 4, "tokens_per_micro_batch": 2048},
    "checkpoint": {"every": 4, "keep": 9},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Workspace:
    """What is submitted: a model, pairs and a method beside the YAML."""
    return make_workspace(tmp_path_factory.mktemp("checkout"), test_data / "hh_harmless_test.jsonl.gz", num_pairs=40)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with local_head(tmp_path_factory.mktemp("storage")) as head:
        yield head


def held(folder: Workspace, head: Head, name: str) -> tuple[str, Path]:
    """(job, directory) of a run that has done :data:`HELD` steps and is in the next one."""
    return submit_held(folder, head, name, held_after=HELD, blocks=BLOCKS), head.storage / "runs" / name


def edited(folder: Workspace, place: Path) -> Path:
    """The same checkout elsewhere, with a change that is none of the run's."""
    shutil.copytree(folder.folder, place)
    (place / "notes.py").write_text("# another commit\n")
    return place


def assert_equal(directory: Path, other: Path) -> None:
    assert [row["step"] for row in metrics(directory)] == list(range(1, STEPS + 1))
    assert metrics(directory) == metrics(other)
    assert weights(directory) == weights(other)


def told_step(head: Head, run: str) -> float | None:
    """What Prometheus is told of a run's step; None before the first report."""
    found = re.findall(rf'^ray_rayalign_step\{{.*run="{run}".*\}} (\S+)$', head.metrics(), re.M)
    return float(found[0]) if found else None


def owner_of(directory: Path) -> int:
    """The process that has the run."""
    found = newest(directory)
    assert found is not None
    return int(found.owner["pid"])


def newest_checkpoint(directory: Path) -> str:
    return max(path.name for path in (directory / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed(folder: Workspace, head: Head) -> Path:
    directory = write_run(folder, head, "undisturbed", held_after=HELD, blocks=BLOCKS)
    status, logs = head.wait(head.submit(folder.folder, "train", "undisturbed.yaml"))
    assert status == "SUCCEEDED", logs
    return directory


def test_a_job_leaves_its_run_below_the_clusters_storage(undisturbed: Path, head: Head) -> None:
    facts = run_json(undisturbed)
    assert (facts["status"], facts["attempts"], facts["failures"]) == ("finished", 1, [])
    log = next(iter(head.client().list_jobs())).submission_id
    logs = head.client().get_job_logs(str(log))
    assert re.search(rf"^undisturbed: step {STEPS}/{STEPS}  loss \d\.\d{{4}}  [\d,]+ tokens/s  0:00 left$", logs, re.M)
    assert logs.rstrip().endswith(f"model: {undisturbed / 'final'}")
    shown = json.dumps([vars(job) for job in head.client().list_jobs()], default=str) + logs
    assert head.token not in shown
    assert not [path for path in head.storage.rglob("*") if path.is_file() and head.token.encode() in path.read_bytes()]


def outsider(head: Head, home: Path, **variables: str) -> dict[str, str]:
    """Variables of someone who reaches the head and was not given its token."""
    kept = {name: value for name, value in head.variables().items() if not name.startswith("RAY_AUTH")}
    return {**kept, "HOME": str(home), **variables}


@pytest.mark.parametrize(
    ("variables", "answer"),
    [
        ({}, "Unauthorized: Missing authentication token"),
        ({"RAY_AUTH_MODE": "disabled"}, "Unauthorized: Missing authentication token"),
        ({"RAY_AUTH_MODE": "token"}, "couldn't find an authentication token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "Forbidden: Invalid authentication token"),
    ],
    ids=["nothing said", "disabled", "no token", "another token"],
)
def test_who_has_no_token_submits_nothing(head: Head, tmp_path: Path, variables: dict[str, str], answer: str) -> None:
    jobs = len(head.client().list_jobs())
    _, done = head.submission(tmp_path, "--version", variables=outsider(head, tmp_path, **variables))
    assert done.returncode != 0 and answer in done.stdout + done.stderr
    assert len(head.client().list_jobs()) == jobs


def test_who_has_no_token_joins_nothing(head: Head, tmp_path: Path) -> None:
    """A driver reaches the cluster by another door than the dashboard's."""
    program = f"import ray; ray.init(address='{head.address}'); print('joined')"
    variables = outsider(head, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0 and "Failed to connect to Ray cluster" in done.stderr and "joined" not in done.stdout


def test_a_stopped_job_goes_on_from_an_edited_checkout(
    undisturbed: Path, folder: Workspace, head: Head, tmp_path: Path
) -> None:
    job, directory = held(folder, head, "stopped")
    wait_until(lambda: told_step(head, "stopped") == HELD, "the step among the metrics", seconds=300)
    assert head.client().stop_job(job)
    wait_until(lambda: "asked to stop" in head.client().get_job_logs(job), "the driver's answer", seconds=300)
    hold_file(head, "stopped").unlink()
    status, logs = head.wait(job)
    assert status == "STOPPED", logs
    last = f"stopped: stopped after step {HELD + 1} of {STEPS}; the same command continues from there"
    assert logs.rstrip().endswith(last)
    assert run_json(directory)["status"] == "stopped" and not holder_in_words(directory)
    assert newest_checkpoint(directory).startswith(f"step_{HELD + 1:06d}-")
    told = rayalign("status", directory)
    assert told.code == 0 and "stopped" in told.printed and f"{HELD + 1}/{STEPS}" in told.printed

    status, logs = head.wait(head.submit(edited(folder, tmp_path / "edited"), "train", "stopped.yaml"))
    assert status == "SUCCEEDED", logs
    assert f"stopped continues from step_{HELD + 1:06d}-" in logs and "tokens: found" in logs
    facts = run_json(directory)
    assert (facts["status"], facts["attempts"], facts["failures"]) == ("finished", 2, [])
    assert_equal(directory, undisturbed)

    status, logs = head.wait(head.submit(tmp_path / "edited", "train", "stopped.yaml"))
    assert status == "SUCCEEDED" and "stopped: finished before" in logs


def test_sigterm_has_an_exit_code_and_a_second_one_ends_at_once(
    undisturbed: Path, folder: Workspace, head: Head
) -> None:
    job, directory = held(folder, head, "twice")
    driver = owner_of(directory)
    os.kill(driver, signal.SIGTERM)
    wait_until(lambda: "asked to stop" in head.client().get_job_logs(job), "the driver's answer", seconds=300)
    os.kill(driver, signal.SIGTERM)  # the step is held and cannot end
    status, logs = head.wait(job)
    assert status == "FAILED" and head.client().get_job_info(job).driver_exit_code == 130
    assert logs.rstrip().endswith("stopped; the same command continues a run from its newest checkpoint")
    assert newest_checkpoint(directory).startswith("step_000004-")

    job, directory = held(folder, head, "twice")
    assert run_json(directory)["failures"] == ["attempt 1: the command was lost"]
    os.kill(owner_of(directory), signal.SIGTERM)
    wait_until(lambda: "asked to stop" in head.client().get_job_logs(job), "the driver's answer", seconds=300)
    hold_file(head, "twice").unlink()
    status, logs = head.wait(job)
    assert status == "FAILED" and head.client().get_job_info(job).driver_exit_code == 143
    assert "twice: stopped after step 7 of 12; the same command continues from there" in logs
    status, logs = head.wait(head.submit(folder.folder, "train", "twice.yaml"))
    assert status == "SUCCEEDED", logs
    assert_equal(directory, undisturbed)


def test_two_jobs_at_once(undisturbed: Path, folder: Workspace, head: Head) -> None:
    """One of another name waits for room and is right; one of the same name is told who has the run."""
    first, directory = held(folder, head, "first")
    same = head.submit(folder.folder, "train", "first.yaml")
    other_directory = write_run(folder, head, "other", held_after=HELD, blocks=BLOCKS)
    other = head.submit(folder.folder, "train", "other.yaml")
    owner = owner_of(directory)
    status, logs = head.wait(same)
    assert status == "FAILED" and f"is being written by process {owner} on" in logs
    hold_file(head, "first").unlink()
    for job, written in ((first, directory), (other, other_directory)):
        status, logs = head.wait(job)
        assert status == "SUCCEEDED", logs
        assert_equal(written, undisturbed)


def test_a_killed_head_costs_the_steps_since_the_newest_checkpoint(
    undisturbed: Path, folder: Workspace, head: Head
) -> None:
    _, directory = held(folder, head, "killed")
    head.kill()
    assert run_json(directory)["status"] == "running" and num_rows(directory) == HELD
    hold_file(head, "killed").unlink()
    head.start()
    status, logs = head.wait(head.submit(folder.folder, "train", "killed.yaml"))
    assert status == "SUCCEEDED", logs
    assert "killed continues from step_000004-" in logs
    facts = run_json(directory)
    assert (facts["attempts"], facts["failures"]) == (2, ["attempt 1: the command was lost"])
    assert_equal(directory, undisturbed)
