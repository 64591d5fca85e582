"""Whole steps on a device: as on the CPU, without waiting for the device, and within the planned memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from method_scenarios import METHODS, STEPS, scenario_of
from tiny_runs import Scenario, join, make_source, prepared, run

from rayalign.config.training import StrategyConfig
from rayalign.engine.batches import StreamWork
from rayalign.engine.prefetch import Prefetched, at_any_time
from rayalign.engine.strategy.base import make_strategy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps")


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_the_cpu(device: torch.device, folder: Path, name: str) -> None:
    scenario = scenario_of(folder, name)
    found, expected = run(scenario, strategy=make_strategy("single", device)), run(scenario)
    assert found.loss == pytest.approx(expected.loss, abs=1e-3)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2)


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo"])
def test_a_forward_and_its_loss_wait_for_nothing(cuda: torch.device, folder: Path, name: str) -> None:
    """Until the gradient's norm is read, no operation copies from the device."""
    scenario = scenario_of(folder, name)
    strategy = make_strategy("single", cuda)
    runner, _, _ = prepared(scenario, strategy)
    source = make_source(scenario, strategy)
    warm, work = source.get(0), source.get(1)
    forward_and_backward(runner, warm)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(runner, work)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def forward_and_backward(runner: Any, work: tuple[StreamWork, ...]) -> None:
    [part] = work
    chosen = runner.objectives[part.stream]
    statistics = runner.statistics(0, part)
    for batch in part.micro_batches:
        loss, _ = chosen.loss(runner.score(chosen, batch), statistics, part.counts)
        loss.backward()


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_what_is_read_ahead_lies_in_pinned_memory(cuda: torch.device, folder: Path, name: str) -> None:
    scenario = scenario_of(folder, name)
    source = make_source(scenario, make_strategy("single", cuda))
    ahead = Prefetched(source, steps=STEPS, device=cuda, is_there=at_any_time)
    for step in range(2):
        [found], [expected] = ahead.get(step), source.get(step)
        for ours, theirs in zip(found.micro_batches, expected.micro_batches, strict=True):
            assert ours.input_ids.is_pinned() and torch.equal(ours.input_ids, theirs.input_ids)


MEASURED = Path(__file__).parents[1] / "fixtures" / "measured_memory.py"
CASES = {
    "float32": {"dtype": "float32", "checkpointed": False, "tokens": 8192},
    "bfloat16": {"dtype": "bfloat16", "checkpointed": False, "tokens": 8192},
    "checkpointed": {"dtype": "bfloat16", "checkpointed": True, "tokens": 16384},
    "selective": {"dtype": "bfloat16", "checkpointed": "selective", "tokens": 16384},
}


@pytest.mark.parametrize("case", CASES)
def test_a_process_uses_what_is_planned(cuda: torch.device, case: str) -> None:
    command = [sys.executable, str(MEASURED), json.dumps({**CASES[case], "device": cuda.type})]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.10)


def member(rank: int, folder: Path, scenario: Scenario, spec: StrategyConfig) -> None:
    strategy = replace(join(rank, 2, folder / "meeting", spec), device=torch.device("cuda", rank))
    torch.cuda.set_device(rank)
    trajectory = run(scenario, strategy=strategy)
    if rank == 0:
        (folder / "loss.json").write_text(json.dumps(trajectory.loss))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_devices_train_as_one(cuda: torch.device, folder: Path, tmp_path: Path, name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    scenario = scenario_of(folder, "dpo")
    multiprocessing.spawn(member, args=(tmp_path, scenario, StrategyConfig(name=name)), nprocs=2)  # type: ignore[arg-type]
    found = json.loads((tmp_path / "loss.json").read_text())
    assert found == pytest.approx(run(scenario).loss, abs=1e-3)
