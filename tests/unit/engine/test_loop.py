"""A run that was interrupted, however, ends where an uninterrupted one does, bit for bit."""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
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
    optimizer_in,
    same_optimizer,
    save_tiny,
    source_maker,
    store,
    synthetic_groups,
    train_alone,
    train_spec,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayalign.config.training import BestConfig
from rayalign.data.micro_batches import PlanError
from rayalign.data.rows import Layout
from rayalign.engine.batches import StreamWork
from rayalign.engine.checkpoint.checkpoint import IncompatibleCheckpoint, step_of
from rayalign.engine.first_step import PolicyMismatch, check_initial_logratio
from rayalign.engine.loop import train_policy
from rayalign.engine.metrics import read_metrics
from rayalign.engine.state import TrainSpec
from rayalign.engine.step import NonFiniteStep
from rayalign.engine.strategy.base import make_strategy
from rayalign.errors import Stopped, UserError
from rayalign.storage.disk import DiskFull
from rayalign.storage.manifest import commit, verify

SINGLE = make_strategy("single", torch.device("cpu"))
FIXTURES = Path(__file__).parents[2] / "fixtures"
STEPS = 12


class Interrupted(Exception):
    """Stands for whatever ends a process between two steps."""


pytestmark = pytest.mark.usefixtures("own_cache")


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
    (found,) = (path for path in (directory / "checkpoints").glob("step_*") if step_of(path) == step)
    return found


def assert_same_end(directory: Path, other: Path) -> None:
    """Equal weights, optimizer and rows, every bit of them."""
    for place in (Path("final"), Path("checkpoints")):
        mine = directory / place if place.name == "final" else checkpoint_of(directory, STEPS)
        theirs = other / place if place.name == "final" else checkpoint_of(other, STEPS)
        assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert same_optimizer(checkpoint_of(directory, STEPS), checkpoint_of(other, STEPS))
    assert rows(directory) == rows(other)
    assert [row["step"] for row in rows(directory)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("lost_after", [pytest.param(1, marks=pytest.mark.slow), 5, 6])
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


def test_a_finished_run_is_left_alone(scenario: Scenario, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.suffix != ".jsonl"}
    kept = rows(whole)
    train_alone(train_spec(whole, scenario), scenario, on_step=interrupt_after(STEPS))
    assert {path: path.stat().st_mtime_ns for path in before} == before and rows(whole) == kept


@pytest.mark.parametrize("place", ["manifest", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_kill_in_the_middle_of_a_checkpoint(place: str, scenario: Scenario, whole: Path, tmp_path: Path) -> None:
    spec = train_spec(tmp_path / "run", scenario)
    (tmp_path / "run.pkl").write_bytes(pickle.dumps((spec, scenario)))
    command = [sys.executable, str(FIXTURES / "stop_in_checkpoint.py"), str(tmp_path / "run.pkl"), place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "stopped\n" in iter(process.stdout.readline, "")
        process.kill()
    unfinished = checkpoint_of(spec.directory, 4)
    assert not (unfinished / "MANIFEST.json").exists()
    assert (unfinished / "model.safetensors").exists() == (place == "manifest")
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


def test_the_template_of_the_run_is_saved_with_every_model(scenario: Scenario, tmp_path: Path) -> None:
    """The model is asked as it was trained, wherever it is served or trained further."""
    spec = train_spec(tmp_path, scenario, checkpoint_every=1, chat_template="{{ messages[0].content }}</s>")
    final = train_alone(replace(spec, steps=1), scenario)
    for folder in (final, *(tmp_path / "checkpoints").glob("step_*")):
        saved = AutoTokenizer.from_pretrained(folder)
        assert saved.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a</s>"


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
    spec = train_spec(tmp_path / "run", wrong, check_initial_logratio=True, reference_made={})
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


class Poisoned:
    """A source of some scenario with one group's reference gone wrong at some steps."""

    def __init__(self, scenario: Scenario, steps: Collection[int], *, rank: int = 0, world_size: int = 1) -> None:
        self.make, self.steps, self.rank = source_maker(scenario, rank, world_size), steps, rank

    def __call__(self, layout: Layout, pad_id: int) -> Poisoned:
        self.source = self.make(layout, pad_id)
        return self

    def get(self, step: int) -> tuple[StreamWork, ...]:
        work = self.source.get(step)
        if step in self.steps and self.rank == 0:
            work[0].micro_batches[0].per_candidate["ref_logp"][0, 1] = float("inf")
        return work


@pytest.fixture(scope="module")
def dpo(scenario: Scenario) -> Scenario:
    return replace(scenario, streams=scenario.streams[:1], objectives=(objective("dpo"),))


def poisoned_group(dpo: Scenario, step: int) -> str:
    [part] = make_source(dpo, SINGLE).get(step)
    return part.describe(int(part.micro_batches[0].group_index[0]))


def test_step_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(dpo: Scenario, tmp_path: Path) -> None:
    spec = train_spec(tmp_path / "run", dpo)
    name = poisoned_group(dpo, 5)
    with pytest.raises(NonFiniteStep) as caught:
        train_policy(spec, Poisoned(dpo, {5}), SINGLE)
    folder = spec.directory / "nonfinite" / "step_000006"
    assert str(caught.value).startswith("step 6: loss nan, gradient norm ")
    assert f"; the loss is not finite on {name}. Nothing of this step is kept" in str(caught.value)
    assert str(folder) in str(caught.value) and "optim.on_nonfinite: skip" in str(caught.value)
    assert [row["step"] for row in rows(spec.directory)] == [1, 2, 3, 4, 5]
    assert checkpoint_of(spec.directory, 4)

    saved = json.loads((folder / "rank_0.json").read_text())
    assert (saved["step"], saved["loss"], saved["suspects"]) == (6, "nan", [name])
    assert len(saved["groups"]) == 4 and len({group["group"] for group in saved["groups"]}) == 4
    losses = {group["group"]: group["losses"]["dpo"] for group in saved["groups"]}
    assert losses.pop(name) == "nan" and all(0 < loss < 5 for loss in losses.values())
    [bad] = [group for group in saved["groups"] if group["group"] == name]
    assert bad["columns"]["ref_logp"][1] == "inf"
    stored = next(group for group in synthetic_groups([2] * 10) if name.endswith(f":{group.line}"))
    assert bad["prompt_ids"] == stored.prompt_ids.tolist()
    assert bad["candidates"] == [candidate.ids.tolist() for candidate in stored.candidates]


def test_a_step_that_is_skipped_changes_nothing_and_is_counted(dpo: Scenario, tmp_path: Path) -> None:
    """The weights after it are those before it, and a restart goes on counting."""
    spec = train_spec(tmp_path / "run", dpo, optim={"on_nonfinite": "skip"}, checkpoint_every=1, checkpoint_keep=12)
    with pytest.raises(Interrupted):
        train_policy(spec, Poisoned(dpo, {3, 6, 7}), SINGLE, on_step=interrupt_after(9))
    before, after = (checkpoint_of(spec.directory, step) for step in (3, 4))
    assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
    train_policy(spec, Poisoned(dpo, {3, 6, 7}), SINGLE)
    found = rows(spec.directory)
    assert [row["skipped_steps"] for row in found] == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3]
    assert [row["step"] for row in found if row["loss"] is None] == [4, 7, 8]
    straight = replace(spec, directory=tmp_path / "straight")
    train_policy(straight, Poisoned(dpo, {3, 6, 7}), SINGLE)
    assert_same_end(straight.directory, spec.directory)


def test_too_many_skips_in_a_row_end_the_run(dpo: Scenario, tmp_path: Path) -> None:
    spec = train_spec(tmp_path / "run", dpo, optim={"on_nonfinite": "skip", "max_skipped_in_a_row": 2})
    train_policy(replace(spec, directory=tmp_path / "two"), Poisoned(dpo, {3, 4, 6, 7}), SINGLE)
    with pytest.raises(NonFiniteStep, match="step 6: .*after 2 that were skipped, which optim.max_skipped_in_a_row"):
        train_policy(spec, Poisoned(dpo, {3, 4, 5}), SINGLE)
    assert [row["step"] for row in rows(spec.directory)] == [1, 2, 3, 4, 5]
    assert (spec.directory / "nonfinite" / "step_000006" / "rank_0.json").exists()


def test_a_stop_during_a_skipped_step_costs_no_other_step(dpo: Scenario, tmp_path: Path) -> None:
    spec = train_spec(tmp_path / "run", dpo, optim={"on_nonfinite": "skip"})
    with pytest.raises(Stopped, match="stopped after step 4 of 12"):
        train_policy(spec, Poisoned(dpo, {3}), SINGLE, stop=asked_in(4, spec.directory))
    assert [row["loss"] is None for row in rows(spec.directory)] == [False, False, False, True]
    train_policy(spec, Poisoned(dpo, {3}), SINGLE)
    assert len(rows(spec.directory)) == STEPS


def skipping_worker(rank: int, folder: Path, dpo: Scenario) -> None:
    strategy = join(rank, 2, folder / "meeting-point")
    for name in ("ddp", "fsdp2"):
        spec = train_spec(folder / name, dpo, optim={"on_nonfinite": "skip"}, check_initial_logratio=False)
        train_policy(spec, Poisoned(dpo, {3}, rank=rank, world_size=2), make_strategy(name, torch.device("cpu")))
    stopping = train_spec(folder / "stopped", dpo)
    with pytest.raises(NonFiniteStep) as caught:
        train_policy(stopping, Poisoned(dpo, {3}, rank=rank, world_size=2), strategy)
    (folder / f"said-{rank}").write_text(str(caught.value))
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_workers_skip_or_stop_together(dpo: Scenario, tmp_path: Path) -> None:
    """One worker alone has the bad group; both leave the step out, and both name the group."""
    multiprocessing.spawn(skipping_worker, args=(tmp_path, dpo), nprocs=2)
    for name in ("ddp", "fsdp2"):
        assert [row["skipped_steps"] for row in rows(tmp_path / name)] == [0] * 3 + [1] * 9
        assert rows(tmp_path / name)[3]["loss"] is None and rows(tmp_path / name)[11]["loss"] > 0
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1] and "not finite on synthetic.jsonl:" in said[0]
    parts = [
        json.loads((tmp_path / f"stopped/nonfinite/step_000004/rank_{rank}.json").read_text()) for rank in range(2)
    ]
    assert sorted(len(part["suspects"]) for part in parts) == [0, 1]
    assert len({group["group"] for part in parts for group in part["groups"]}) == 4


def test_the_best_checkpoint_stays(scenario: Scenario, tmp_path: Path) -> None:
    main = replace(scenario, streams=scenario.streams[:1], objectives=scenario.objectives[:1], lr=3e-2)
    best = BestConfig(metric="rewards/margins", mode="min")
    spec = train_spec(tmp_path / "run", main, checkpoint_best=best, checkpoint_keep=1)
    with pytest.raises(Interrupted):
        train_alone(spec, main, on_step=interrupt_after(9))
    train_alone(spec, main)
    measured = {row["step"]: row["rewards/margins"] for row in rows(spec.directory) if row["step"] % 2 == 0}
    expected = min(measured, key=measured.__getitem__)
    assert expected < 8  # it was there before the interruption
    left = {step_of(path) for path in (spec.directory / "checkpoints").iterdir() if path.is_dir()}
    assert left == {expected, STEPS}
    told = json.loads((spec.directory / "checkpoints" / "best.json").read_text())
    assert (told["step"], told["value"]) == (expected, measured[expected])
    assert told["directory"] == checkpoint_of(spec.directory, expected).name


def test_the_best_checkpoint_is_told_by_a_whole_number_too(scenario: Scenario, tmp_path: Path) -> None:
    main = replace(scenario, streams=scenario.streams[:1], objectives=scenario.objectives[:1])
    best = BestConfig(metric="step_tokens", mode="max")
    spec = train_spec(tmp_path / "run", main, checkpoint_best=best, checkpoint_keep=1)
    train_alone(spec, main)
    measured = {row["step"]: row["step_tokens"] for row in rows(spec.directory) if row["step"] % 2 == 0}
    told = json.loads((spec.directory / "checkpoints" / "best.json").read_text())
    expected = max(measured, key=measured.__getitem__)
    assert (told["step"], told["value"]) == (expected, measured[expected])


@pytest.mark.parametrize("metric", ["rewards/margin", "eval_loss"])
def test_a_metric_that_no_row_has_ends_the_run_with_the_first_step(
    metric: str, scenario: Scenario, tmp_path: Path
) -> None:
    spec = train_spec(tmp_path / "run", scenario, checkpoint_best=BestConfig(metric=metric, mode="min"))
    with pytest.raises(UserError, match=f"no row of metrics has '{metric}'; rows of this run have .*rewards/margins"):
        train_alone(spec, scenario)
    assert not (spec.directory / "checkpoints").exists()


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("zero-00001-of-00001.pt", "DeepSpeed's own optimizer state"),
        (
            "optimizer.pt",
            r"as an earlier version of rayalign wrote it, trainer/optimizer\.pt\. Continue with",
        ),
    ],
)
def test_weights_alone_are_gone_on_from_only_if_that_is_asked_for(
    file: str, told: str, dpo: Scenario, tmp_path: Path
) -> None:
    """The optimizer's state is none that we read, as DeepSpeed's is not; the new one has counted the steps since."""
    spec = train_spec(tmp_path / "run", dpo)
    with pytest.raises(Interrupted):
        train_alone(spec, dpo, on_step=interrupt_after(5))
    checkpoint = checkpoint_of(spec.directory, 4)
    facts = {name: value for name, value in verify(checkpoint).items() if name not in ("files", "manifest_sha256")}
    for path in (checkpoint / "trainer").iterdir():
        path.unlink()
    (checkpoint / "trainer" / file).write_bytes(b"")
    commit(checkpoint, facts)
    with pytest.raises(UserError, match=rf"{told}.*checkpoint\.restart_optimizer=true"):
        train_alone(spec, dpo)
    seen: list[int] = []
    again = replace(spec, checkpoint=spec.checkpoint.model_copy(update={"restart_optimizer": True}))
    train_alone(again, dpo, on_step=lambda row: seen.append(row["step"]))
    assert seen[0] == 5 and [row["step"] for row in rows(spec.directory)] == list(range(1, STEPS + 1))
    counted = {
        float(value) for name, value in optimizer_in(checkpoint_of(spec.directory, STEPS)).items() if "step" in name
    }
    assert counted == {STEPS - 4.0}


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_full_disk_is_a_message_and_the_old_checkpoint_survives(
    asynchronous: bool, dpo: Scenario, whole: Path, tmp_path: Path
) -> None:
    """Of a process that may write files of at most 60 kB: weights do not fit; then it may write more."""
    spec = train_spec(tmp_path / "run", dpo, checkpoint_asynchronous=asynchronous)
    with pytest.raises(Interrupted):
        train_alone(spec, dpo, on_step=interrupt_after(3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(DiskFull) as caught:
            train_alone(spec, dpo)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    runner, _ = make_runner(dpo, SINGLE)
    wanted = 3 * sum(parameter.nbytes for parameter in runner.module.parameters())
    assert f"it wants about {wanted:,} bytes" in str(caught.value) and "step_000004-a" in str(caught.value)
    assert [step_of(path) for path in (spec.directory / "checkpoints").iterdir()] == [2]
    verify(checkpoint_of(spec.directory, 2))
    train_alone(spec, dpo)
    straight = replace(spec, directory=tmp_path / "straight")
    train_alone(straight, dpo)
    assert_same_end(spec.directory, straight.directory)


def asked_in(step: int, directory: Path) -> Callable[[], bool]:
    """A request to stop that comes while a step is under way."""
    return lambda: (directory / "metrics.jsonl").exists() and len(rows(directory)) == step - 1


def test_a_stopped_run_saves_its_step_and_goes_on(scenario: Scenario, whole: Path, tmp_path: Path) -> None:
    """Step 6 is between two checkpoints; the next attempt begins there, and stops before its first step as well."""
    spec = train_spec(tmp_path / "run", scenario)
    with pytest.raises(Stopped, match=r"^stopped after step 6 of 12$"):
        train_alone(spec, scenario, stop=asked_in(6, spec.directory))
    verify(checkpoint_of(spec.directory, 6))
    with pytest.raises(Stopped, match=r"^stopped after step 6 of 12$"):
        train_alone(spec, scenario, stop=lambda: True)
    seen: list[int] = []
    train_alone(spec, scenario, on_step=lambda row: seen.append(row["step"]))
    assert seen[0] == 7
    assert_same_end(spec.directory, whole)


def test_a_stop_before_the_first_step_and_one_in_the_last(scenario: Scenario, whole: Path, tmp_path: Path) -> None:
    spec = train_spec(tmp_path / "run", scenario)
    with pytest.raises(Stopped, match="after step 0 of 12"):
        train_alone(spec, scenario, stop=lambda: True)
    assert not (spec.directory / "checkpoints").exists()
    assert train_alone(spec, scenario, stop=asked_in(STEPS, spec.directory)) == spec.directory / "final"
    assert_same_end(spec.directory, whole)


def resuming_worker(rank: int, folder: Path, spec: TrainSpec, scenario: Scenario) -> None:
    """A straight run, and one that is stopped in its sixth step: rank 0 alone is asked."""
    strategy, make = join(rank, 2, folder / "meeting-point"), source_maker(scenario, rank, 2)
    train_policy(replace(spec, directory=folder / "straight"), make, strategy)
    other = replace(spec, directory=folder / "resumed")
    asked = asked_in(6, other.directory)
    with pytest.raises(Stopped, match="after step 6 of 12"):
        train_policy(other, make, strategy, stop=lambda: rank == 0 and asked())
    train_policy(other, make, strategy)
    dist.destroy_process_group()


class Notice:
    """Heard once, when it is asked for after step 5; nobody asks between two of these steps."""

    def __init__(self) -> None:
        self.asked = 0

    def due(self) -> bool:
        self.asked += 1
        return self.asked % 5 == 0

    def heard(self) -> str | None:
        return "the cluster takes back the node of worker 0" if self.asked == 5 else None


def test_a_notice_saves_its_step_and_changes_nothing_else(
    scenario: Scenario, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "run"
    spec = train_spec(directory, scenario, checkpoint_every=STEPS, checkpoint_keep=9)
    train_policy(spec, source_maker(scenario), SINGLE, notices=Notice())
    assert [step_of(path) for path in sorted((directory / "checkpoints").glob("step_*"))] == [5, STEPS]
    said = [record.getMessage() for record in caplog.records if "takes back" in record.getMessage()]
    assert said == ["run: the cluster takes back the node of worker 0; saves step 5 and continues"]
    assert rows(directory) == rows(whole)
    assert_same_end(directory, whole)


def test_a_notice_in_a_skipped_step_saves_that_step(dpo: Scenario, tmp_path: Path) -> None:
    spec = train_spec(tmp_path / "run", dpo, optim={"on_nonfinite": "skip"}, checkpoint_every=STEPS, checkpoint_keep=9)
    train_policy(spec, Poisoned(dpo, {4}), SINGLE, notices=Notice())
    assert [row["step"] for row in rows(spec.directory) if row["loss"] is None] == [5]
    assert [step_of(path) for path in sorted((spec.directory / "checkpoints").glob("step_*"))] == [5, STEPS]


@pytest.mark.slow
def test_resume_on_two_workers(scenario: Scenario, whole: Path, tmp_path: Path) -> None:
    """Six steps, then the other six: exactly the twelve of two workers, and up to rounding those of one."""
    constant = {"schedule": "constant", "warmup": 0, "lr": 1e-3}
    spec = train_spec(tmp_path / "straight", scenario)
    spec = replace(spec, optim=spec.optim.model_copy(update=constant))
    multiprocessing.spawn(resuming_worker, args=(tmp_path, spec, scenario), nprocs=2)
    straight, resumed = (checkpoint_of(tmp_path / name, STEPS) for name in ("straight", "resumed"))
    assert (straight / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert rows(tmp_path / "straight") == rows(tmp_path / "resumed")

    alone = replace(spec, directory=tmp_path / "alone")
    train_alone(alone, scenario)
    one, two = (load_file(path / "model.safetensors") for path in (checkpoint_of(alone.directory, STEPS), straight))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-4
