"""A run that may have one or two workers, while a node joins its cluster and is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from programs import facts_of
from workspaces import make_workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("elastic")
    make_workspace(folder, test_data / "hh_harmless_test.jsonl.gz", num_pairs=64)
    return facts_of("elastic_run.py", folder, seconds=900)


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
