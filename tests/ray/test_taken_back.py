"""A node is taken back after a notice, as spot machines are: the run saves its step at once and loses hardly any."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from programs import facts_of
from workspaces import make_workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("taken-back")
    make_workspace(folder, test_data / "hh_harmless_test.jsonl.gz", num_pairs=64)
    return facts_of("taken_back.py", folder, seconds=900)


def saved_step(facts: dict[str, Any]) -> int:
    """The step of the one line that tells of the notice."""
    said = r"the cluster takes back the node of worker \d in \d+ s; saves step (\d+) and continues"
    (step,) = re.findall(said, facts["log"])
    return int(step)


def test_the_run_goes_on_from_the_step_that_the_notice_made_it_save(facts: dict[str, Any]) -> None:
    step = saved_step(facts)
    assert f"continues from step_{step:06d}-" in facts["log"]
    assert (facts["run"]["status"], facts["run"]["attempts"], len(facts["run"]["failures"])) == ("finished", 2, 1)


def test_it_shrinks_when_the_node_goes_and_not_before(facts: dict[str, Any]) -> None:
    rows, step = facts["rows"], saved_step(facts)
    assert [row["step"] for row in rows] == list(range(1, 201))
    assert [row["workers"] for row in rows] == [2] * step + [1] * (200 - step)
