"""Two workers of every strategy from the command line: the model of one process, and after a kill the same bits."""

from __future__ import annotations

import re
import threading
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from workspaces import Workspace, kill_workers, metrics, num_rows, rayalign, wait_until, weights

from rayalign.runtime.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LORA = {"model": {"name": "model", "lora": {"rank": 4, "alpha": 8}}, "reference": {"place": "trainer"}}
RUNS: dict[str, dict[str, Any]] = {
    "fsdp2": {"strategy": {"name": "fsdp2", "workers": 2}},
    "beside": {"strategy": {"name": "fsdp2", "workers": 2}, "reference": {"place": "trainer"}},
    "deepspeed": {"strategy": {"name": "deepspeed", "workers": 2, "zero_stage": 3}},
    "lora": {"strategy": {"name": "ddp", "workers": 2}, **LORA},
    "lora-deepspeed": {"strategy": {"name": "deepspeed", "workers": 2, "zero_stage": 3}, **LORA},
}
NAMES = [name for name in RUNS if "deepspeed" not in name or find_spec("deepspeed") is not None]


@pytest.mark.parametrize("name", NAMES)
def test_two_workers_from_the_command_line(name: str, workspace: Workspace, session: Session) -> None:
    blocks = {key: value for key, value in RUNS[name].items() if key != "strategy"}
    alone, directory = workspace.directory(f"{name}-alone"), workspace.directory(name)
    for run, settings in ((alone, blocks), (directory, RUNS[name])):
        done = rayalign("train", workspace.run(run.name, **settings))
        assert done.code == 0, done.printed
    mine, theirs = ([row["loss"] for row in metrics(run)] for run in (directory, alone))
    assert mine == pytest.approx(theirs, abs=1e-4) and mine[1] != mine[0]
    ended, expected = (load_file(run / "final" / "model.safetensors") for run in (directory, alone))
    assert max(float((ended[key] - expected[key]).abs().max()) for key in expected) <= 1e-3
    model = AutoModelForCausalLM.from_pretrained(directory / "final")
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id is not None


def test_a_reference_beside_the_policy_is_the_one_of_the_pool(workspace: Workspace, session: Session) -> None:
    """And no stage is made for it."""
    pooled, beside = workspace.directory("pooled"), workspace.directory("scored-beside")
    for directory, place in ((pooled, "pool"), (beside, "trainer")):
        done = rayalign("train", workspace.run(directory.name, reference={"place": place}))
        assert done.code == 0, done.printed
        assert bool(re.search("reference: (making|found)", done.printed)) == (place == "pool")
    mine, theirs = ([row["loss"] for row in metrics(run)] for run in (beside, pooled))
    assert mine == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_worker_changes_no_bit(name: str, workspace: Workspace, session: Session) -> None:
    directory = workspace.directory(f"{name}-killed")

    def kill() -> None:
        wait_until(lambda: num_rows(directory) >= 6, "six steps")
        kill_workers("RayTrainWorker")

    killer = threading.Thread(target=kill)
    killer.start()
    done = rayalign("train", workspace.run(directory.name, **RUNS[name]))
    killer.join()
    assert done.code == 0 and "continues from step_0000" in done.printed, done.printed
    assert metrics(directory) == metrics(workspace.directory(name))
    assert weights(directory) == weights(workspace.directory(name))
