"""Runs from the command line on an object store: lost inside a round, and on two nodes that share no file system."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
import storages
from held_runs import GATED
from programs import facts_of
from workspaces import Workspace, make_workspace, metrics, own_workers, rayalign, started, wait_until, weights

from rayalign.runtime.session import Session
from rayalign.storage import cache

pytestmark = [pytest.mark.ray, pytest.mark.slow]
server, objects = storages.server, storages.objects


def test_a_run_that_is_killed_inside_a_round_continues_on_another_node(workspace: Workspace, session: Session) -> None:
    """Held in its fifth step, inside the second of three rounds: its driver is killed and all of its node's copies go.

    The store is a folder, so that what lies there is read like a run on a disk.
    """
    folder, hold = workspace.folder, workspace.folder / "hold"
    (folder / "gated.py").write_text(GATED)
    (folder / "vowels.py").write_text("def vowels(prompt, reply):\n    return sum(c in 'aeiou' for c in reply)\n")
    blocks: dict[str, Any] = {
        "method": {"name": "gated:METHOD", "hold": str(hold), "held_after": 4},
        "data_policy": {"name": "on_policy", "refresh_every": 3, "lag": 1},
        "rollout": {"engine": "hf", "samples": 2, "max_new_tokens": 12},
        "scorer": {"name": "rule", "function": "vowels:vowels"},
        "optim": {"lr": 1e-3, "steps": 9, "groups_per_step": 4, "tokens_per_micro_batch": 2048},
        "checkpoint": {"every": 4},
    }
    path = workspace.run("rounds", storage_path=f"file://{folder / 'objects'}", **blocks)
    hold.touch()
    environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with started("train", path, environment=environment) as driver:
        wait_until(lambda: (folder / "hold-is-reached").exists() or driver.poll() is not None, "four steps", 300)
        assert driver.poll() is None, driver.communicate()[0]
        driver.kill()
        driver.wait()
    wait_until(lambda: not own_workers("RayTrainWorker"), "its workers to end")
    shutil.rmtree(cache.node_cache().root)
    hold.unlink()

    again = rayalign("train", path)
    assert again.code == 0, again.printed
    assert "rounds continues from step_000004-" in again.printed.replace("\n", ""), again.printed
    told = rayalign("status", f"file://{folder / 'objects'}")
    assert told.code == 0 and "9/9" in told.printed

    whole = workspace.run("whole", **blocks)
    done = rayalign("train", whole)
    assert done.code == 0, done.printed
    mine, theirs = folder / "objects" / "rounds", workspace.directory("whole")
    assert weights(mine) == weights(theirs)
    assert rows(mine) == rows(theirs) and [row["round"] for row in rows(mine)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def rows(directory: Path) -> list[dict[str, Any]]:
    clocks = ("rollout/seconds", "refresh/")  # an engine that starts has nothing to refresh
    return [{key: value for key, value in row.items() if not key.startswith(clocks)} for row in metrics(directory)]


def test_two_nodes_without_a_shared_file_system(
    objects: Any, tmp_path: Path, test_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "workspace"
    folder.mkdir()
    make_workspace(folder, test_data / "hh_harmless_test.jsonl.gz", num_pairs=30)
    monkeypatch.setenv(cache.ROOT_VARIABLE, str(folder / "driver"))
    facts = facts_of("objects_on_two_nodes.py", folder, str(objects / "runs"), seconds=580)
    assert (facts["status"], facts["steps"]) == ("finished", [1, 2, 3, 4])
    assert facts["rounds"] == ["round_000000", "round_000001"]
    assert all(facts["copies"]) and facts["elsewhere"] == []
    assert os.environ[cache.ROOT_VARIABLE] == str(folder / "driver")
