"""CI runs every tier of the tests: the default ones on every supported Python, the others each night."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    return found


def test_every_tier_runs_each_night(jobs: dict[str, Any]) -> None:
    targets = re.findall(r"^(test-\w+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert sorted(jobs["nightly"]["strategy"]["matrix"]["target"]) == sorted({*targets})


def test_every_supported_python_is_tested(jobs: dict[str, Any]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    said = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert jobs["test"]["strategy"]["matrix"]["python"] == said
    assert project["requires-python"] == f">={said[0]}"
