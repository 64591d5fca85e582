"""Training from the command line on real pairs: what a run leaves, and what happens to the next command."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM
from workspaces import Workspace, kill_workers, metrics, num_rows, rayalign, started, wait_until, weights

from rayalign.config.load import load_run
from rayalign.run.job import make_job
from rayalign.run.stages import Stages
from rayalign.runtime.session import Session
from rayalign.runtime.trainer import Trainer, TrainingFailed
from rayalign.runtime.worker import TrainJob
from rayalign.storage.artifacts import Artifacts
from rayalign.storage.lease import lease

pytestmark = pytest.mark.ray

PREFERENCE_KEYS = {
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
}  # fmt: skip


@pytest.fixture(scope="module")
def address(session: Session) -> dict[str, str]:
    """Environment of a further driver on this module's Ray."""
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


@pytest.fixture(scope="module")
def undisturbed(workspace: Workspace, address: dict[str, str]) -> Path:
    """A run in a process of its own that nobody touches."""
    with started("train", workspace.run("undisturbed", track=["tensorboard"]), environment=address) as process:
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return workspace.directory("undisturbed")


def job_of(workspace: Workspace, session: Session, name: str, **blocks: Any) -> TrainJob:
    stages = Stages(artifacts=Artifacts(root=workspace.storage / "artifacts"), session=session)
    run = load_run(workspace.run(name, **blocks))
    directory = workspace.directory(name)
    directory.mkdir(parents=True)
    return make_job(run, directory, stages, processes=1, label=name)


def kill_after(directory: Path, rows: int, title: str) -> None:
    wait_until(lambda: num_rows(directory) >= rows, f"{rows} steps of {directory.name}")
    kill_workers(title)


def assert_equal_runs(directory: Path, other: Path) -> None:
    assert metrics(directory) == metrics(other)
    assert weights(directory) == weights(other)


def test_the_first_loss_is_ln_2_and_each_step_has_one_row(undisturbed: Path) -> None:
    rows = metrics(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(row.keys() >= PREFERENCE_KEYS for row in rows)
    assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_run_json_counts_rows_units_and_nodes(undisturbed: Path, session: Session) -> None:
    facts = json.loads((undisturbed / "run.json").read_text())
    assert (facts["status"], facts["steps"], facts["workers"]) == ("finished", 24, 1)
    (data,) = facts["data"]
    assert (data["rows"], data["bad"], data["dropped"], data["units"]) == (200, 0, 0, 1)
    assert data["rows_by_node"] == {session.nodes[0].id: 200}


def test_final_is_a_hugging_face_model(undisturbed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(undisturbed / "final")
    assert sum(parameter.numel() for parameter in model.parameters()) > 10_000
    assert model.generation_config.eos_token_id is not None


def test_tensorboard_has_files(undisturbed: Path) -> None:
    assert list((undisturbed / "tensorboard").glob("events.out.tfevents.*"))


def test_a_finished_run_is_not_repeated(undisturbed: Path, workspace: Workspace) -> None:
    before = (undisturbed / "final" / "model.safetensors").stat().st_mtime_ns
    again = rayalign("train", workspace.folder / "undisturbed.yaml")
    assert (again.code, "finished before" in again.printed) == (0, True)
    assert "tokens: found" in again.printed and "reference: found" in again.printed
    assert (undisturbed / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_another_configuration_under_one_name_is_refused(undisturbed: Path, workspace: Workspace) -> None:
    refused = rayalign("train", workspace.folder / "undisturbed.yaml", "method.beta=0.2")
    assert refused.code == 2
    assert "configuration.method.beta: 0.1 there, 0.2 here" in refused.printed


@pytest.mark.slow
def test_a_worker_restarted_inside_fit_continues_too(undisturbed: Path, workspace: Workspace, session: Session) -> None:
    job = job_of(workspace, session, "restarted-worker")
    killer = threading.Thread(target=kill_after, args=(job.spec.directory, 6, "RayTrainWorker"))
    killer.start()
    with Trainer(max_failures=1) as trainer:
        trainer.fit(job)
    killer.join()
    assert "continues from step_0000" in (job.spec.directory / "train.log").read_text()
    assert_equal_runs(job.spec.directory, undisturbed)


@pytest.mark.slow
def test_a_second_driver_is_refused_and_takes_over_from_a_dead_one(
    undisturbed: Path, workspace: Workspace, address: dict[str, str]
) -> None:
    path, directory = workspace.run("two-drivers"), workspace.directory("two-drivers")
    with started("train", path, environment=address) as first:
        wait_until(lambda: num_rows(directory) >= 6, "6 steps")
        refused = rayalign("train", path)
    assert refused.code == 2
    assert f"is being written by process {first.pid} on" in refused.printed
    resumed = rayalign("train", path)
    assert resumed.code == 0, resumed.printed
    assert_equal_runs(directory, undisturbed)


@pytest.mark.slow
def test_a_users_bug_ends_at_once(workspace: Workspace, session: Session) -> None:
    path = workspace.run("broken", method={"name": "my_methods:BROKEN"})
    failed = rayalign("train", path)
    assert failed.code == 2
    assert "error: broken: worker 0 raised KeyError" in failed.printed and "my_methods.py" in failed.printed
    assert (workspace.folder / "calls.txt").read_text() == "called\n"


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_names_its_step(workspace: Workspace, session: Session) -> None:
    failed = rayalign("train", workspace.run("nan", method={"name": "my_methods:NAN"}))
    assert failed.code == 2
    assert "error: nan: step 1" in failed.printed and "Traceback" not in failed.printed
    [saved] = (workspace.directory("nan") / "nonfinite" / "step_000001").iterdir()
    assert str(saved.parent) in failed.printed.replace("\n", "")
    groups = json.loads(saved.read_text())["groups"]
    assert len(groups) == 8 and {group["losses"]["nan"] for group in groups} == {"nan"}


@pytest.mark.slow
def test_a_run_continues_with_what_its_messages_advise(workspace: Workspace, address: dict[str, str]) -> None:
    lines = (workspace.folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (workspace.folder / "one_bad.jsonl").write_text("".join([*lines[:40], "{}\n"]))
    data = {"train": ["one_bad.jsonl"], "max_prompt_tokens": 48, "max_tokens": 96}
    path, directory = workspace.run("advised", data=data), workspace.directory("advised")
    refused = rayalign("train", path)
    assert (refused.code, "data.max_bad_fraction 0.01" in refused.printed) == (2, True), refused.printed
    with started("train", path, "data.max_bad_fraction=0.1", environment=address) as process:
        wait_until(lambda: num_rows(directory) >= 3, "3 steps")
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    before = metrics(directory)
    advice = ["data.max_bad_fraction=0.5", "optim.tokens_per_micro_batch=1024", "model.gradient_checkpointing=true"]
    advice += ["strategy.timeout_seconds=300", "optim.on_nonfinite=skip", "checkpoint.keep=1", "scorer=null"]
    resumed = rayalign("train", path, *advice)
    assert resumed.code == 0, resumed.printed
    assert f"continues from step_{len(before):06d}" in (directory / "train.log").read_text()
    assert metrics(directory)[: len(before)] == before
    assert [row["step"] for row in metrics(directory)] == list(range(1, 25))


@pytest.mark.slow
def test_a_scorers_mistake_is_a_message(undisturbed: Path, workspace: Workspace) -> None:
    evaluate = {
        "prompts": ["pairs.jsonl"],
        "scorers": [{"name": "rule", "function": "my_methods:unsure"}],
        "sampling": {"samples": 1, "max_new_tokens": 2},
    }
    failed = rayalign("evaluate", workspace.run("undisturbed", evaluate=evaluate))
    assert failed.code == 2
    assert "the scorer unsure gave no answer for 200 of 200 replies" in failed.printed
    assert "scorer.function: 'my_methods:unsure' returned nan for row 0" in failed.printed
    assert "Traceback" not in failed.printed
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], "the evaluator's CPUs")


@pytest.mark.slow
def test_two_workers_make_the_run_of_one(undisturbed: Path, workspace: Workspace, session: Session) -> None:
    path = workspace.run("ddp", strategy={"name": "ddp", "workers": 2})
    done = rayalign("train", path)
    assert done.code == 0, done.printed
    directory = workspace.directory("ddp")
    losses, expected = ([row["loss"] for row in metrics(run)] for run in (directory, undisturbed))
    assert losses == pytest.approx(expected, abs=2e-5)
    one, two = (AutoModelForCausalLM.from_pretrained(run / "final").state_dict() for run in (undisturbed, directory))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


def test_more_workers_than_the_machine_holds_are_refused(workspace: Workspace, session: Session) -> None:
    refused = rayalign("train", workspace.run("many", strategy={"name": "ddp", "workers": 500}))
    assert refused.code == 2
    assert "500 processes at the same time are more than 10 for each of the cluster's" in refused.printed
    assert "tokens: " not in refused.printed


def test_a_directory_that_is_leased_is_refused(workspace: Workspace, session: Session) -> None:
    with lease(workspace.directory("leased")):
        refused = rayalign("train", workspace.run("leased"))
    assert refused.code == 2
    assert f"is being written by process {os.getpid()} on" in refused.printed


@pytest.mark.slow
def test_one_worker_group_trains_several_runs(undisturbed: Path, workspace: Workspace, session: Session) -> None:
    """A group that has trained a run, and a new one after a run that failed, train the next as a fresh one does."""
    with Trainer() as trainer:
        trainer.fit(job_of(workspace, session, "first", seed=5, optim={"lr": 1e-3, "steps": 2, "groups_per_step": 8}))
        group = trainer.group
        trainer.fit(job_of(workspace, session, "second"))
        assert trainer.group is group is not None
        with pytest.raises(TrainingFailed):
            trainer.fit(job_of(workspace, session, "broken-second", method={"name": "my_methods:NAN"}))
        assert trainer.group is None
        trainer.fit(job_of(workspace, session, "third"))
    assert_equal_runs(workspace.directory("second"), undisturbed)
    assert_equal_runs(workspace.directory("third"), undisturbed)
    assert not list(workspace.storage.glob("*/.ray"))
