"""Compiled blocks train as the same blocks do without, are compiled a few times only, and leave no trace in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from teams import Task, results_of, run_in_shares, token_logps, whole_run
from test_equivalence import assert_equivalent
from tiny_models import tiny, weights_digest
from tiny_runs import (
    CPU,
    Scenario,
    make_source,
    objective,
    optimizer_in,
    prepared,
    run,
    save_tiny,
    store,
    synthetic_groups,
    train_alone,
    train_spec,
)
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from rayalign.config.model import LoraConfig
from rayalign.config.training import StrategyConfig
from rayalign.engine.metrics import read_metrics
from rayalign.engine.model.compiled import compile_blocks, refuse_missing_compiler
from rayalign.engine.model.pretrained import load_policy
from rayalign.engine.strategy.base import make_strategy
from rayalign.errors import Stopped, UserError

SINGLE = make_strategy("single", CPU)


def has_compiler() -> bool:
    try:
        refuse_missing_compiler()
    except UserError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler, such as g++")


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(needs_compiler(test))


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    torch._dynamo.reset()
    counters.clear()


def scenario_of(folder: Path, *, family: str = "llama", method: str = "dpo", **fields: Any) -> Scenario:
    """Micro-batches of one row or several: hardly two of one shape."""
    model = save_tiny(folder / "model", family)
    stored = store(folder / "pairs", synthetic_groups([2] * 20), reference=model, groups_per_step=4)
    if "lora" in fields:
        stored = replace(stored, columns=((),))
    small = {"steps": 8, "tokens_per_micro_batch": 80, "row_tokens": 40}
    return Scenario(model=model, streams=(stored,), objectives=(objective(method),), **(small | fields))


FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"family": "gpt2"},
    "qwen2 with windows": {"family": "qwen2_windowed"},
    "one sequence a row": {"layout": "concatenated"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "an adapter with dropout": {
        "lora": LoraConfig(rank=3, alpha=6.0, dropout=0.2),
        "reference_in_place": True,
        "lr": 5e-3,
    },
}


@compiles
@pytest.mark.parametrize("name", FORMS)
def test_one_process_trains_as_without(name: str, tmp_path: Path) -> None:
    scenario = scenario_of(tmp_path, **FORMS[name])
    torch.manual_seed(0)
    expected = run(scenario)
    assert counters["frames"]["ok"] == 0 and min(expected.loss) < expected.loss[0] - 0.05
    torch.manual_seed(0)
    found = run(replace(scenario, compile=True))
    assert counters["frames"]["ok"] > 0
    assert list(found.weights) == list(expected.weights)
    for trajectory in (found, expected):
        trajectory.weights = without_key_bias(trajectory.weights)
    assert_equivalent(found, expected, lr=scenario.lr)


def without_key_bias(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2's keys have one that adds the same to every score: its gradient is rounding, which AdamW blows up."""
    kept = dict(weights)
    for name in [name for name in weights if name.endswith("attn.c_attn.bias")]:
        query, _, value = weights[name].chunk(3)
        kept[name] = torch.cat([query, value])
    return kept


@compiles
def test_new_lengths_are_not_compiled_anew(tmp_path: Path) -> None:
    """Each of a block's four parts (attention stands between them) a few times, not for each of many shapes."""
    before = counters["frames"]["ok"]
    scenario = scenario_of(tmp_path, compile=True, steps=10)
    runner, _, optimizer = prepared(scenario, SINGLE)
    source, compiled, shapes = make_source(scenario, SINGLE), [], set()
    for step in range(scenario.steps):
        work = source.get(step)
        shapes |= {tuple(batch.input_ids.shape) for part in work for batch in part.micro_batches}
        runner.step(step, work, optimizer=optimizer, max_grad_norm=1.0)
        compiled.append(counters["frames"]["ok"] - before)
    assert len(shapes) > 10
    assert 4 <= compiled[-1] <= 3 * 4, compiled


TEAMS: dict[str, tuple[StrategyConfig, dict[str, Any]]] = {
    "ddp": (StrategyConfig(name="ddp"), {}),
    "fsdp2": (StrategyConfig(name="fsdp2"), {}),
    "fsdp2 in bfloat16": (StrategyConfig(name="fsdp2"), {"dtype": "bfloat16"}),
    "fsdp2 with gradient checkpointing": (StrategyConfig(name="fsdp2"), {"gradient_checkpointing": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def scenario(folder: Path) -> Scenario:
    return scenario_of(folder, steps=6)


@pytest.fixture(scope="module")
def together(folder: Path, scenario: Scenario) -> dict[str, list[Any]]:
    """What two workers did, compiled; in bfloat16 uncompiled too."""
    tasks = {
        name: Task(spec, run_in_shares, (replace(scenario, compile=True, **fields),))
        for name, (spec, fields) in TEAMS.items()
    }
    whole = replace(scenario, compile=True)
    tasks["whole"] = Task(TEAMS["fsdp2"][0], whole_run, (train_spec(folder / "whole", whole), whole))
    return results_of(folder, 2, tasks)


@compiles
@pytest.mark.parametrize("name", TEAMS)
def test_workers_train_as_one_process_without(name: str, scenario: Scenario, together: dict[str, list[Any]]) -> None:
    fields = TEAMS[name][1]
    alone = run(replace(scenario, **fields))
    found = together[name][0][0]
    assert list(found.weights) == list(alone.weights)
    if "dtype" in fields:  # rounded in other places
        assert found.loss == pytest.approx(alone.loss, abs=2e-2)
        assert found.grad_norm == pytest.approx(alone.grad_norm, rel=5e-2)
    else:
        assert_equivalent(found, alone, lr=scenario.lr)


@compiles
@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
def test_files_do_not_say_that_it_was_compiled(strategy: str, scenario: Scenario, tmp_path: Path, request) -> None:
    """And a run goes on without: what was trained before is the same up to rounding."""
    train_alone(train_spec(tmp_path / "plain", scenario), scenario)
    if strategy == "single":
        whole = tmp_path / "whole"
        half = replace(scenario, compile=True)
        with pytest.raises(Stopped):
            train_alone(train_spec(whole, half), half, stop=lambda: counters["frames"]["ok"] > 0)
        train_alone(train_spec(whole, scenario), scenario)
    else:
        request.getfixturevalue("together")
        whole = request.getfixturevalue("folder") / "whole"
    rows, expected = (read_metrics(run / "metrics.jsonl") for run in (whole, tmp_path / "plain"))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
    for one, other in zip(files_of(whole), files_of(tmp_path / "plain"), strict=True):
        mine, theirs = load_file(one), load_file(other)
        assert mine.keys() == theirs.keys()
        assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-4
    for one, other in zip(checkpoints_of(whole), checkpoints_of(tmp_path / "plain"), strict=True):
        assert optimizer_in(one).keys() == optimizer_in(other).keys()


def checkpoints_of(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("step_*"))


def files_of(directory: Path) -> list[Path]:
    return [folder / "model.safetensors" for folder in (*checkpoints_of(directory), directory / "final")]


@needs_compiler
def test_what_has_no_gradient_is_not_compiled(tmp_path: Path) -> None:
    """Statistics, held-out rows, references in place: the very bits of the run without."""
    scenario = scenario_of(tmp_path)
    expected, found = (token_logps(SINGLE, replace(scenario, compile=on)) for on in (False, True))
    assert torch.equal(found, expected) and counters["frames"]["ok"] == 0


@needs_compiler
def test_a_compiled_model_has_the_same_names_and_digest(tmp_path: Path) -> None:
    scenario = scenario_of(tmp_path, compile=True)
    model, _ = load_policy(scenario.model_spec)
    plain, _ = load_policy(replace(scenario, compile=False).model_spec)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert weights_digest(model) == weights_digest(plain)


def test_what_cannot_be_compiled_is_refused() -> None:
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match=r"model\.compile: .* needs a C\+\+ compiler .* install g\+\+"),
    ):
        compile_blocks(tiny("llama"), CPU)
    unnamed = tiny("llama")
    unnamed._no_split_modules = None
    with pytest.raises(UserError, match=r"model\.compile: llama models do not name their transformer blocks"):
        compile_blocks(unnamed, CPU)
