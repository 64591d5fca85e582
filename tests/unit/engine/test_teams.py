"""Workers that share parameters, or have unequal shares of the work, do what one process does."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from teams import (
    Task,
    drawn_run,
    loaded_state,
    refused_run,
    results_of,
    run_in_shares,
    states_around_an_evaluation,
    token_logps,
    whole_run,
)
from test_equivalence import assert_equivalent
from tiny_models import weights_digest
from tiny_runs import (
    CPU,
    Scenario,
    Trajectory,
    drawn,
    objective,
    save_tiny,
    store,
    synthetic_groups,
    train_alone,
    train_spec,
)
from transformers import AutoModelForCausalLM

from rayalign.config.model import LoraConfig, ModelConfig
from rayalign.config.training import CheckpointConfig, StrategyConfig
from rayalign.data.rank import rank_group
from rayalign.engine.metrics import read_metrics
from rayalign.engine.model.lora import ADAPTER as ADAPTER_FOLDER
from rayalign.engine.model.pretrained import ModelSpec, load_policy, state_digest
from rayalign.engine.model.scalar import ScalarHead
from rayalign.engine.state import TrainSpec
from rayalign.engine.strategy.base import make_strategy
from rayalign.storage.manifest import verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: make test-slow installs it"),
]

SINGLE = make_strategy("single", CPU)
DDP, FSDP2 = StrategyConfig(name="ddp"), StrategyConfig(name="fsdp2")
ZERO2, ZERO3 = (StrategyConfig(name="deepspeed", zero_stage=stage) for stage in (2, 3))
GATHERING = ZERO3.model_copy(update={"config": "gathering.json"})
"""Of a tiny model, too, every parameter is whole only while it is used."""
TEAMS = {"ddp": DDP, "fsdp2": FSDP2, "zero2": ZERO2, "zero3": GATHERING}
METHODS = ("dpo", "exo_rw", "wpo", "mpo", "rloo", "lora", "lora_experts", "lora_rewards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teams")


# Three, one and no micro-batch


@pytest.fixture(scope="module")
def scenarios(folder: Path) -> dict[str, Scenario]:
    """Four micro-batches a step, or fewer; three workers divide no dimension of the model evenly."""
    model = save_tiny(folder / "model", "llama_tied")
    calm = save_tiny(folder / "calm", "llama_tied", initializer_range=0.05)
    pairs = synthetic_groups([2] * 24)
    four = synthetic_groups([4] * 16, seed=1)
    plain = store(folder / "plain", pairs, groups_per_step=4)
    stored = store(folder / "pairs", pairs, reference=model, groups_per_step=4)
    weighted = store(folder / "weighted", pairs, reference=calm, groups_per_step=4)
    ragged = store(folder / "four", four, reference=model, groups_per_step=4)
    desk = store(folder / "desk", synthetic_groups([1] * 10, seed=2), name="desk", groups_per_step=3)
    likelihood = objective("sft", stream="desk", weight=0.1, reduction="sequence")
    exo, rloo = objective("exo_rw", behavior_correction="off"), objective("rloo")
    rounds = drawn(store(folder / "drawn", four, reference=model, groups_per_step=4), rloo)
    small = {"tokens_per_micro_batch": 40, "row_tokens": 40}
    bare = replace(stored, columns=((),))
    ordered = store(
        folder / "ordered", [own for group in pairs for own in rank_group(group, by_reward=True)], groups_per_step=4
    )
    return {
        "dpo": Scenario(model=model, streams=(stored,), objectives=(objective("dpo"),), **small),
        "lora": Scenario(
            model=model,
            streams=(bare,),
            objectives=(objective("dpo"),),
            lr=5e-3,
            lora=LoraConfig(rank=3, alpha=6.0),
            reference_in_place=True,
            **small,
        ),
        "lora_experts": Scenario(
            model=save_tiny(folder / "experts", "qwen3_moe"),
            streams=(bare,),
            objectives=(objective("dpo"),),
            lr=5e-3,
            lora=LoraConfig(rank=3, alpha=6.0, target_modules=("q_proj", "gate_up_proj", "down_proj")),
            reference_in_place=True,
            **small,
        ),
        "lora_rewards": Scenario(
            model=calm,
            streams=(ordered,),
            objectives=(objective("reward_model", center=0.01),),
            lr=5e-3,
            lora=LoraConfig(rank=3, alpha=6.0),
            **small,
        ),
        "exo_rw": Scenario(
            model=model, streams=(ragged,), objectives=(exo,), lr=4e-4, tokens_per_micro_batch=58, row_tokens=58
        ),
        "rloo": Scenario(
            model=model, streams=(rounds,), objectives=(rloo,), lr=5e-5, tokens_per_micro_batch=58, row_tokens=58
        ),
        "wpo": Scenario(model=calm, streams=(weighted,), objectives=(objective("wpo"),), lr=3e-3, **small),
        "mpo": Scenario(model=model, streams=(plain, desk), objectives=(objective("mpo"), likelihood), **small),
    }


@pytest.fixture(scope="module")
def shared(folder: Path, scenarios: dict[str, Scenario]) -> dict[str, list[tuple[Trajectory, list[int]]]]:
    tasks = {
        f"{team}-{name}": Task(spec, run_in_shares, (scenario,))
        for team, spec in TEAMS.items()
        for name, scenario in scenarios.items()
    }
    return results_of(folder, 3, tasks)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("name", METHODS)
def test_unequal_shares(team: str, name: str, scenarios: dict[str, Scenario], shared) -> None:
    alone, _ = run_in_shares(SINGLE, scenarios[name])
    found = shared[f"{team}-{name}"]
    assert (3, 1, 0) in zip(*(held for _, held in found), strict=True)
    assert_equivalent(found[0][0], alone, lr=scenarios[name].lr)
    if name != "rloo":  # whose loss is 0 at the policy that drew, and says nothing of progress
        assert min(alone.loss[-4:]) < alone.loss[0] - 0.02


# Loading, precision, resuming: two workers


STEPS = 6
LOADED = {"tied": "llama_tied", "gpt2": "gpt2", "moe": "qwen3_moe", "windowed": "gemma3"}
REFUSED = {
    ("zero2", "ddp"): "holds DeepSpeed's own optimizer state, which only strategy: deepspeed reads",
    ("zero3", "zero2"): "which ZeRO stage 2 cannot read: DeepSpeed's parts fit the workers and the stage",
    ("fsdp2", "zero2"): r"\.metadata, __0_0\.distcp, __1_0\.distcp, which deepspeed with 2 workers cannot read",
}


def offloaded(strategy: StrategyConfig) -> StrategyConfig:
    return strategy.model_copy(update={"cpu_offload": True})


ADAPTER = {"lora": LoraConfig(rank=3, alpha=6.0), "reference_in_place": True}
FORMS = {
    "checkpointing": (FSDP2, {"gradient_checkpointing": True}),
    "checkpointing in bfloat16": (FSDP2, {"gradient_checkpointing": True, "dtype": "bfloat16"}),
    "offload 2": (offloaded(ZERO2), {}),
    "offload 3": (offloaded(ZERO3), {}),
    "deepspeed in bfloat16": (ZERO3, {"dtype": "bfloat16"}),
    "gathered": (GATHERING, {}),
    "adapter": (GATHERING, ADAPTER),
    "adapter, checkpointing": (GATHERING, {**ADAPTER, "gradient_checkpointing": True}),
    "adapter, offload 2": (offloaded(ZERO2), ADAPTER),
    "adapter, offload 3": (offloaded(GATHERING), ADAPTER),
    "adapter in bfloat16": (GATHERING, {**ADAPTER, "dtype": "bfloat16"}),
}
"""Further ways to compute one run, and what they change of it."""
SHARDED = ("fsdp2", "zero2", "zero3")
EVALUATED = ("dpo", "lora_rewards")
LATE = ("ddp", "fsdp2", "zero2", "zero3")
LORA = LoraConfig(rank=2, alpha=4.0)
DRAWN = {
    "drawn": (FSDP2, None),
    "drawn by an adapter": (FSDP2, LORA),
    "drawn by an adapter of zero2": (ZERO2, LORA),
    "drawn by an adapter of zero3": (GATHERING, LORA),
}
ADAPTED = [("fsdp2", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "fsdp2"), ("zero2", "zero2"), ("zero3", "zero3")]
CHANGES = [
    ("fsdp2", "fsdp2"),
    ("fsdp2", "ddp"),
    ("fsdp2", "single"),
    ("ddp", "fsdp2"),
    ("single", "fsdp2"),
    ("zero2", "zero2"),
    ("zero3", "zero3"),
]
"""A run of six steps goes on under another strategy for six more."""


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, ModelSpec]:
    files = {
        name: ModelSpec(config=ModelConfig(name=str(save_tiny(folder / name, family))))
        for name, family in LOADED.items()
    }
    llama = save_tiny(folder / "llama")
    return files | {
        "scratch": ModelSpec(config=ModelConfig(name=str(llama), from_scratch=True), seed=5),
        "reward model": ModelSpec(config=ModelConfig(name=str(llama)), head=ScalarHead(), seed=3),
    }


@pytest.fixture(scope="module")
def resumed(folder: Path) -> Scenario:
    """MPO with its auxiliary stream on tied weights."""
    model = save_tiny(folder / "resumed", "llama_tied")
    pairs = store(folder / "resumed-pairs", synthetic_groups([2] * 10), reference=model, groups_per_step=4)
    desk = store(folder / "resumed-desk", synthetic_groups([1] * 7, seed=1), name="desk", groups_per_step=2)
    likelihood = objective("sft", stream="desk", weight=0.1)
    return Scenario(model=model, streams=(pairs, desk), objectives=(objective("mpo"), likelihood), steps=2 * STEPS)


@pytest.fixture(scope="module")
def adapting(folder: Path, resumed: Scenario) -> dict[str, Scenario]:
    """DPO of an adapter, beside a reference in place; and a reward model's adapter, beside its head."""
    bare = replace(resumed.streams[0], columns=((),))
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.1)
    pairs = [own for group in synthetic_groups([2] * 10) for own in rank_group(group, by_reward=True)]
    ordered = store(folder / "resumed-ordered", pairs, groups_per_step=4)
    dpo = replace(resumed, streams=(bare,), objectives=(objective("dpo"),), lora=lora, reference_in_place=True)
    rewards = replace(resumed, streams=(ordered,), objectives=(objective("reward_model"),), lora=lora)
    return {"lora": dpo, "rewards": rewards}


def prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": f"question {n}", "chosen": f"aeiou {n}", "rejected": "xyz"} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spec_of(directory: Path, scenario: Scenario, steps: int = 2 * STEPS) -> TrainSpec:
    spec = train_spec(directory, scenario)
    constant = spec.optim.model_copy(update={"schedule": "constant", "warmup": 0})
    return replace(spec, optim=constant, steps=steps, checkpoint=CheckpointConfig(every=4, keep=2))


def saved(spec: TrainSpec, **settings: Any) -> TrainSpec:
    """The same run with other settings of ``checkpoint``."""
    return replace(spec, checkpoint=spec.checkpoint.model_copy(update=settings))


@pytest.fixture(scope="module")
def pair(
    folder: Path,
    models: dict[str, ModelSpec],
    scenarios: dict[str, Scenario],
    resumed: Scenario,
    adapting: dict[str, Scenario],
):
    """What two workers did."""
    low = replace(scenarios["dpo"], dtype="bfloat16")
    tasks = {
        f"load {team} {name}": Task(TEAMS[team], loaded_state, (spec,))
        for team in SHARDED
        for name, spec in models.items()
    }
    tasks |= {"bfloat16": Task(FSDP2, token_logps, (low,)), "float32": Task(FSDP2, token_logps, (scenarios["dpo"],))}
    tasks |= {
        f"evaluated {team} {name}": Task(spec, states_around_an_evaluation, (scenarios[name],))
        for (team, spec), name in product(TEAMS.items(), EVALUATED)
    }
    tasks |= {"low run": Task(FSDP2, run_in_shares, (replace(low, steps=5),))}
    for before, after in CHANGES:
        directory = folder / f"{before}-{after}"
        if before == "single":
            train_alone(spec_of(directory, resumed, STEPS), resumed)
        else:
            tasks[f"{directory.name} 1"] = Task(TEAMS[before], whole_run, (spec_of(directory, resumed, STEPS), resumed))
        if after != "single":
            tasks[f"{directory.name} 2"] = Task(TEAMS[after], whole_run, (spec_of(directory, resumed), resumed))
    for before, after in REFUSED:
        directory = folder / f"{before}-{after}"
        tasks[f"{directory.name} 1"] = Task(TEAMS[before], whole_run, (spec_of(directory, resumed, STEPS), resumed))
        tasks[f"{directory.name} 2"] = Task(TEAMS[after], refused_run, (spec_of(directory, resumed), resumed))
        weights_alone = saved(spec_of(directory, resumed), restart_optimizer=True)
        tasks[f"{directory.name} 3"] = Task(TEAMS[after], whole_run, (weights_alone, resumed))
    for name in TEAMS:
        tasks[f"whole {name}"] = Task(TEAMS[name], whole_run, (spec_of(folder / f"whole-{name}", resumed), resumed))
    for name in LATE:
        late = saved(spec_of(folder / f"late-{name}", resumed), asynchronous=True)
        tasks[f"late {name}"] = Task(TEAMS[name], whole_run, (late, resumed))
    for (before, after), (kind, scenario) in product(ADAPTED, adapting.items()):
        directory = folder / f"{kind}-{before}-{after}"
        tasks[f"{directory.name} 1"] = Task(TEAMS[before], whole_run, (spec_of(directory, scenario, STEPS), scenario))
        tasks[f"{directory.name} 2"] = Task(TEAMS[after], whole_run, (spec_of(directory, scenario), scenario))
    for name, (kind, scenario) in product({before for before, after in ADAPTED if before == after}, adapting.items()):
        directory = folder / f"whole-{kind}-{name}"
        tasks[directory.name] = Task(TEAMS[name], whole_run, (spec_of(directory, scenario), scenario))
    for name, (spec, change) in FORMS.items():
        tasks[name] = Task(spec, run_in_shares, (replace(scenarios["dpo"], steps=4, **change),))
    for name, (spec, lora) in DRAWN.items():
        tasks[name] = Task(spec, drawn_run, (folder / name, resumed.model, prompts(folder), lora))
    (folder / "two").mkdir()
    found = results_of(folder / "two", 2, tasks)
    for before, _ in [change for change in CHANGES if change[1] == "single"]:
        train_alone(spec_of(folder / f"{before}-single", resumed), resumed)
    return found


@pytest.mark.parametrize("team", SHARDED)
@pytest.mark.parametrize("name", [*LOADED, "scratch", "reward model"])
def test_loaded_in_shards_and_gathered_again(team: str, name: str, models: dict[str, ModelSpec], pair) -> None:
    model, _ = load_policy(models[name])
    state, elsewhere = pair[f"load {team} {name}"]
    assert list(state) == list(model.state_dict())
    assert state_digest(state) == weights_digest(model)
    assert all(tensor.numel() == 0 for tensor in elsewhere.values())


def test_a_skeleton_holds_no_weights(models: dict[str, ModelSpec]) -> None:
    for spec in models.values():
        model, _ = load_policy(spec, place=torch.device("meta"))
        whole, _ = load_policy(spec)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_forward_gives_the_very_bits_of_single(dtype: str, scenarios: dict[str, Scenario], pair) -> None:
    expected = token_logps(SINGLE, replace(scenarios["dpo"], dtype=dtype))
    assert all(torch.equal(found, expected) for found in pair[dtype])


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("name", EVALUATED)
def test_weights_are_gathered_after_an_evaluation_too(team: str, name: str, pair) -> None:
    """Which reads them, and ends without the backward that would put them back in parts."""
    (before, after), nothing = pair[f"evaluated {team} {name}"]
    assert before == after and nothing == []


def test_steps_computed_in_bfloat16_stay_close(scenarios: dict[str, Scenario], pair) -> None:
    alone, _ = run_in_shares(SINGLE, replace(scenarios["dpo"], dtype="bfloat16", steps=5))
    found, _ = pair["low run"][0]
    assert found.loss[0] == pytest.approx(alone.loss[0], abs=1e-9)
    assert found.grad_norm == pytest.approx(alone.grad_norm, rel=2e-2)
    assert found.loss == pytest.approx(alone.loss, abs=5e-3)


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_run_goes_on_under_another_strategy(before: str, after: str, folder: Path, pair) -> None:
    """Up to rounding as under one strategy, and exactly so where the strategy stays."""
    whole = after if before == after else "fsdp2"
    assert_same_run(folder / f"{before}-{after}", folder / f"whole-{whole}", exactly=before == after)
    assert_same_run(folder / f"{before}-{after}", folder / "whole-ddp", exactly=False)


@pytest.mark.parametrize(("before", "after"), REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(before: str, after: str, pair) -> None:
    assert all(re.search(REFUSED[before, after], message) for message in pair[f"{before}-{after} 2"])


@pytest.mark.parametrize(("before", "after"), REFUSED)
def test_weights_go_on_where_that_is_asked_for(before: str, after: str, folder: Path, pair) -> None:
    """The first half is the undisturbed run's, and so is the loss of the first step after it."""
    mine, theirs = (
        [row["loss"] for row in read_metrics(folder / name / "metrics.jsonl")]
        for name in (f"{before}-{after}", "whole-ddp")
    )
    assert len(mine) == 2 * STEPS and mine[: STEPS + 1] == pytest.approx(theirs[: STEPS + 1], abs=1e-5)
    assert mine[STEPS + 1 :] != pytest.approx(theirs[STEPS + 1 :], abs=1e-5)


@pytest.mark.parametrize("name", LATE)
def test_checkpoints_that_are_written_beside_training(name: str, folder: Path, pair) -> None:
    assert_same_run(folder / f"late-{name}", folder / f"whole-{name}", exactly=True)


@pytest.mark.parametrize("kind", ["lora", "rewards"])
@pytest.mark.parametrize(("before", "after"), ADAPTED)
def test_an_adapter_goes_on_under_another_strategy(before: str, after: str, kind: str, folder: Path, pair) -> None:
    whole = after if before == after else "fsdp2"
    assert_same_run(folder / f"{kind}-{before}-{after}", folder / f"whole-{kind}-{whole}", exactly=before == after)
    assert_same_run(folder / f"{kind}-{before}-{after}", folder / f"whole-{kind}-fsdp2", exactly=False)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_an_adapter_that_deepspeed_trained_is_exported(
    name: str, folder: Path, adapting: dict[str, Scenario], pair
) -> None:
    """Merged and alone, and the base is as it was: what differs from it has rank 2."""
    final = folder / f"whole-lora-{name}" / "final"
    verify(final)
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (adapting["lora"].model, final))
    moved = {key: weight - base.state_dict()[key] for key, weight in merged.state_dict().items()}
    changed = {key: change for key, change in moved.items() if change.any()}
    assert changed and all("_proj." in key for key in changed)
    assert all(torch.linalg.matrix_rank(change, rtol=1e-3) <= 2 for change in changed.values())
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        expected = merged(ids).logits
        assert torch.allclose(PeftModel.from_pretrained(base, final / ADAPTER_FOLDER)(ids).logits, expected, atol=2e-5)


def assert_same_run(directory: Path, whole: Path, *, exactly: bool) -> None:
    ended, expected = (weights_at(run, 2 * STEPS) for run in (directory, whole))
    rows, expected_rows = (read_metrics(run / "metrics.jsonl") for run in (directory, whole))
    assert [row["step"] for row in rows] == list(range(1, 2 * STEPS + 1))
    if exactly:
        assert all(torch.equal(ended[name], weight) for name, weight in expected.items())
        assert [row["loss"] for row in rows] == [row["loss"] for row in expected_rows]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected_rows], abs=1e-5)
    assert max(float((ended[name] - expected[name]).abs().max()) for name in expected) <= 1e-4


def weights_at(directory: Path, step: int) -> dict[str, torch.Tensor]:
    [checkpoint] = (directory / "checkpoints").glob(f"step_{step:06d}-*")
    return load_file(checkpoint / "model.safetensors")


def test_a_checkpoint_of_shards_is_a_model_and_whole(folder: Path, pair) -> None:
    [checkpoint] = (folder / "whole-fsdp2" / "checkpoints").glob("step_000012-*")
    manifest = verify(checkpoint)
    assert {name for name in manifest["files"] if name.startswith("trainer/")} == {
        "trainer/.metadata",
        "trainer/__0_0.distcp",
        "trainer/__1_0.distcp",
    }
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert weights_digest(model) == weights_digest(AutoModelForCausalLM.from_pretrained(folder / "whole-fsdp2/final"))
    assert model.generation_config.eos_token_id == [4]


@pytest.mark.parametrize("name", DRAWN)
def test_rounds_are_drawn_with_gathered_weights(name: str, folder: Path, resumed: Scenario, pair) -> None:
    """The actor takes the weights only if it scores the canary as the wrapped policy does."""
    alone = folder / f"{name} alone"
    drawn_run(SINGLE, alone, resumed.model, prompts(folder), DRAWN[name][1])
    mine, theirs = (read_metrics(run / "metrics.jsonl") for run in (folder / name, alone))
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in theirs], abs=1e-4)
    assert [row["rollout/reward"] for row in mine] == [row["rollout/reward"] for row in theirs]
    assert mine[2]["rollout/reward"] != mine[1]["rollout/reward"]


@pytest.mark.parametrize("name", FORMS)
def test_further_forms_of_a_run(name: str, scenarios: dict[str, Scenario], pair) -> None:
    alone, _ = run_in_shares(SINGLE, replace(scenarios["dpo"], steps=4, **FORMS[name][1]))
    assert_equivalent(pair[name][0][0], alone, lr=scenarios["dpo"].lr)
