"""Faults on a real Ray while completions are drawn: rounds are drawn once, and the run ends in the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faulty_modules import compared, faulty
from incidents import Incident
from workspaces import Workspace, rayalign

from rayalign.runtime.session import Session

ON_POLICY: dict[str, Any] = {
    "data_policy": {"name": "on_policy", "refresh_every": 2},
    "rollout": {"engine": "hf", "samples": 2, "max_new_tokens": 12},
    "optim": {"lr": 1e-3, "steps": 6, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
    "checkpoint": {"every": 2},
}

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def scorer(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": "rule", "function": f"replies:{name}", "arguments": arguments}


@pytest.fixture(scope="module")
def drawn(workspace: Workspace, session: Session) -> Path:
    """A run that nobody touches."""
    whole = rayalign("train", workspace.run("drawn", method=faulty(), scorer=scorer("vowels"), **ON_POLICY))
    assert whole.code == 0, whole.printed
    return workspace.directory("drawn")


def test_an_actor_dies_in_every_refresh(drawn: Path, workspace: Workspace, incidents: list[Incident]) -> None:
    dying = scorer("dies_in_refresh", run="dropped", most=9)
    done = rayalign("train", workspace.run("dropped", method=faulty(), scorer=dying, **ON_POLICY))
    assert done.code == 0, done.printed
    deaths = sorted(path.name for path in workspace.folder.glob("fault-actor-dropped-*"))
    assert deaths == ["fault-actor-dropped-2", "fault-actor-dropped-4"]
    compared(workspace, "dropped", drawn, incidents, "an actor killed in every weight refresh", injected=2)


def test_trainer_and_actor_die_in_a_refresh(
    drawn: Path, workspace: Workspace, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    """The trainer before it has sent round 2's weights; an actor when it has them in its engine, unchecked."""
    dying = scorer("dies_in_refresh", run="refreshed", most=1)
    disturbed = workspace.run("refreshed", method=faulty("send", "refreshed", at=4), scorer=dying, **ON_POLICY)
    done = rayalign("train", disturbed)
    assert done.code == 0, done.printed
    assert (workspace.folder / "fault-actor-refreshed-2").exists() and "attempt 1 was lost after step 4" in caplog.text
    fault = "trainer, and an actor, killed in a weight refresh"
    compared(workspace, "refreshed", drawn, incidents, fault, injected=2)


def test_the_trainer_dies_while_its_round_is_drawn(
    drawn: Path, workspace: Workspace, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    telling = scorer("told", run="waiting")
    done = rayalign(
        "train", workspace.run("waiting", method=faulty("wait", "waiting", at=2), scorer=telling, **ON_POLICY)
    )
    assert done.code == 0 and "attempt 1 was lost after step 2" in caplog.text, done.printed
    compared(workspace, "waiting", drawn, incidents, "trainer killed in the middle of a round")
