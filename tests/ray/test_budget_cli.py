"""A comparison whose budget is used up stops with checkpoints, reports what it has, and goes on when that is raised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from workspaces import Workspace, metrics, rayalign

from rayalign.engine.checkpoint.checkpoint import step_of
from rayalign.runtime.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 60
CELLS = ("dpo", "ipo", "simpo", "hinge")


@pytest.fixture(scope="module")
def path(workspace: Workspace, session: Session) -> Path:
    (workspace.folder / "prompts.jsonl").write_text(json.dumps({"prompt": "Why?"}) + "\n")
    (workspace.folder / "vowels.py").write_text(
        "def vowels(prompt, reply):\n    return sum(c in 'aeiou' for c in reply)\n"
    )
    scorer = {"name": "rule", "function": "vowels:vowels"}
    base = {
        "storage_path": str(workspace.storage),
        "model": {"name": "model"},
        "data": {"train": ["pairs.jsonl"], "max_prompt_tokens": 48, "max_tokens": 96},
        "optim": {"lr": 1e-3, "steps": STEPS, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
        "evaluate": {
            "prompts": ["prompts.jsonl"],
            "scorers": [scorer],
            "sampling": {"samples": 1, "max_new_tokens": 8},
        },
        "track": [],
    }
    path = workspace.folder / "budget.yaml"
    comparison = {"name": "limited", "base": base, "budget": {"tokens_trained": 3000}, "grid": {"method": [*CELLS]}}
    path.write_text(yaml.safe_dump(comparison, sort_keys=False))
    return path


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    return {cell["id"]: cell for cell in json.loads((folder / "comparison.json").read_text())["cells"]}


def test_a_budget_stops_cells_and_a_higher_one_goes_on(path: Path, workspace: Workspace) -> None:
    done, folder = rayalign("compare", path), workspace.storage / "limited"
    assert done.code == 2 and "Traceback" not in done.printed
    assert "the budget is used up (tokens_trained: " in done.printed and " of 3,000)" in done.printed
    assert "Raise it and start the same command again" in " ".join(done.printed.split())
    found, stopped, unbegun = cells(folder), 0, 0
    for name in CELLS:
        cell, home = found[name], folder / "cells" / name
        if cell["status"] == "skipped":
            assert cell["reason"] == "not started: budget"
            assert not (home / "metrics.jsonl").exists() or metrics(home) == []  # stopped before its first step
            unbegun += 1
            continue
        [checkpoint] = (home / "checkpoints").iterdir()
        step = step_of(checkpoint)
        assert (cell["status"], cell["reason"]) == ("stopped", f"stopped at step {step} of {STEPS}: budget")
        assert 0 < step < STEPS and len(metrics(home)) == step
        assert [point["step"] for point in cell["points"]] == [step]
        assert json.loads((home / "run.json").read_text())["status"] == "stopped"
        stopped += 1
    assert stopped and unbegun
    assert "not started: budget" in (folder / "report" / "report.html").read_text()

    assert rayalign("compare", path).code == 2  # nothing is trained beyond it
    assert {name: cell["reason"] for name, cell in cells(folder).items()} == {
        name: cell["reason"] for name, cell in found.items()
    }
    statuses = {json.loads((folder / "cells" / name / "run.json").read_text())["status"] for name in CELLS}
    assert statuses == {"stopped", "waiting"}

    done = rayalign("compare", path, "budget.tokens_trained=100000000")
    assert done.code == 0, done.printed
    for name, cell in cells(folder).items():
        assert (cell["status"], [point["step"] for point in cell["points"]]) == ("done", [STEPS])
        assert [row["step"] for row in metrics(folder / "cells" / name)] == list(range(1, STEPS + 1))
