"""The YAML for Ray's cluster launcher: what Ray's own schema and preparation refuse, and what is exposed."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).parents[3]
NAMES = ["aws.yaml", "gcp.yaml"]


def launcher(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster" / name).read_text())
    return document


def prepared(document: dict[str, Any]) -> dict[str, Any]:
    """What ``ray up`` makes of a configuration before it talks to the cloud; raises what it refuses."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole: dict[str, Any] = prepare_config(copy.deepcopy(document))
    validate_config(whole)
    return whole


@pytest.mark.parametrize("name", NAMES)
def test_ray_accepts(name: str) -> None:
    document = launcher(name)
    whole = prepared(document)
    assert whole["head_node_type"] == "head"
    assert {kind: facts["max_workers"] for kind, facts in whole["available_node_types"].items()} == {
        "head": 0,
        "trainer": 2,
        "rollout": 8,
    }
    assert whole["max_workers"] == 10


@pytest.mark.parametrize("name", NAMES)
def test_ray_refuses(name: str) -> None:
    document = launcher(name)
    with pytest.raises(jsonschema.ValidationError, match="max_worker'"):
        prepared(document | {"max_worker": 3})
    with pytest.raises(ValueError, match="head_node_type"):
        prepared(document | {"head_node_type": "rollouts"})
    with pytest.raises(ValueError, match="max_workers"):
        prepared(document | {"max_workers": 1})


@pytest.mark.parametrize("name", NAMES)
def test_the_trainers_are_fixed_and_the_rollouts_are_spot(name: str) -> None:
    kinds = launcher(name)["available_node_types"]
    assert kinds["trainer"]["min_workers"] == kinds["trainer"]["max_workers"]
    assert kinds["rollout"]["min_workers"] == 0
    assert kinds["head"]["resources"]["CPU"] == 0
    spot = {kind: bool(re.search("spot", str(facts["node_config"]), re.I)) for kind, facts in kinds.items()}
    assert spot == {"head": False, "trainer": False, "rollout": True}


@pytest.mark.parametrize(("name", "machine"), [("aws.yaml", "InstanceType"), ("gcp.yaml", "machineType")])
def test_an_actor_fits_a_rollout_machine(name: str, machine: str) -> None:
    kinds = launcher(name)["available_node_types"]  # an actor reserves what a trainer's process does
    assert kinds["rollout"]["node_config"][machine] == kinds["trainer"]["node_config"][machine]
    assert kinds["rollout"]["resources"] == kinds["trainer"]["resources"]


@pytest.mark.parametrize("name", NAMES)
def test_ray_is_not_open_to_the_world(name: str) -> None:
    document = launcher(name)
    (start,) = (line for line in document["head_start_ray_commands"] if "--head" in line)
    assert "--dashboard-host=127.0.0.1" in start and "--ray-client-server-port" not in start
    assert "--env RAY_AUTH_MODE=token" in document["docker"]["run_options"]
    assert list(document["file_mounts"].values()) == ["~/.ray/auth_token"]
    assert "0.0.0.0" not in (REPOSITORY / "cluster" / name).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_storage_is_mounted_into_the_container_and_the_bucket_is_read_only(name: str) -> None:
    document = launcher(name)
    options = document["docker"]["run_options"]
    assert "--volume /mnt/rayalign:/mnt/rayalign" in options
    assert "--env RAYALIGN_STORAGE=/mnt/rayalign" in options
    assert "--volume /mnt/bucket:/mnt/bucket:ro" in options
    mounts = [line for line in document["initialization_commands"] if "mountpoint -q" in line]
    assert [re.search(r"/mnt/\w+", line)[0] for line in mounts] == ["/mnt/rayalign", "/mnt/bucket"]  # type: ignore[index]
    assert "nfs" in mounts[0] and re.search(r"--read-only|-o ro", mounts[1])
    assert any(option.startswith("--shm-size=") for option in options)
