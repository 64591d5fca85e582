"""Rollouts on a cluster that grows for them: from no node to two, through the loss of one, and back to none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_autoscaler import Growing, growing_head
from held_runs import hold_file, submit_held, write_run
from local_head import run_json
from workspaces import Workspace, make_workspace, metrics, wait_until, weights

from rayalign.data.store import TokenStore

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HELD = 2
"""Steps before the run waits: its second round is drawn, its third is not."""
REWARDS = """
def vowels(prompt, reply):
    return sum(character in "aeiou" for character in reply) / max(1, len(reply))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Workspace:
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "rewards.py").write_text(REWARDS)
    return make_workspace(folder, test_data / "hh_harmless_test.jsonl.gz", num_pairs=64)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Growing]:
    with growing_head(tmp_path_factory.mktemp("storage"), most=2) as growing:
        yield growing


def blocks(**rollout: Any) -> dict[str, Any]:
    """Three rounds of two chunks each."""
    return {
        "data_policy": {"name": "on_policy", "refresh_every": 2},
        "rollout": {"engine": "hf", "samples": 8, "max_new_tokens": 4, **rollout},
        "scorer": {"name": "rule", "function": "rewards:vowels"},
        "optim": {"lr": 1e-3, "steps": 6, "groups_per_step": 32, "tokens_per_micro_batch": 4096},
        "checkpoint": {"every": 6},
    }


def test_a_run_grows_its_cluster_loses_a_node_and_shrinks_it(growing: Growing, folder: Workspace) -> None:
    head = growing.head
    static = write_run(folder, head, "static", held_after=HELD, blocks=blocks(actors=1))
    status, logs = head.wait(head.submit(folder.folder, "train", "static.yaml"))
    assert status == "SUCCEEDED", logs
    wait_until(lambda: growing.num_nodes == 0, "an empty cluster", seconds=600)  # tokenizing may have asked for more

    began, timeline = time.monotonic(), []

    def see(num_nodes: int, what: str) -> None:
        wait_until(lambda: growing.num_nodes == num_nodes, what, seconds=600)
        timeline.append(f"{what} after {time.monotonic() - began:.0f} s")

    elastic = blocks(actors=[0, 2], placement="separate")
    job = submit_held(folder, head, "elastic", held_after=HELD, blocks=elastic)
    see(2, "two nodes")
    growing.kill_node()
    see(1, "the loss of a node")
    hold_file(head, "elastic").unlink()
    status, logs = head.wait(job)
    assert status == "SUCCEEDED", logs
    directory = head.storage / "runs" / "elastic"
    assert run_json(directory)["attempts"] == 1  # training did not notice
    assert [row["loss"] for row in metrics(directory)] == [row["loss"] for row in metrics(static)]
    assert weights(directory) == weights(static)
    for mine, theirs in zip(rounds(directory), rounds(static), strict=True):
        assert TokenStore.open(mine).digest == TokenStore.open(theirs).digest
    see(0, "an empty cluster")
    print("; ".join(timeline))


def rounds(directory: Path) -> list[Path]:
    return sorted((directory / "rounds").glob("round_*"))


def test_what_can_never_fit_is_refused(growing: Growing, folder: Workspace) -> None:
    many = {"strategy": {"name": "ddp", "workers": 11}}
    write_run(
        folder, growing.head, "many", held_after=HELD, blocks={**blocks(actors=[0, 2], placement="separate"), **many}
    )
    status, logs = growing.head.wait(growing.head.submit(folder.folder, "train", "many.yaml"))
    assert status == "FAILED"
    assert "11 processes at the same time are more than 10 for each of the cluster's 1 CPUs: lower strategy" in logs
