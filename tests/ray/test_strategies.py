"""Two workers of every strategy from the command line: the model of one process, and after a kill the same bits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from workspaces import Workspace, kill_workers, metrics, num_rows, rayalign, wait_until, weights

from rayalign.runtime.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STRATEGIES: dict[str, dict[str, Any]] = {
    "fsdp2": {"name": "fsdp2", "workers": 2},
}


@pytest.fixture(scope="module")
def alone(workspace: Workspace, session: Session) -> Path:
    assert rayalign("train", workspace.run("alone")).code == 0
    return workspace.directory("alone")


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_workers_from_the_command_line(name: str, alone: Path, workspace: Workspace) -> None:
    done = rayalign("train", workspace.run(name, strategy=STRATEGIES[name]))
    assert done.code == 0, done.printed
    directory = workspace.directory(name)
    mine, theirs = ([row["loss"] for row in metrics(run)] for run in (directory, alone))
    assert mine == pytest.approx(theirs, abs=1e-4)
    ended, expected = (load_file(run / "final" / "model.safetensors") for run in (directory, alone))
    assert max(float((ended[key] - expected[key]).abs().max()) for key in expected) <= 1e-3
    model = AutoModelForCausalLM.from_pretrained(directory / "final")
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id is not None


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_killed_worker_changes_no_bit(name: str, workspace: Workspace, session: Session) -> None:
    directory = workspace.directory(f"{name}-killed")

    def kill() -> None:
        wait_until(lambda: num_rows(directory) >= 6, "six steps")
        kill_workers("RayTrainWorker")

    killer = threading.Thread(target=kill)
    killer.start()
    done = rayalign("train", workspace.run(directory.name, strategy=STRATEGIES[name]))
    killer.join()
    assert done.code == 0 and "continues from step_0000" in done.printed, done.printed
    assert metrics(directory) == metrics(workspace.directory(name))
    assert weights(directory) == weights(workspace.directory(name))
