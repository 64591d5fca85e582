"""A cluster of two raylets with one core each, in a process of its own: first one of them, then both."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from programs import facts_of
from workspaces import make_workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two-nodes")
    pairs = test_data / "hh_harmless_test.jsonl.gz"
    make_workspace(folder, pairs, num_pairs=60)
    for part in range(2):
        (folder / f"part-{part}.jsonl").write_bytes(gzip.decompress(pairs.read_bytes()))
    return facts_of("two_nodes.py", folder, seconds=580)


def test_one_core_is_enough(facts: dict[str, Any]) -> None:
    assert facts["one_core"] == "finished"


def test_both_nodes_prepare(facts: dict[str, Any]) -> None:
    (data,) = facts["run"]["data"]
    assert (data["rows"], data["shards"]) == (4624, 10)
    assert len(data["bytes_by_node"]) == 2 and all(data["bytes_by_node"].values())


def test_each_worker_reads_its_part_of_the_store(facts: dict[str, Any]) -> None:
    assert max(facts["bytes"]) < 0.6 * facts["store_bytes"]
    assert sum(facts["bytes"]) == pytest.approx(facts["store_bytes"], rel=0.01)


def test_storage_that_a_node_does_not_see_is_refused(facts: dict[str, Any]) -> None:
    assert "is not the same folder on every node" in facts["private"] and "RAYALIGN_STORAGE" in facts["private"]


def test_relative_storage_needs_a_base_on_a_cluster(facts: dict[str, Any]) -> None:
    assert facts["relative"].startswith("storage_path: runs is relative")


def test_doctor_sees_both_nodes_their_storage_and_their_clocks(facts: dict[str, Any]) -> None:
    found = facts["doctor"]
    assert [node["cpus"] for node in found["nodes"]] == [1.0, 1.0] and not found["started_here"]
    assert found["storage"] and found["storage_error"] == ""
    ((offset, uncertainty),) = found["offsets"].values()
    assert abs(offset) <= uncertainty + 0.1  # two processes of one machine, which has one clock
