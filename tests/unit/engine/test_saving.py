"""Checkpoints that are written beside training are those of their step, and count only once they are whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny
from tiny_runs import CPU, Scenario, join, objective, same_optimizer, save_tiny, store, synthetic_groups, train_alone
from tiny_runs import train_spec as spec_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from rayalign.config.model import LoraConfig
from rayalign.config.training import BestConfig, OptimConfig
from rayalign.engine.checkpoint import saving
from rayalign.engine.checkpoint.checkpoint import step_of
from rayalign.engine.checkpoint.optimizer_state import named_state
from rayalign.engine.checkpoint.saving import Writer
from rayalign.engine.checkpoint.sending import copy_to_host
from rayalign.engine.metrics import read_metrics
from rayalign.engine.optimizer import make_optimizer
from rayalign.engine.state import TrainSpec
from rayalign.engine.strategy.base import make_strategy
from rayalign.errors import Stopped
from rayalign.storage.manifest import verify

SINGLE = make_strategy("single", CPU)
STEPS = 12
DEADLINE_SECONDS = 60


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    folder = tmp_path_factory.mktemp("saving")
    model = save_tiny(folder / "model", "llama_tied")
    pairs = store(folder / "pairs", synthetic_groups([2] * 10), reference=model, groups_per_step=4)
    return Scenario(model=model, streams=(pairs,), objectives=(objective("dpo"),), steps=STEPS)


@pytest.fixture(scope="module")
def straight(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """A run that waited for each of its checkpoints, and has them all."""
    spec = spec_of(tmp_path_factory.mktemp("straight") / "run", scenario, checkpoint_keep=STEPS)
    train_alone(spec, scenario)
    return spec


def beside(spec: TrainSpec, directory: Path, **changes: Any) -> TrainSpec:
    """The same run in another folder, saved beside training; ``changes`` are settings of ``checkpoint``."""
    checkpoint = spec.checkpoint.model_copy(update={"asynchronous": True, **changes})
    return replace(spec, directory=directory, checkpoint=checkpoint)


def checkpoint_of(spec: TrainSpec, step: int) -> Path:
    (found,) = (path for path in (spec.directory / "checkpoints").glob("step_*") if step_of(path) == step)
    return found


def steps_of(spec: TrainSpec) -> list[int]:
    return sorted(step_of(path) for path in (spec.directory / "checkpoints").glob("step_*"))


def rows(spec: TrainSpec) -> list[dict[str, Any]]:
    found = read_metrics(spec.directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in found]


def same(spec: TrainSpec, other: TrainSpec, step: int, *, files: tuple[str, ...] = ("model.safetensors",)) -> bool:
    mine, theirs = checkpoint_of(spec, step), checkpoint_of(other, step)
    verify(mine)
    return all((mine / file).read_bytes() == (theirs / file).read_bytes() for file in files) and same_optimizer(
        mine, theirs
    )


class Late:
    """Lets no file of a checkpoint be written before training is a step further."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.write = saving.write_checkpoint
        self.done = {step: threading.Event() for step in range(1, STEPS + 1)}
        self.written: list[int] = []
        monkeypatch.setattr(saving, "write_checkpoint", self.later)

    def later(self, run: Any, *, step: int, **arguments: Any) -> None:
        assert self.done[min(step + 1, STEPS)].wait(DEADLINE_SECONDS)
        self.written.append(step)
        self.write(run, step=step, **arguments)

    def on_step(self, row: Mapping[str, Any]) -> None:
        self.done[row["step"]].set()


def test_what_is_written_later_is_the_state_of_its_step(
    scenario: Scenario, straight: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and both moments have moved on before the first byte is written."""
    late, spec = Late(monkeypatch), beside(straight, tmp_path / "run")
    train_alone(spec, scenario, on_step=late.on_step)
    assert late.written == steps_of(spec) == [2, 4, 6, 8, 10, 12]
    assert all(same(spec, straight, step) for step in late.written)
    assert not same_optimizer(checkpoint_of(spec, 2), checkpoint_of(spec, 4))
    assert rows(spec) == rows(straight)
    final = [run.directory / "final" / "model.safetensors" for run in (spec, straight)]
    assert final[0].read_bytes() == final[1].read_bytes()


def test_an_adapter_that_is_written_later(scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(scenario.streams[0], columns=((),))
    lora = LoraConfig(rank=2, alpha=4.0)
    adapting = replace(scenario, streams=(bare,), lora=lora, reference_in_place=True, steps=4)
    spec = spec_of(tmp_path / "straight", adapting, checkpoint_keep=STEPS)
    train_alone(spec, adapting)
    late, later = Late(monkeypatch), beside(spec, tmp_path / "later")
    late.done[5].set()
    train_alone(later, adapting, on_step=late.on_step)
    files = ("model.safetensors", "adapter/adapter_model.safetensors")
    assert late.written == [2, 4] and all(same(later, spec, step, files=files) for step in (2, 4))


def test_copies_follow_no_change_and_keep_ties() -> None:
    model = tiny("llama_tied")
    state = model.state_dict()
    copied = copy_to_host(state, of=model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(copied[name], tensor) for name, tensor in before.items())
    assert not torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])
    assert copied["lm_head.weight"].data_ptr() == copied["model.embed_tokens.weight"].data_ptr()
    alone = {"own": torch.ones(3)}
    assert copy_to_host(alone, of=model)["own"] is alone["own"] and copy_to_host(alone)["own"] is not alone["own"]


def test_copies_of_parts_without_content_keep_their_shapes(tmp_path: Path) -> None:
    """The last of three workers holds nothing of one or two rows, and the empty parts all lie at address 0."""
    join(0, 1, tmp_path / "meeting-point")
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = {f"{rows}.exp_avg": torch.Size((rows, 4)) for rows in (1, 2)}
        held = {
            name: DTensor.from_local(torch.zeros(0, 4), mesh, [Shard(0)], run_check=False, shape=shape, stride=(4, 1))
            for name, shape in whole.items()
        }
        assert {name: tensor.shape for name, tensor in copy_to_host(held).items()} == whole
    finally:
        dist.destroy_process_group()


def test_copies_of_an_optimizer() -> None:
    model = tiny("llama")
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3))

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    copied = copy_to_host(named_state(optimizer))
    step()
    # One step with gradient 1: the first moment is 1 - beta1.
    firsts = [tensor for name, tensor in copied.items() if name.endswith(".exp_avg")]
    assert firsts and all(torch.allclose(tensor, torch.tensor(0.1)) for tensor in firsts)
    assert {float(tensor) for name, tensor in copied.items() if name.endswith(".step")} == {1.0}
    assert {float(tensor) for name, tensor in named_state(optimizer).items() if name.endswith(".step")} == {2.0}


def test_only_what_is_committed_is_found(
    scenario: Scenario, straight: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After step 5, while step 4's checkpoint waits, step 2's is the newest; one is kept at the end."""
    late, spec, found = Late(monkeypatch), beside(straight, tmp_path / "run", keep=1), []

    def look(row: Mapping[str, Any]) -> None:
        if row["step"] == 5:
            found.extend(path.parent.name[:11] for path in (spec.directory / "checkpoints").glob("*/MANIFEST.json"))
        late.on_step(row)

    train_alone(spec, scenario, on_step=look)
    assert found == ["step_000002"] and steps_of(spec) == [STEPS] and same(spec, straight, STEPS)


def test_a_stop_waits_for_what_is_being_written(scenario: Scenario, straight: TrainSpec, tmp_path: Path) -> None:
    spec = beside(straight, tmp_path / "run")
    path = spec.directory / "metrics.jsonl"
    with pytest.raises(Stopped, match=r"^stopped after step 7 of 12$"):
        train_alone(spec, scenario, stop=lambda: path.exists() and len(read_metrics(path)) == 6)
    assert steps_of(spec) == [2, 4, 6, 7]
    verify(checkpoint_of(spec, 7))
    train_alone(spec, scenario)
    assert same(spec, straight, STEPS) and rows(spec) == rows(straight)


class Interrupted(Exception):
    """Stands for whatever ends a process between two steps."""


def test_an_end_by_an_error_still_commits(
    scenario: Scenario, straight: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, spec = Late(monkeypatch), beside(straight, tmp_path / "run")

    def lost(row: Mapping[str, Any]) -> None:
        late.on_step(row)
        if row["step"] == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_alone(spec, scenario, on_step=lost)
    assert same(spec, straight, 4)


def test_retention_and_the_best(
    scenario: Scenario, straight: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a later step does not decide which is the best."""
    measured = {row["step"]: row["rewards/margins"] for row in rows(straight) if row["step"] % 2 == 0}
    for mode, choose in (("min", min), ("max", max)):
        with pytest.MonkeyPatch.context() as patch:
            late = Late(patch)
            best = BestConfig(metric="rewards/margins", mode=mode)
            spec = beside(straight, tmp_path / mode, best=best, keep=1)
            train_alone(spec, scenario, on_step=late.on_step)
        assert steps_of(spec) == sorted({choose(measured, key=measured.__getitem__), STEPS})


@pytest.mark.parametrize("asynchronous", [False, True])
def test_seconds_that_saving_takes_from_training(asynchronous: bool, scenario: Scenario, tmp_path: Path) -> None:
    """The row after a save says how long it held training; the others say 0."""
    spec = spec_of(tmp_path / "run", scenario, checkpoint_asynchronous=asynchronous)
    train_alone(spec, scenario)
    told = {row["step"]: row["seconds_saving"] for row in read_metrics(spec.directory / "metrics.jsonl")}
    assert {step for step, seconds in told.items() if seconds > 0} == {3, 5, 7, 9, 11}
    assert all(told[step] == 0.0 for step in (1, 2, 4, 6, 8, 10, 12))


def failing(message: str) -> Callable[[], None]:
    def write() -> None:
        raise OSError(message)

    return write


def test_an_error_of_the_thread_is_raised_once_and_by_the_next_call() -> None:
    for ask in (Writer.wait, lambda writer: writer.submit(lambda: None)):
        with Writer(asynchronous=True, strategy=SINGLE) as writer:
            writer.submit(failing("full"))
            with pytest.raises(OSError, match="full"):
                ask(writer)
            writer.check()
    with pytest.raises(OSError, match="full"), Writer(asynchronous=True, strategy=SINGLE) as writer:
        writer.submit(failing("full"))


def test_an_error_of_the_thread_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Interrupted), Writer(asynchronous=True, strategy=SINGLE) as writer:
        writer.submit(failing("full"))
        raise Interrupted
    assert "the checkpoint that was being written is lost: full" in caplog.text


def test_without_a_thread_it_is_written_at_once() -> None:
    done: list[int] = []
    with Writer(asynchronous=False, strategy=SINGLE) as writer:
        writer.submit(lambda: done.append(1))
        assert done == [1]
        with pytest.raises(OSError, match="full"):
            writer.submit(failing("full"))
