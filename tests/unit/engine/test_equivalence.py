"""Micro-batches, layouts and workers change a run by rounding only; the same comparison notices a real change."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tiny_runs import (
    CPU,
    Change,
    Scenario,
    Trajectory,
    drawn,
    join,
    labelled,
    make_source,
    objective,
    real_pairs,
    run,
    save_tiny,
    store,
    synthetic_groups,
)

from rayalign.config.training import StrategyConfig
from rayalign.data.rank import rank_group
from rayalign.engine.batches import StreamWork
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.strategy.base import make_strategy
from rayalign.methods import WPOWeighting, compose, resolve

WORKERS = 2


def worker(rank: int, folder: Path, scenarios: Mapping[str, Scenario], spec: StrategyConfig) -> None:
    strategy = join(rank, WORKERS, folder / "meeting-point", spec)
    for name, scenario in scenarios.items():
        (folder / f"{name}-{rank}").write_bytes(pickle.dumps(run(scenario, strategy=strategy)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("equivalence")
    model = save_tiny(folder / "model")
    pairs = synthetic_groups([2] * 24)
    stored = store(folder / "pairs", pairs, reference=model)
    calm = save_tiny(folder / "calm", initializer_range=0.05)  # nearly uniform: random answers have weights near 1
    weighted = store(folder / "weighted", pairs, reference=calm)
    plain = store(folder / "plain", pairs)
    ragged = store(folder / "ragged", synthetic_groups([2, 3, 4] * 6, seed=1), reference=model)
    ordered = [own for group in synthetic_groups([2, 3, 4] * 6, seed=1) for own in rank_group(group, by_reward=True)]
    rankings = store(folder / "rankings", ordered)
    examples = store(folder / "examples", labelled(pairs), reference=model, groups_per_step=8)
    desk = store(folder / "desk", synthetic_groups([1] * 10, seed=2), name="desk", groups_per_step=3)
    permuted = Objective(
        stream=MAIN_STREAM,
        method=compose(resolve("dpo"), WPOWeighting(alignment="sampled", permute=True)),
        config=resolve("dpo").config(),
    )
    grpo = objective("grpo")
    likelihood = objective("sft", stream="desk", weight=0.1, reduction="sequence")
    return {
        "dpo": Scenario(model=model, streams=(stored,), objectives=(objective("dpo"),)),
        # Three micro-batches of one pair for two workers: one of them computes a dummy.
        "dummies": Scenario(
            model=model,
            streams=(replace(stored, groups_per_step=3),),
            objectives=(objective("dpo"),),
            tokens_per_micro_batch=52,
            row_tokens=52,
        ),
        "mpo": Scenario(model=model, streams=(plain, desk), objectives=(objective("mpo"), likelihood)),
        "wpo_permuted": Scenario(model=calm, streams=(weighted,), objectives=(permuted,), lr=3e-3),
        "kto": Scenario(model=model, streams=(examples,), objectives=(objective("kto"),), tokens_per_micro_batch=100),
        "exo_rw": Scenario(
            model=model, streams=(ragged,), objectives=(objective("exo_rw", behavior_correction="off"),), lr=4e-4
        ),
        "reward_model": Scenario(
            model=calm, streams=(rankings,), objectives=(objective("reward_model", center=0.01),), lr=4e-4
        ),
        "grpo": Scenario(model=model, streams=(drawn(ragged, grpo),), objectives=(grpo,), lr=4e-4),
    }


@pytest.fixture(scope="module")
def alone(scenarios: dict[str, Scenario]) -> dict[str, Trajectory]:
    return {name: run(scenario) for name, scenario in scenarios.items()}


STRATEGIES = {
    "ddp": StrategyConfig(name="ddp"),
    "fsdp2": StrategyConfig(name="fsdp2"),
    "fsdp2_kept": StrategyConfig(name="fsdp2", reshard_after_forward=False, sync_every_micro_batch=False),
    "fsdp2_copies": StrategyConfig(name="fsdp2", shard=1),
    "zero2": StrategyConfig(name="deepspeed", zero_stage=2),
    "zero3": StrategyConfig(name="deepspeed", zero_stage=3),
}


DEEPSPEED = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: make test-slow"),
]
MARKS = {
    "zero2": DEEPSPEED,
    "zero3": DEEPSPEED,
    "fsdp2_kept": [pytest.mark.slow],
    "fsdp2_copies": [pytest.mark.slow],
    "ddp": [pytest.mark.slow],
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=MARKS.get(name, ())) for name in STRATEGIES],
)
def together(
    request: pytest.FixtureRequest, scenarios: dict[str, Scenario], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Trajectory]]:
    """Every scenario on two workers, which all start once; a trajectory per worker."""
    folder = tmp_path_factory.mktemp("workers")
    multiprocessing.spawn(worker, args=(folder, scenarios, STRATEGIES[request.param]), nprocs=WORKERS)
    return {
        name: [pickle.loads((folder / f"{name}-{rank}").read_bytes()) for rank in range(WORKERS)] for name in scenarios
    }


def assert_equivalent(one: Trajectory, other: Trajectory, *, lr: float) -> None:
    """Loss within 1e-5, gradient norm within 1e-4 of itself, final weights within a tenth of one step's movement."""
    assert one.loss == pytest.approx(other.loss, abs=1e-5)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    for name, weight in one.weights.items():
        assert (weight - other.weights[name]).abs().max() <= 0.1 * lr, name
    # At step 0 policy and reference are one model: every pair is a tie, and rounding decides who wins it.
    for mine, theirs in zip(one.metrics[1:], other.metrics[1:], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4, rel=1e-5)


def assert_not_equivalent(one: Trajectory, other: Trajectory, *, lr: float) -> None:
    with pytest.raises(AssertionError):
        assert_equivalent(one, other, lr=lr)


NAMES = ("dpo", "dummies", "mpo", "wpo_permuted", "kto", "exo_rw", "reward_model", "grpo")


@pytest.mark.parametrize("name", NAMES)
def test_runs_learn(name: str, alone: dict[str, Trajectory]) -> None:
    """Otherwise agreement would prove nothing."""
    loss = alone[name].loss
    assert min(loss[-4:]) < loss[0] - 0.05


@pytest.mark.parametrize("name", NAMES)
def test_workers(
    name: str, scenarios: dict[str, Scenario], alone: dict[str, Trajectory], together: dict[str, list[Trajectory]]
) -> None:
    first, second = together[name]
    assert_equivalent(first, alone[name], lr=scenarios[name].lr)
    assert first.loss == second.loss and first.grad_norm == second.grad_norm and first.metrics == second.metrics
    if all(weight.shape == second.weights[key].shape for key, weight in first.weights.items()):  # else on rank 0 alone
        assert all(torch.equal(first.weights[key], second.weights[key]) for key in first.weights)


@pytest.mark.parametrize("name", NAMES)
def test_budgets(name: str, scenarios: dict[str, Scenario], alone: dict[str, Trajectory]) -> None:
    scenario = scenarios[name]
    one_row = run(replace(scenario, tokens_per_micro_batch=4096, row_tokens=None))
    assert_equivalent(one_row, alone[name], lr=scenario.lr)


@pytest.mark.parametrize("name", NAMES)
def test_layouts(name: str, scenarios: dict[str, Scenario], alone: dict[str, Trajectory]) -> None:
    scenario = scenarios[name]
    concatenated = run(replace(scenario, layout="concatenated", tokens_per_micro_batch=600))
    assert_equivalent(concatenated, alone[name], lr=scenario.lr)


def test_dummies_are_among_the_work_of_two(scenarios: dict[str, Scenario]) -> None:
    source = make_source(scenarios["dummies"], make_strategy("single", CPU))
    work = []
    for rank in range(WORKERS):
        source.packer = replace(source.packer, rank=rank, world_size=WORKERS)
        work.append(source.get(0)[0].micro_batches)
    assert [len(batches) for batches in work] == [2, 2]
    assert sorted(bool(batch.candidate_mask.any()) for batches in work for batch in batches) == [
        False,
        True,
        True,
        True,
    ]


def without_a_group(work: tuple[StreamWork, ...]) -> tuple[StreamWork, ...]:
    work[0].micro_batches[0].candidate_mask[0] = False
    return work


def with_another_denominator(work: tuple[StreamWork, ...]) -> tuple[StreamWork, ...]:
    counts = work[0].counts
    wrong = replace(counts, pairs=counts.pairs + 1, groups=counts.groups + 1, sequences=counts.sequences + 1)
    return (replace(work[0], counts=wrong), *work[1:])


def without_the_other_streams(work: tuple[StreamWork, ...]) -> tuple[StreamWork, ...]:
    return work[:1]


OWN_COUNT = "kto"
"""Divides by the number of its labelled examples, which it counts itself."""


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, without_a_group) for name in NAMES),
        *((name, with_another_denominator) for name in NAMES if name != OWN_COUNT),
    ],
)
def test_a_real_change_is_noticed(
    name: str, change: Change, scenarios: dict[str, Scenario], alone: dict[str, Trajectory]
) -> None:
    scenario = replace(scenarios[name], steps=3)
    reference = run(scenario)
    assert reference.loss == alone[name].loss[:3]
    assert_not_equivalent(run(scenario, change=change), reference, lr=scenario.lr)


def test_a_lost_stream_is_noticed(scenarios: dict[str, Scenario], alone: dict[str, Trajectory]) -> None:
    scenario = scenarios["mpo"]
    assert_not_equivalent(run(scenario, change=without_the_other_streams), alone["mpo"], lr=scenario.lr)


@pytest.mark.slow
def test_real_pairs(test_data: Path, tmp_path: Path) -> None:
    """Pairs of 40 to 160 tokens with shared first turns, in one row, in many rows and one sequence a row."""
    model = save_tiny(tmp_path / "model", max_position_embeddings=256)
    pairs = real_pairs(test_data / "hh_harmless_test.jsonl.gz", 16)
    stored = store(tmp_path / "pairs", pairs, reference=model, groups_per_step=4)
    scenario = Scenario(
        model=model, streams=(stored,), objectives=(objective("dpo"),), tokens_per_micro_batch=4096, row_tokens=1024
    )
    expected = run(scenario)
    assert expected.loss[-1] < expected.loss[0] - 0.05
    small = replace(scenario, tokens_per_micro_batch=512, row_tokens=256)
    for other in (small, replace(small, layout="concatenated")):
        assert_equivalent(run(other), expected, lr=scenario.lr)
