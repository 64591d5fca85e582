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


def test_trainer_and_actor_die_while_completions_are_drawn(
    drawn: Path, workspace: Workspace, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    """An actor when it has new weights in its engine, unchecked, each time; the trainer in the middle of a round, and
    before it has sent the next one's weights."""
    (workspace.folder / "fragile").write_text("dropped")
    method = faulty("dropped", {"wait": 2, "send": 4})
    done = rayalign(
        "train", workspace.run("dropped", method=method, scorer=scorer("noting", run="dropped"), **ON_POLICY)
    )
    (workspace.folder / "fragile").unlink()
    assert done.code == 0, done.printed
    assert all(f"attempt {number} was lost after step {step} (" in caplog.text for number, step in ((1, 2), (2, 4)))
    deaths = {path.name for path in workspace.folder.glob("fault-dropped-actor-*")}
    assert deaths == {"fault-dropped-actor-2", "fault-dropped-actor-4"}
    faults = {
        "actor": "an actor killed in every refresh of weights",
        "wait": "trainer killed in the middle of a round",
        "send": "trainer killed in a refresh of weights",
    }
    compared(workspace, "dropped", drawn, incidents, faults)
