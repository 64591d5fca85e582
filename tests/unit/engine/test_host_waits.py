"""A step's forward and loss need no value of a tensor: on a GPU each such value would wait for the device.

Tensors without values stand for the device's: what reads one fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from method_scenarios import METHODS, scenario_of
from tiny_runs import CPU, make_source
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from rayalign.engine.batches import StreamWork, map_tensors
from rayalign.engine.model.attention import FLEX, AttentionKind, Reach
from rayalign.engine.model.forward import last_positions, root_module
from rayalign.engine.model.pretrained import blank_model
from rayalign.engine.objective import MAIN_STREAM
from rayalign.engine.step import Runner
from rayalign.engine.strategy.base import make_strategy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("waits")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """A compiled kernel needs memory to read from."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_a_value_that_is_read_is_noticed() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(1).item()


@pytest.mark.parametrize("name", METHODS)
def test_a_forward_and_its_loss_wait_for_nothing(folder: Path, name: str) -> None:
    scenario = scenario_of(folder, name)
    strategy = make_strategy("single", CPU)
    [part] = make_source(scenario, strategy).get(0)
    config = blank_model(scenario.model_spec, scenario.model).config
    kind = type(blank_model(scenario.model_spec, scenario.model))
    [objective] = scenario.objectives
    with FakeTensorMode() as mode:
        model = kind._from_config(config, dtype=torch.float32)
        runner = Runner(
            module=root_module(model, AttentionKind(reach=Reach(), implementation=FLEX)),
            objectives={MAIN_STREAM: objective},
            strategy=strategy,
            compute_dtype=torch.bfloat16,
            seed=0,
        )
        batches = tuple(map_tensors(batch, mode.from_tensor) for batch in part.micro_batches)
        with torch.no_grad():  # FlexAttention has no backward on a CPU
            loss_of(runner, batches, part)


def loss_of(runner: Runner, batches: tuple, part: StreamWork) -> None:
    objective = runner.objectives[MAIN_STREAM]
    for batch in batches:
        statistics = runner.statistics(0, StreamWork(
            stream=part.stream, micro_batches=(batch,), counts=part.counts, groups_per_step=part.groups_per_step,
            epoch=part.epoch, num_tokens=part.num_tokens,
        ))  # fmt: skip
        scored = runner.score(objective, batch)
        loss, _ = objective.loss(scored, statistics, part.counts)
        assert loss.shape == ()
        if objective.method.metrics is not None:
            objective.method.metrics(scored, objective.config, statistics)


def test_last_positions_are_those_of_each_candidates_last_token(folder: Path) -> None:
    [part] = make_source(scenario_of(folder, "exo_rw"), make_strategy("single", CPU)).get(0)
    for batch in part.micro_batches:
        found = last_positions(batch)
        groups, branches = batch.group_ids.flatten().tolist(), batch.branch_ids.flatten().tolist()
        for group in range(found.shape[0]):
            for candidate in range(found.shape[1]):
                own = (group, candidate + 1)
                places = [place for place, pair in enumerate(zip(groups, branches, strict=True)) if pair == own]
                assert found[group, candidate] == max(places, default=0)
