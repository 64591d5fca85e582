"""A run that was interrupted, however, ends where an uninterrupted one does, bit for bit."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from tiny_runs import (
    Scenario,
    join,
    make_runner,
    make_source,
    objective,
    save_tiny,
    source_maker,
    store,
    synthetic_groups,
    train_alone,
    train_spec,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayalign.data.plan import PlanError
from rayalign.data.rows import Layout
from rayalign.engine.checkpoint import OPTIMIZER, IncompatibleCheckpoint, step_of
from rayalign.engine.first_step import PolicyMismatch, check_initial_logratio
from rayalign.engine.loop import train
from rayalign.engine.metrics import read_metrics
from rayalign.engine.source import StreamWork
from rayalign.engine.step import NonFiniteStep
from rayalign.engine.strategy import make_strategy
from rayalign.errors import Stopped
from rayalign.manifest import verify

SINGLE = make_strategy("single", torch.device("cpu"))
FIXTURES = Path(__file__).parents[2] / "fixtures"
STEPS = 12


class Interrupted(Exception):
    """Stands for whatever ends a process between two steps."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """MPO and an auxiliary stream on a model with tied weights: two streams, and weights that are stored once."""
    folder = tmp_path_factory.mktemp("loop")
    model = save_tiny(folder / "model", "llama_tied")
    pairs = store(folder / "pairs", synthetic_groups([2] * 10), reference=model, groups_per_step=4)
    desk = store(folder / "desk", synthetic_groups([1] * 7, seed=1), name="desk", groups_per_step=2)
    likelihood = objective("sft", stream="desk", weight=0.1)
    return Scenario(model=model, streams=(pairs, desk), objectives=(objective("mpo"), likelihood), steps=STEPS)


@pytest.fixture(scope="module")
def whole(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert train_alone(train_spec(directory, scenario), scenario) == directory / "final"
    return directory


def interrupt_after(step: int) -> Any:
    def on_step(row: Mapping[str, Any]) -> None:
        if row["step"] == step:
            raise Interrupted

    return on_step


def rows(directory: Path) -> list[dict[str, Any]]:
    """Metrics without what the clock says."""
    found = read_metrics(directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in found]


def checkpoint_of(directory: Path, step: int) -> Path:
    (found,) = (path for path in (directory / "checkpoints").iterdir() if step_of(path) == step)
    return found


def assert_same_end(directory: Path, other: Path) -> None:
    """Equal weights, optimizer and rows, every bit of them."""
    for place in (Path("final"), Path("checkpoints")):
        mine = directory / place if place.name == "final" else checkpoint_of(directory, STEPS)
        theirs = other / place if place.name == "final" else checkpoint_of(other, STEPS)
        assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    mine, theirs = (torch.load(checkpoint_of(run, STEPS) / OPTIMIZER, weights_only=True) for run in (directory, other))
    assert mine["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert all(torch.equal(mine["state"][index][name], value) for name, value in state.items())
    assert rows(directory) == rows(other)
    assert [row["step"] for row in rows(directory)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("lost_after", [1, 5, 6])
def test_resume_is_exact(lost_after: int, scenario: Scenario, whole: Path, tmp_path: Path) -> None:
    """Lost before the first checkpoint, between two, and right before one."""
    spec = train_spec(tmp_path / "run", scenario)
    with pytest.raises(Interrupted):
        train_alone(spec, scenario, on_step=interrupt_after(lost_after))
    assert len(rows(spec.directory)) == lost_after
    seen: list[int] = []
    train_alone(spec, scenario, on_step=lambda row: seen.append(row["step"]))
    assert seen[0] == {1: 1, 5: 5, 6: 5}[lost_after]
    assert_same_end(spec.directory, whole)


@pytest.mark.parametrize("step", [1, 6, STEPS])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_from_it(
    step: int, scenario: Scenario, whole: Path, tmp_path: Path
) -> None:
    """Asked before a checkpoint, at one, and after the last step, when there is nothing left to stop."""
    spec, done = train_spec(tmp_path / "run", scenario), list[int]()
    arguments = {"on_step": lambda row: done.append(row["step"]), "stop": lambda: step in done}
    if step < STEPS:
        with pytest.raises(Stopped, match=f"stopped after step {step} of {STEPS}"):
            train_alone(spec, scenario, **arguments)
        assert len(rows(spec.directory)) == step
        verify(checkpoint_of(spec.directory, step))
        assert not (spec.directory / "final").exists()
        train_alone(spec, scenario, on_step=lambda row: done.append(row["step"]))
    else:
        train_alone(spec, scenario, **arguments)
    assert done == list(range(1, STEPS + 1))
    assert_same_end(spec.directory, whole)


def test_a_finished_run_is_left_alone(scenario: Scenario, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.suffix != ".jsonl"}
    kept = rows(whole)
    train_alone(train_spec(whole, scenario), scenario, on_step=interrupt_after(STEPS))
    assert {path: path.stat().st_mtime_ns for path in before} == before and rows(whole) == kept


@pytest.mark.parametrize("place", ["weights", "manifest"])
def test_kill_in_the_middle_of_a_checkpoint(place: str, scenario: Scenario, whole: Path, tmp_path: Path) -> None:
    spec = train_spec(tmp_path / "run", scenario)
    (tmp_path / "run.pkl").write_bytes(pickle.dumps((spec, scenario)))
    command = [sys.executable, str(FIXTURES / "stop_in_checkpoint.py"), str(tmp_path / "run.pkl"), place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "stopped\n" in iter(process.stdout.readline, "")
        process.kill()
    unfinished = checkpoint_of(spec.directory, 4)
    assert not (unfinished / "MANIFEST.json").exists() and (unfinished / "model.safetensors").exists()
    train_alone(spec, scenario)
    assert not unfinished.exists()
    assert_same_end(spec.directory, whole)


def test_what_is_written_loads_as_a_model(scenario: Scenario, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runner, policy = make_runner(scenario, SINGLE)
    (part, _) = make_source(scenario, SINGLE).get(0)
    for directory in (whole / "final", checkpoint_of(whole, STEPS)):
        verify(directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert model.generation_config.eos_token_id == [4]
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith("<|im_st")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        policy.model.load_state_dict(model.state_dict())
        measured = runner.evaluate(0, [part])
        assert measured["loss"] < rows(whole)[0]["loss/train/mpo"] - 0.05
    assert "lm_head.weight" not in load_file(whole / "final" / "model.safetensors")


def test_retention_keeps_the_newest_and_what_is_asked_for(scenario: Scenario, tmp_path: Path) -> None:
    spec = train_spec(tmp_path / "run", scenario, checkpoint_at=(3, 7), checkpoint_every=4, checkpoint_keep=1)
    train_alone(spec, scenario)
    assert sorted(step_of(path) for path in (spec.directory / "checkpoints").iterdir()) == [3, 7, 12]


def test_rows_say_where_the_run_is(scenario: Scenario, whole: Path) -> None:
    found = rows(whole)
    assert [row["epoch"] for row in found] == pytest.approx([4 * step / 10 for step in range(1, STEPS + 1)])
    assert found[-1]["num_tokens"] == sum(row["step_tokens"] for row in found)
    assert [row["learning_rate"] for row in found[:3]] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert all(0 <= row["padding_share"] < 1 for row in found)
    assert found[0]["loss"] == pytest.approx(found[0]["loss/train/mpo"] + found[0]["loss/desk/sft"])


def test_held_out_groups_are_measured_when_asked(scenario: Scenario, tmp_path: Path) -> None:
    main = replace(scenario, streams=scenario.streams[:1], objectives=scenario.objectives[:1])
    held_out = replace(main, streams=(replace(main.streams[0], groups_per_step=10),))
    spec = train_spec(tmp_path / "run", main, evaluate_at=(4, 12))
    train_alone(spec, main, make_held_out=source_maker(held_out))
    measured = {row["step"]: row["eval_loss"] for row in rows(spec.directory) if "eval_loss" in row}
    assert sorted(measured) == [4, 12] and measured[12] < measured[4]
    assert "eval_rewards/margins" in rows(spec.directory)[3]


def test_another_run_is_refused_with_what_differs(scenario: Scenario, whole: Path) -> None:
    changed = {"configuration": {"method": {"name": "dpo", "beta": 0.2}}, "data": "d1"}
    with pytest.raises(IncompatibleCheckpoint, match=r"final.*method.beta: 0.1 there, 0.2 here\. Give this run"):
        train_alone(train_spec(whole, scenario, identity=changed), scenario)


def test_wrong_reference_is_refused_before_the_first_step(scenario: Scenario, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", initializer_range=0.1)
    pairs = store(tmp_path / "pairs", synthetic_groups([2] * 6), reference=other)
    wrong = replace(scenario, streams=(pairs,), objectives=(objective("dpo"),))
    spec = train_spec(tmp_path / "run", wrong, check_initial_logratio=True)
    with pytest.raises(PolicyMismatch, match="before the first step .* run again with --fresh reference"):
        train_alone(spec, wrong)
    assert not (spec.directory / "checkpoints").exists() and rows(spec.directory) == []


@pytest.mark.parametrize(
    ("error", "refused"), [(2e-5, False), (2e-4, True), (float("nan"), True)], ids=["rounding", "drift", "missing"]
)
def test_limit_of_the_first_logratio(error: float, refused: bool, scenario: Scenario) -> None:
    runner, _ = make_runner(scenario, SINGLE)
    work = make_source(scenario, SINGLE).get(0)
    for batch in work[0].micro_batches:
        batch.per_token["ref_token_logp"].add_(error)
    if not refused:
        check_initial_logratio(runner, work)
        return
    with pytest.raises(PolicyMismatch):
        check_initial_logratio(runner, work)


def test_one_wrong_token_is_noticed(scenario: Scenario) -> None:
    runner, _ = make_runner(scenario, SINGLE)
    work = make_source(scenario, SINGLE).get(0)
    work[0].micro_batches[0].per_token["ref_token_logp"][0] += 2e-3
    with pytest.raises(PolicyMismatch, match="for 1 of"):
        check_initial_logratio(runner, work)


def test_group_above_the_budget_is_refused_before_the_first_step(scenario: Scenario, tmp_path: Path) -> None:
    tight = replace(scenario, tokens_per_micro_batch=30, row_tokens=30)
    with pytest.raises(PlanError, match=r"synthetic\.jsonl:\d+ takes \d+ tokens .*tokens_per_micro_batch = 30"):
        train_alone(train_spec(tmp_path / "run", tight), tight)


def test_step_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(scenario: Scenario, tmp_path: Path) -> None:
    dpo = replace(scenario, streams=scenario.streams[:1], objectives=(objective("dpo"),))
    spec = train_spec(tmp_path / "run", dpo)

    class Poisoned:
        def __init__(self, layout: Layout, pad_id: int) -> None:
            self.source = source_maker(dpo)(layout, pad_id)

        def get(self, step: int) -> tuple[StreamWork, ...]:
            work = self.source.get(step)
            if step == 5:
                work[0].micro_batches[0].per_candidate["ref_logp"].fill_(float("inf"))
            return work

    with pytest.raises(NonFiniteStep, match=r"step 6: loss .* synthetic\.jsonl:"):
        train(spec, Poisoned, SINGLE)
    assert [row["step"] for row in rows(spec.directory)] == [1, 2, 3, 4, 5]
    assert checkpoint_of(spec.directory, 4)


def resuming_worker(rank: int, folder: Path, runs: Mapping[str, list[tuple[Any, Scenario]]]) -> None:
    strategy = join(rank, 2, folder / "meeting-point")
    for specs in runs.values():
        for spec, scenario in specs:
            train(spec, source_maker(scenario, rank, 2), strategy)
    dist.destroy_process_group()


def test_resume_on_two_workers(scenario: Scenario, whole: Path, tmp_path: Path) -> None:
    """Six steps, then all twelve: exactly the twelve of two workers, and up to rounding those of one."""
    constant = {"schedule": "constant", "warmup_steps": 0, "lr": 1e-3}
    spec = train_spec(tmp_path / "straight", scenario)
    spec = replace(spec, optimizer=replace(spec.optimizer, **constant))
    half = replace(spec, directory=tmp_path / "resumed", optimizer=replace(spec.optimizer, steps=6))
    rest = replace(spec, directory=tmp_path / "resumed")
    runs = {"straight": [(spec, scenario)], "resumed": [(half, scenario), (rest, scenario)]}
    multiprocessing.spawn(resuming_worker, args=(tmp_path, runs), nprocs=2)
    straight, resumed = (checkpoint_of(tmp_path / name, STEPS) for name in runs)
    assert (straight / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert rows(tmp_path / "straight") == rows(tmp_path / "resumed")

    alone = replace(spec, directory=tmp_path / "alone")
    train_alone(alone, scenario)
    one, two = (load_file(path / "model.safetensors") for path in (checkpoint_of(alone.directory, STEPS), straight))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-4
