"""What a submitted job takes along: by the patterns that Ray matches, on this repository's own files."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.thirdparty.pathspec import PathSpec
from ray.runtime_env import RuntimeEnv

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return dict(yaml.safe_load((REPOSITORY / "cluster" / "runtime_env.yaml").read_text()))


def test_ray_knows_every_setting(settings: dict[str, Any]) -> None:
    assert RuntimeEnv(**settings).env_vars() == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}


def test_whatever_is_tracked_goes_along_and_nothing_large(settings: dict[str, Any]) -> None:
    left = PathSpec.from_lines("gitwildmatch", settings["excludes"])
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert [name for name in listing.split("\0") if name and left.match_file(name)] == []
    assert left.match_file("data/pairs.jsonl") and not left.match_file("rayalign/data/pairs.jsonl")
    for name in ("runs/dpo/run.json", ".git/HEAD", ".venv/bin/python", ".venv-vllm/bin/python", ".mypy_cache/x"):
        assert left.match_file(name), name
