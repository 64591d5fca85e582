"""PPO on rounds by two workers under every strategy, and with an adapter: both models, saved and gone on with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from critics import (
    PLAN,
    Interrupted,
    adapting,
    checkpoint,
    first_critic,
    interrupt_after,
    opened,
    ppo,
    rows,
    same_end,
)
from safetensors.torch import load_file
from teams import Task, results_of
from tiny_rollouts import InProcess, OnPolicyRun
from tiny_runs import same_optimizer, train_with_critic

from rayalign.config.training import StrategyConfig
from rayalign.engine.model.lora import ADAPTER
from rayalign.engine.strategy.base import Strategy
from rayalign.errors import Stopped
from rayalign.rounds.service import serve_rounds


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, file: Path) -> OnPolicyRun:
    run = ppo(tmp_path_factory.mktemp("run"), model, file)
    run.train(InProcess())
    return run


# Teams of two workers.

SHARDED = {
    "ddp": StrategyConfig(name="ddp"),
    "fsdp2": StrategyConfig(name="fsdp2"),
    "zero2": StrategyConfig(name="deepspeed", zero_stage=2),
    "zero3": StrategyConfig(name="deepspeed", zero_stage=3),
}
CHANGES = [
    ("ddp", "ddp"),
    ("fsdp2", "fsdp2"),
    ("fsdp2", "ddp"),
    ("ddp", "fsdp2"),
    ("zero2", "zero2"),
    ("zero3", "zero3"),
]
"""A run that is stopped inside its first round goes on under another strategy."""
KEPT = {"checkpoint_keep": 9}


def part_of_a_run(strategy: Strategy, run: OnPolicyRun, changes: Mapping[str, Any], last_step: int) -> None:
    """Train up to ``last_step``; rank 0's process draws the rounds."""

    def stop() -> bool:
        return (run.directory / "metrics.jsonl").exists() and len(rows(run)) == last_step - 1

    with contextlib.ExitStack() as stack:
        if strategy.rank == 0:
            stack.enter_context(serve_rounds(run.job, InProcess(), run.notes.append))
        with contextlib.suppress(Stopped):
            train_with_critic(run.spec(**changes), run.scenario, strategy, stop=stop)


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory, model: Path, file: Path) -> dict[str, OnPolicyRun]:
    """What two workers did: whole runs, whole runs that save beside training, runs in two parts."""
    folder = tmp_path_factory.mktemp("teams")
    known = {name: spec for name, spec in SHARDED.items() if spec.name != "deepspeed" or find_spec("deepspeed")}
    runs, tasks = {}, {}
    for name, spec in known.items():
        for way in ("whole", "late"):
            runs[f"{name} {way}"] = run = ppo(folder / f"{name}-{way}", model, file)
            changes = {"checkpoint_asynchronous": way == "late"}
            tasks[f"{name} {way}"] = Task(spec, part_of_a_run, (run, changes, PLAN.steps + 1))
        runs[f"{name} adapter"] = run = adapting(folder / f"{name}-adapter", model, file, dropout=0.0)
        tasks[f"{name} adapter"] = Task(spec, part_of_a_run, (run, {}, PLAN.steps + 1))
    for before, after in CHANGES:
        if before in known:
            runs[f"{before} {after}"] = run = ppo(folder / f"{before}-{after}", model, file)
            tasks[f"{before} {after} 1"] = Task(known[before], part_of_a_run, (run, KEPT, 3))
            tasks[f"{before} {after} 2"] = Task(known[after], part_of_a_run, (run, KEPT, PLAN.steps + 1))
    results_of(folder, 2, tasks)
    return runs


def of_teams(teams: Mapping[str, OnPolicyRun], name: str) -> OnPolicyRun:
    if name not in teams:
        pytest.skip("needs deepspeed: make test-slow installs it")
    return teams[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_two_workers_are_one(name: str, teams: Mapping[str, OnPolicyRun], trained: OnPolicyRun) -> None:
    run = of_teams(teams, f"{name} whole")
    for number in range(2):
        mine, theirs = (opened(each, number) for each in (run, trained))
        for column in ("old_value", "advantage", "return"):
            left, right = (np.concatenate([each[row].per_token[column] for row in range(8)]) for each in (mine, theirs))
            assert left == pytest.approx(right, abs=2e-4)
    equal_up_to_rounding(run, trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_two_workers_are_one_with_an_adapter(
    name: str, teams: Mapping[str, OnPolicyRun], tmp_path: Path, model: Path, file: Path
) -> None:
    alone = adapting(tmp_path, model, file, dropout=0.0)
    alone.train(InProcess())
    equal_up_to_rounding(of_teams(teams, f"{name} adapter"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_both_models_are_saved_beside_training(name: str, teams: Mapping[str, OnPolicyRun]) -> None:
    late, whole = (of_teams(teams, f"{name} {way}") for way in ("late", "whole"))
    same_models(late, whole)
    for step, folder in product((4, PLAN.steps), (Path(), Path("critic"))):
        mine, theirs = (checkpoint(run, step) / folder for run in (late, whole))
        assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        if SHARDED[name].name == "deepspeed":
            names = sorted(path.name for path in (theirs / "trainer").iterdir())
            parts = (
                [torch.load(place / "trainer" / name, weights_only=True) for name in names] for place in (mine, theirs)
            )
            assert all(torch.equal(a[key], b[key]) for a, b in zip(*parts, strict=True) for key in b)
        else:
            assert same_optimizer(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_both_models_go_on_under_another_strategy(
    before: str, after: str, teams: Mapping[str, OnPolicyRun], trained: OnPolicyRun
) -> None:
    run = of_teams(teams, f"{before} {after}")
    assert (checkpoint(run, 3) / "critic" / "model.safetensors").exists()
    if before == after:
        same_models(run, of_teams(teams, f"{before} whole"))
    equal_up_to_rounding(run, trained)


def same_models(one: OnPolicyRun, other: OnPolicyRun) -> None:
    for place in ("final", "final_critic"):
        mine, theirs = (load_file(each.directory / place / "model.safetensors") for each in (one, other))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [row["loss"] for row in rows(one)] == [row["loss"] for row in rows(other)]


def equal_up_to_rounding(run: OnPolicyRun, alone: OnPolicyRun) -> None:
    for mine, theirs in zip(rows(run), rows(alone), strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("loss", "critic/loss", "critic/value", "critic/return", "kl/behavior_k3"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
        assert mine["critic/grad_norm"] == pytest.approx(theirs["critic/grad_norm"], rel=1e-3)
    for place in ("final", "final_critic"):
        one, two = (load_file(each.directory / place / "model.safetensors") for each in (run, alone))
        assert max(float((one[name] - two[name]).abs().max()) for name in two) <= 3e-4  # a third of the rate


# A policy with an adapter.


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, model: Path, file: Path) -> OnPolicyRun:
    run = adapting(tmp_path_factory.mktemp("adapted"), model, file)
    run.train(InProcess())
    return run


def test_an_adapter_learns_beside_a_critic_that_is_trained_whole(
    adapted: OnPolicyRun, trained: OnPolicyRun, model: Path
) -> None:
    """The first round, its values included, is that of a policy that is trained whole."""
    for name in ("old_value", "advantage", "return", "behavior_token_logp"):
        left, right = (
            np.concatenate([store[row].per_token[name] for row in range(8)])
            for store in (opened(adapted, 0), opened(trained, 0))
        )
        assert np.array_equal(left, right), name
    final = adapted.directory / "final"
    start, end = (load_file(path / "model.safetensors") for path in (model, final))
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert start.keys() == end.keys() and moved and all("_proj." in name for name in moved)
    assert all(torch.linalg.matrix_rank(end[name] - start[name], rtol=1e-3) <= 3 for name in moved)
    assert all(".lora_" in name for name in load_file(final / ADAPTER / "adapter_model.safetensors"))
    before = first_critic(model).state_dict()
    critic = load_file(adapted.directory / "final_critic" / "model.safetensors")
    assert critic.keys() == before.keys()
    assert all(not torch.equal(critic[name], before[name]) for name in critic if name.endswith("weight"))
    assert not (adapted.directory / "final_critic" / ADAPTER).exists()


@pytest.mark.parametrize("last_step", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_trainer_of_an_adapter_ends_in_the_same_two_models(
    adapted: OnPolicyRun, tmp_path: Path, model: Path, file: Path, last_step: int
) -> None:
    """Inside the first round, and inside the second, which the merged weights have drawn."""
    run = adapting(tmp_path, model, file)
    with pytest.raises(Interrupted):
        run.train(on_step=interrupt_after(last_step))
    run.train()
    same_end(run, adapted)
    mine, theirs = (
        load_file(each.directory / "final" / ADAPTER / "adapter_model.safetensors") for each in (run, adapted)
    )
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
