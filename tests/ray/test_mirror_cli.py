"""Runs from the command line whose folder is lost: one on stored pairs, and one that is killed inside a round."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
from held_runs import GATED
from workspaces import Workspace, metrics, own_workers, rayalign, started, wait_until, weights

from rayalign.runtime.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_same_command_goes_on_from_the_copies(workspace: Workspace, session: Session) -> None:
    copies = workspace.folder / "copies"
    path = workspace.run("mirrored", checkpoint={"every": 5, "mirror": f"file://{copies}"})
    done = rayalign("train", path)
    assert done.code == 0, done.printed
    directory = workspace.directory("mirrored")
    kept = sorted(each.name for each in (directory / "checkpoints").iterdir())
    assert sorted(each.name for each in (copies / "mirrored" / "checkpoints").iterdir()) == kept and len(kept) == 2
    assert json.loads((copies / "mirrored" / "run.json").read_text())["status"] == "finished"
    expected, curve = weights(directory), metrics(directory)

    shutil.rmtree(directory)
    shutil.rmtree(copies / "mirrored" / "checkpoints" / kept[-1])  # the last one was not sent in time
    again = rayalign("train", path)
    assert again.code == 0, again.printed
    assert f"fetched {kept[0]} from file://" in again.printed.replace("\n", ""), again.printed
    assert weights(directory) == expected and metrics(directory) == curve
    assert json.loads((directory / "run.json").read_text())["attempts"] == 2
    names = [each.name[:11] for each in (copies / "mirrored" / "checkpoints").iterdir()]
    assert sorted(names) == sorted(name[:11] for name in kept)


def test_another_run_in_the_copies_is_refused(workspace: Workspace, session: Session) -> None:
    mirror = {"every": 5, "mirror": f"file://{workspace.folder / 'copies'}"}
    path = workspace.run("mirrored", checkpoint=mirror, method={"name": "dpo", "beta": 0.7})
    shutil.rmtree(workspace.directory("mirrored"))
    refused = rayalign("train", path)
    assert refused.code == 2 and "method.beta" in refused.printed, refused.printed
    assert "was written by another run" in refused.printed.replace("\n", " ")


def test_a_run_that_is_killed_inside_a_round_goes_on_in_another_place(workspace: Workspace, session: Session) -> None:
    """Held in its fifth step, inside the second of three rounds: its driver is killed and its whole storage removed."""
    folder, hold = workspace.folder, workspace.folder / "hold"
    (folder / "gated.py").write_text(GATED)
    (folder / "vowels.py").write_text("def vowels(prompt, reply):\n    return sum(c in 'aeiou' for c in reply)\n")
    blocks = {
        "method": {"name": "gated:METHOD", "hold": str(hold), "held_after": 4},
        "data_policy": {"name": "on_policy", "refresh_every": 3, "lag": 1},
        "rollout": {"engine": "hf", "samples": 2, "max_new_tokens": 12},
        "scorer": {"name": "rule", "function": "vowels:vowels"},
        "optim": {"lr": 1e-3, "steps": 9, "groups_per_step": 4, "tokens_per_micro_batch": 2048},
        "checkpoint": {"every": 4, "mirror": f"file://{folder / 'copies'}"},
    }
    path = workspace.run("rounds", storage_path=str(folder / "first"), **blocks)
    hold.touch()
    with started("train", path, environment={"RAY_ADDRESS": ray.get_runtime_context().gcs_address}) as driver:
        wait_until(lambda: (folder / "hold-is-reached").exists() or driver.poll() is not None, "four steps")
        assert driver.poll() is None, driver.communicate()[0]
        driver.kill()
        driver.wait()
    wait_until(lambda: not own_workers("RayTrainWorker"), "its workers to end")
    shutil.rmtree(folder / "first")
    hold.unlink()

    again = rayalign("train", path, f"storage_path={folder / 'second'}")
    assert again.code == 0, again.printed
    assert "fetched step_000004-" in again.printed.replace("\n", ""), again.printed
    kept = {each.name[:12] for each in (folder / "second" / "rounds" / "rounds").glob("round_*")}
    assert kept == {"round_000001", "round_000002"}  # the first round is of no use any more

    whole = workspace.run("whole", **{**blocks, "checkpoint": {"every": 4}})
    done = rayalign("train", whole)
    assert done.code == 0, done.printed
    mine, theirs = folder / "second" / "rounds", workspace.directory("whole")
    assert weights(mine) == weights(theirs)
    assert rows(mine) == rows(theirs) and [row["round"] for row in rows(mine)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def rows(directory: Path) -> list[dict[str, Any]]:
    clocks = ("rollout/seconds", "refresh/")  # an engine that starts has nothing to refresh
    return [{key: value for key, value in row.items() if not key.startswith(clocks)} for row in metrics(directory)]
