"""A run that may have one or two workers, while a node joins its cluster and is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from workspaces import make_workspace

FIXTURES = Path(__file__).parents[1] / "fixtures"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("elastic")
    make_workspace(folder, test_data / "hh_harmless_test.jsonl.gz", num_pairs=64)
    paths = os.pathsep.join([str(FIXTURES), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    environment.pop("RAYALIGN_STORAGE", None)
    done = subprocess.run(
        [sys.executable, FIXTURES / "elastic_run.py", folder],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_workers_come_and_go(facts: dict[str, Any]) -> None:
    """A node joins in the third step, which one worker finishes; the fifth is lost with a node, and done again."""
    rows = facts["rows"]["elastic"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["workers"] for row in rows] == [1, 1, 1, 2, 1, 1]


def test_steps_have_the_same_groups_and_losses_with_any_number(facts: dict[str, Any]) -> None:
    static, elastic = facts["rows"]["static"], facts["rows"]["elastic"]
    for mine, theirs in zip(elastic, static, strict=True):
        assert mine["step_tokens"] == theirs["step_tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_only_the_lost_node_is_a_failure(facts: dict[str, Any]) -> None:
    run = facts["run"]
    assert (run["status"], run["attempts"], len(run["failures"])) == ("finished", 2, 1)
