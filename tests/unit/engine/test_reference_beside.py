"""A reference that the workers hold beside the policy, whole or in shards, is the one that data carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from teams import Task, frozen_reference, results_of, run_in_shares
from test_equivalence import assert_equivalent
from tiny_models import FAMILIES, tiny
from tiny_runs import (
    CPU,
    Scenario,
    Trajectory,
    objective,
    run,
    save_tiny,
    store,
    synthetic_groups,
    train_alone,
    train_spec,
)
from transformers import AutoModelForCausalLM

from rayalign.config.model import LoraConfig, ModelConfig
from rayalign.config.training import StrategyConfig
from rayalign.engine.first_step import PolicyMismatch
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.forward import Policy
from rayalign.engine.model.parameter_dtype import names_in_bfloat16
from rayalign.engine.model.pretrained import ModelSpec, save_weights
from rayalign.engine.strategy.base import make_strategy
from rayalign.errors import UserError

SINGLE = make_strategy("single", CPU)
FSDP2 = {"fsdp2": StrategyConfig(name="fsdp2")}
OTHERS = {"ddp": StrategyConfig(name="ddp"), "zero3": StrategyConfig(name="deepspeed", zero_stage=3)}
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: make test-slow installs it"),
]
TEAMS = [*FSDP2, *(pytest.param(name, marks=MARKS) for name in OTHERS)]
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, embeddings too": {"dtype": "bfloat16", "reference_dtype": "bfloat16"},
    "bfloat16, held in float32": {"dtype": "bfloat16", "reference_dtype": "float32"},
}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("beside")


@pytest.fixture(scope="module")
def stored(folder: Path) -> Scenario:
    """DPO with the log-probs of another model than the policy in the data."""
    pairs = synthetic_groups([2] * 16)
    other = save_tiny(folder / "other", "llama", num_hidden_layers=3)
    stream = store(folder / "pairs", pairs, reference=other, groups_per_step=4)
    return Scenario(
        model=save_tiny(folder / "model", "llama_tied"),
        streams=(stream,),
        objectives=(objective("dpo"),),
        steps=5,
        tokens_per_micro_batch=40,
        row_tokens=40,
    )


@pytest.fixture(scope="module")
def beside(folder: Path, stored: Scenario) -> Scenario:
    """The same without a column."""
    return replace(stored, streams=(replace(stored.streams[0], columns=((),)),), reference_beside=folder / "other")


def tasks_of(teams: Mapping[str, StrategyConfig], beside: Scenario) -> dict[str, Task]:
    runs = {f"{team} runs": Task(spec, run_in_shares, (beside,)) for team, spec in teams.items()}
    return runs | {
        f"{team} {form}": Task(spec, frozen_reference, (replace(beside, **change),))
        for (team, spec), (form, change) in product(teams.items(), FORMS.items())
    }


@pytest.fixture(scope="module")
def sharded(folder: Path, beside: Scenario) -> dict[str, list[Any]]:
    """What two workers did with ``fully_shard``."""
    (folder / "sharded").mkdir()
    return results_of(folder / "sharded", 2, tasks_of(FSDP2, beside))


@pytest.fixture(scope="module")
def others(folder: Path, beside: Scenario) -> dict[str, list[Any]]:
    """What two workers did otherwise."""
    (folder / "others").mkdir()
    return results_of(folder / "others", 2, tasks_of(OTHERS, beside))


def found_of(team: str, request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = request.getfixturevalue("sharded" if team in FSDP2 else "others")
    return found


@pytest.mark.parametrize("method", ["dpo", *(pytest.param(own, marks=pytest.mark.slow) for own in ("exo_pref", "kto"))])
def test_losses_are_those_of_stored_log_probs(method: str, stored: Scenario, beside: Scenario, folder: Path) -> None:
    if method == "kto":
        from tiny_runs import labelled

        pairs = labelled(synthetic_groups([2] * 12))
        own = store(folder / "labelled", pairs, reference=folder / "other")
        stored, beside = (
            replace(stored, streams=(own,)),
            replace(beside, streams=(replace(own, columns=((),)),)),
        )
    one, other = (run(replace(each, objectives=(objective(method),))) for each in (stored, beside))
    assert_equivalent(other, one, lr=stored.lr)
    assert len(set(one.loss)) == stored.steps


@pytest.mark.parametrize("team", TEAMS)
def test_workers_train_as_one_process_does(team: str, beside: Scenario, request: pytest.FixtureRequest) -> None:
    alone: Trajectory = run_in_shares(SINGLE, beside)[0]
    assert_equivalent(found_of(team, request)[f"{team} runs"][0][0], alone, lr=beside.lr)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("form", FORMS)
def test_log_probs_in_shards_are_the_very_bits_of_one_process(
    team: str, form: str, beside: Scenario, request: pytest.FixtureRequest
) -> None:
    expected, (whole, _) = frozen_reference(SINGLE, replace(beside, **FORMS[form]))
    for found, held in found_of(team, request)[f"{team} {form}"]:
        assert torch.equal(found, expected)
        before, after = held
        assert before == after
        # Rows of a tensor are dealt out whole, so that the larger half of an odd number is a row more.
        assert before == whole if team == "ddp" else before == pytest.approx(whole / 2, rel=0.02)


def test_bfloat16_takes_half_of_the_bytes(beside: Scenario) -> None:
    held = {form: frozen_reference(SINGLE, replace(beside, **change))[1][0] for form, change in FORMS.items()}
    assert held["float32"] == held["bfloat16, held in float32"]
    assert held["bfloat16, embeddings too"] / held["float32"] == pytest.approx(0.5, abs=0.01)
    assert held["bfloat16, embeddings too"] < held["bfloat16"] < held["float32"]


def test_a_resumed_run_keeps_the_reference_that_it_began_with(beside: Scenario, folder: Path) -> None:
    """The reference is the policy before the first step, and not the checkpoint's."""
    own = replace(beside, reference_beside=beside.model)
    specs = [train_spec(folder / name, own, steps=6) for name in ("whole", "parts")]
    specs = [replace(spec, check_initial_logratio=True) for spec in specs]
    train_alone(specs[0], own)
    done: list[int] = []
    with pytest.raises(Exception, match="stopped"):
        train_alone(specs[1], own, on_step=lambda row: done.append(row["step"]), stop=lambda: len(done) == 2)
    train_alone(specs[1], own)
    one, other = (load_file(spec.directory / "final" / "model.safetensors") for spec in specs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_reference_than_the_initial_policy_is_told_apart(beside: Scenario, folder: Path) -> None:
    spec = replace(train_spec(folder / "refused", beside, steps=2), check_initial_logratio=True)
    with pytest.raises(PolicyMismatch, match=r"The training workers scored with both: write reference\.dtype: auto"):
        train_alone(spec, beside)


@pytest.mark.slow
def test_an_adapter_may_have_another_model_for_its_reference(stored: Scenario, beside: Scenario) -> None:
    lora = LoraConfig(rank=3, alpha=6.0)
    one, other = (run(replace(each, lora=lora, lr=5e-3)) for each in (stored, beside))
    assert_equivalent(other, one, lr=5e-3)


def test_a_reference_that_reads_plain_sequences_only(stored: Scenario, folder: Path) -> None:
    """The policy then reads them too, and the log-probs are those of the reference alone."""
    bloom = save_tiny(folder / "bloom", "bloom")
    pairs = synthetic_groups([2] * 16)
    own = replace(stored, streams=(store(folder / "of-bloom", pairs, reference=bloom, groups_per_step=4),), steps=4)
    bare = replace(own, streams=(replace(own.streams[0], columns=((),)),), reference_beside=bloom)
    small = {"tokens_per_micro_batch": 512, "row_tokens": 128}
    rows = []
    for name, each in (("column", own), ("module", bare)):
        final = train_alone(train_spec(folder / name, replace(each, **small)), replace(each, **small))
        rows.append(load_file(final / "model.safetensors"))
    assert all((rows[0][name] - rows[1][name]).abs().max() < 1e-4 for name in rows[0])


# What is held in bfloat16


QUICK = ("llama_tied", "qwen3_moe", "gemma3")


def scored(spec: ScoringSpec) -> tuple[np.ndarray, float]:
    """Log-probs, and bytes of a parameter on average."""
    model = FrozenModel(spec, CPU)
    parameters = list(model.policy.parameters())
    size = sum(parameter.nbytes for parameter in parameters) / sum(parameter.numel() for parameter in parameters)
    return np.concatenate(model.token_logps(synthetic_groups([2, 1, 4, 3]))), size


def scoring(directory: Path, **settings: Any) -> ScoringSpec:
    return ScoringSpec(
        model=ModelSpec(config=ModelConfig(name=str(directory), dtype=settings.pop("dtype", "bfloat16"))),
        tokens_per_micro_batch=120,
        row_tokens=60,
        **settings,
    )


@pytest.mark.parametrize(
    "family", [own if own in QUICK else pytest.param(own, marks=pytest.mark.slow) for own in FAMILIES]
)  # fmt: skip
def test_auto_changes_no_bit_of_any_family(family: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / family, family)
    exact, whole = scored(scoring(directory, parameter_dtype="float32"))
    found, size = scored(scoring(directory))
    assert np.array_equal(found, exact)
    assert whole == 4 and size < 3.5
    low, smallest = scored(scoring(directory, parameter_dtype="bfloat16"))
    assert np.abs(low - exact).mean() < 0.05 and smallest <= size


def test_files_in_bfloat16_are_held_so_without_a_change(tmp_path: Path) -> None:
    """Embeddings too, since bfloat16 holds all of their values."""
    directory = save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_weights(model, directory)
    exact, _ = scored(scoring(directory, parameter_dtype="float32"))
    found, size = scored(scoring(directory))
    assert np.array_equal(found, exact)
    assert size == pytest.approx(2.0, abs=0.03)


def test_float32_computes_with_float32(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    found, size = scored(scoring(directory, dtype="auto"))
    exact, _ = scored(scoring(directory, dtype="float32", parameter_dtype="float32"))
    assert size == 4 and np.array_equal(found, exact)
    with pytest.raises(UserError, match=r"reference\.dtype: bfloat16 holds a reference that computes in bfloat16, and"):
        scored(scoring(directory, dtype="auto", parameter_dtype="bfloat16"))


def test_norms_stay_in_float32() -> None:
    policy = Policy(tiny("llama_tied"))
    names = names_in_bfloat16(policy, "bfloat16", torch.bfloat16)
    left = {name for name, _ in policy.named_parameters()} - names
    assert len(left) == 5 and all("norm" in name for name in left)
