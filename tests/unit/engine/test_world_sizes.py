"""A run goes on with other workers, or under another strategy, in the middle of an epoch: same groups, same curve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from teams import Task, results_of, run_until
from tiny_runs import (
    CPU,
    Scenario,
    objective,
    optimizer_in,
    same_optimizer,
    save_tiny,
    store,
    synthetic_groups,
    train_alone,
    train_spec,
)

from rayalign.config.training import StrategyConfig
from rayalign.engine.checkpoint.checkpoint import step_of
from rayalign.engine.metrics import read_metrics
from rayalign.engine.state import TrainSpec
from rayalign.engine.strategy.base import make_strategy

GROUPS, GROUPS_PER_STEP = 10, 4
DDP, FSDP2 = StrategyConfig(name="ddp"), StrategyConfig(name="fsdp2")
COPIES = StrategyConfig(name="fsdp2", shard=2)
Part = tuple[StrategyConfig | None, int, int]
"""A strategy (None: one process without a group), its workers, and the step that they end with."""


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """Half of the epochs end inside a step. Rows of several tensors do not divide by three."""
    folder = tmp_path_factory.mktemp("sizes")
    model = save_tiny(folder / "model", "llama_tied")
    pairs = store(folder / "pairs", synthetic_groups([2] * GROUPS), reference=model, groups_per_step=GROUPS_PER_STEP)
    return Scenario(
        model=model,
        streams=(pairs,),
        objectives=(objective("dpo"),),
        steps=12,
        tokens_per_micro_batch=52,
        row_tokens=52,
    )


def spec_of(directory: Path, scenario: Scenario) -> TrainSpec:
    spec = train_spec(directory, scenario)
    return replace(spec, optim=spec.optim.model_copy(update={"schedule": "constant", "warmup": 0}))


def go(folder: Path, scenario: Scenario, parts: list[Part]) -> tuple[Path, list[list[tuple[int, int, str]]]]:
    """One run in parts; its directory, and the groups that each part trained on."""
    directory = folder / "run"
    spec, seen = spec_of(directory, scenario), []
    for number, (strategy, workers, last) in enumerate(parts):
        if strategy is None:
            seen.append(run_until(make_strategy("single", CPU), spec, scenario, last))
            continue
        meeting = folder / f"part-{number}"
        meeting.mkdir(parents=True)
        found = results_of(meeting, workers, {"run": Task(strategy, run_until, (spec, scenario, last))})["run"]
        seen.append(sorted(group for worker in found for group in worker))
    return directory, seen


def last_of(directory: Path) -> Path:
    return max((directory / "checkpoints").iterdir(), key=step_of)


def check(parts: list[Part], scenario: Scenario, folder: Path) -> None:
    directory, seen = go(folder, scenario, parts)
    alone = spec_of(folder / "alone", scenario)
    train_alone(alone, scenario)

    steps = [sorted({step for step, _, _ in part}) for part in seen]
    begins = [0, *(last for _, _, last in parts)]
    assert steps == [list(range(begin, end)) for begin, end in zip(begins, begins[1:], strict=False)]
    places = sorted(place for part in seen for _, place, _ in part)
    assert places == list(range(scenario.steps * GROUPS_PER_STEP))  # none lost, none twice
    names = [name for part in seen for _, place, name in part if place < 4 * GROUPS]
    assert all(names.count(name) == 4 for name in names) and len(set(names)) == GROUPS

    curves = [read_metrics(run / "metrics.jsonl") for run in (directory, alone.directory)]
    mine, theirs = ([row["loss"] for row in rows] for rows in curves)
    assert mine == pytest.approx(theirs, abs=1e-5) and max(theirs) - min(theirs) > 0.05
    counted = [row["workers"] for row in curves[0]]
    assert counted == [workers for part, steps in zip(parts, steps, strict=True) for workers in [part[1]] * len(steps)]
    weights = [load_file(run / "final" / "model.safetensors") for run in (directory, alone.directory)]
    assert max(float((weights[0][name] - tensor).abs().max()) for name, tensor in weights[1].items()) <= 1e-4
    moments = [optimizer_in(last_of(run)) for run in (directory, alone.directory)]
    assert moments[0].keys() == moments[1].keys()
    assert max(float((moments[0][name] - tensor).abs().max()) for name, tensor in moments[1].items()) <= 1e-3


@pytest.mark.slow
def test_one_two_one(scenario: Scenario, tmp_path: Path) -> None:
    """After 3 and 7 steps of 4 of 10 groups: in the middle of the second and of the third epoch."""
    check([(None, 1, 3), (FSDP2, 2, 7), (None, 1, 12)], scenario, tmp_path)


@pytest.mark.slow
def test_two_three_one_and_back_through_every_form(scenario: Scenario, tmp_path: Path) -> None:
    parts = [(FSDP2, 2, 3), (FSDP2, 3, 5), (DDP, 2, 8), (FSDP2, 3, 10), (None, 1, 12)]
    check(parts, scenario, tmp_path)


@pytest.mark.slow
def test_as_many_workers_change_no_bit(scenario: Scenario, tmp_path: Path) -> None:
    directory, _ = go(tmp_path / "parts", scenario, [(FSDP2, 2, 3), (FSDP2, 2, 7), (FSDP2, 2, 12)])
    straight, _ = go(tmp_path / "straight", scenario, [(FSDP2, 2, 12)])
    for file in ("final/model.safetensors",):
        assert (directory / file).read_bytes() == (straight / file).read_bytes()
    assert same_optimizer(last_of(directory), last_of(straight))
    mine, theirs = ([row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (directory, straight))
    assert mine == theirs


@pytest.mark.slow
def test_two_copies_of_two_shards(scenario: Scenario, tmp_path: Path) -> None:
    check([(FSDP2, 2, 3), (COPIES, 4, 7), (None, 1, 9), (COPIES, 4, 12)], scenario, tmp_path)
