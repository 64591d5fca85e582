"""bfloat16 computes, float32 keeps: parameters, optimizer, log-probs; and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_work import packed, work_of
from random_groups import random_groups
from tiny_models import tiny
from tiny_runs import save_tiny
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rayalign.config.model import ModelConfig
from rayalign.config.training import OptimConfig
from rayalign.data.group import Group
from rayalign.engine.first_step import LOGRATIO_LIMITS, check_initial_logratio
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.forward import Policy
from rayalign.engine.model.pretrained import ModelSpec, load_policy
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.optimizer import make_optimizer
from rayalign.engine.step import Runner
from rayalign.engine.strategy.base import Single
from rayalign.methods import compose, resolve
from rayalign.methods.method import Method, Statistics
from rayalign.methods.weighting import WPOWeighting

CPU = torch.device("cpu")
GROUPS = random_groups([2] * 8, vocabulary=300, seed=2)
WPO = compose(resolve("dpo"), WPOWeighting(alignment="sampled", clamp="none"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("precision") / "model")


def scored(directory: Path, *, dtype: str = "float32", temperature: float = 1.0) -> list[Group]:
    """The groups with log-probs of the model in ``directory`` as their reference."""
    spec = ScoringSpec(
        model=ModelSpec(config=ModelConfig(name=str(directory), dtype=dtype)),
        tokens_per_micro_batch=100_000,
        row_tokens=None,
        logit_temperature=temperature,
    )
    columns = FrozenModel(spec, CPU).token_logps(GROUPS)
    return [replace(group, per_token={"ref_token_logp": column}) for group, column in zip(GROUPS, columns, strict=True)]


def runner(
    directory: Path, *, method: Method | None = None, dtype: torch.dtype = torch.float32, **config: Any
) -> Runner:
    method = method or resolve("dpo")
    model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(directory))))
    return Runner(
        module=Policy(model),
        objectives={MAIN_STREAM: Objective(stream=MAIN_STREAM, method=method, config=method.config(**config))},
        strategy=Single(CPU),
        compute_dtype=dtype,
        seed=0,
    )


def token_logp(of: Runner, groups: Sequence[Group]) -> Tensor:
    with torch.no_grad():
        return of.score(of.objectives[MAIN_STREAM], packed(groups)).scores.token_logp


# bfloat16


def test_a_step_computed_in_bfloat16_keeps_everything_in_float32(directory: Path) -> None:
    low = runner(directory, dtype=torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in low.module.named_parameters()}
    optimizer = make_optimizer(low.module, OptimConfig(lr=5e-7))
    low.step(0, [work_of(scored(directory, dtype="bfloat16"))], optimizer=optimizer, max_grad_norm=1.0)
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    tensors += [tensor for parameter in low.module.parameters() for tensor in (parameter, parameter.grad)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    for name, parameter in low.module.named_parameters():
        moved = (parameter != before[name])[parameter.grad != 0]
        moved_in_bfloat16 = parameter.bfloat16() != before[name].bfloat16()
        assert moved.float().mean() > 0.9 and moved_in_bfloat16.float().mean() < 0.05, name


def test_log_probs_and_losses_of_bfloat16_are_float32_and_close(directory: Path) -> None:
    low, full = runner(directory, dtype=torch.bfloat16), runner(directory)
    groups = scored(directory, dtype="bfloat16")
    logp = token_logp(low, groups)
    assert logp.dtype == torch.float32
    assert 0 < (logp - token_logp(full, groups)).abs().mean() < 0.05
    objective = low.objectives[MAIN_STREAM]
    [term] = objective.method.loss(low.score(objective, packed(groups)), objective.config, Statistics())
    assert term.per_item.dtype == torch.float32


def test_reference_and_policy_agree_at_step_0_in_either_precision(directory: Path) -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        groups, fresh = scored(directory, dtype=name), runner(directory, dtype=dtype)
        check_initial_logratio(fresh, [work_of(groups)])
        reference = packed(groups).per_token["ref_token_logp"]
        assert (token_logp(fresh, groups) - reference).abs().mean() < LOGRATIO_LIMITS[dtype][0]


# Memory


def test_gradient_checkpointing_saves_less_for_the_backward_pass(directory: Path) -> None:
    saved = {}
    for checkpointing in (False, True):
        model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(directory), gradient_checkpointing=checkpointing)))
        policy, seen = Policy(model), set()

        def keep(tensor: Tensor, seen: set[tuple[int, int]] = seen) -> Tensor:
            seen.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = policy(packed(GROUPS))
        own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
        saved[checkpointing] = sum(size for pointer, size in seen if pointer not in own)
        scores.logp.sum().backward()
    assert saved[True] < 0.5 * saved[False]


# Dropout


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("llama", ("attention_dropout",)),
        ("gpt2", ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
        ("gpt_neox", ("hidden_dropout", "attention_dropout")),
        ("phi", ("resid_pdrop", "embd_pdrop", "attention_dropout")),
        ("starcoder2", ("residual_dropout", "embedding_dropout", "attention_dropout")),
    ],
)
def test_a_configuration_with_dropout_trains_without(family: str, dropout: tuple[str, ...], tmp_path: Path) -> None:
    save_tiny(tmp_path, family, **dict.fromkeys(dropout, 0.1))
    noisy = tiny(family, vocab_size=300, **dict.fromkeys(dropout, 0.1)).train()
    ids = torch.arange(20)[None]
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)
    model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(tmp_path))))
    policy = Policy(model)
    assert policy.training
    first, second = policy(packed(GROUPS)).token_logp, policy(packed(GROUPS)).token_logp
    assert torch.equal(first, second)


# Temperature


def test_dpo_starts_at_ln_2_at_any_temperature_that_both_models_share(directory: Path) -> None:
    still = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    for policy, reference in ((0.7, 0.7), (2.0, 2.0), (2.0, 1.0)):
        work = work_of(scored(directory, temperature=reference))
        result = runner(directory, logit_temperature=policy).step(0, [work], optimizer=still, max_grad_norm=0.0)
        assert (abs(result.loss - math.log(2)) < 1e-6) == (policy == reference)
        assert result.grad_norm > 0.1


def test_wpo_weighs_at_temperature_1_whatever_the_loss_is_computed_at(directory: Path) -> None:
    groups = scored(directory)
    still = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    seen = {}
    for temperature in (1.0, 2.0):
        result = runner(directory, method=WPO, logit_temperature=temperature).step(
            0, [work_of(groups)], optimizer=still, max_grad_norm=0.0
        )
        seen[temperature] = result.metrics
    for name in ("wpo/weight", "wpo/weight_squared", "wpo/weight_chosen", "wpo/weight_rejected"):
        assert seen[2.0][name] == pytest.approx(seen[1.0][name], rel=1e-6)
    assert abs(seen[2.0]["logps/chosen"] - seen[1.0]["logps/chosen"]) > 1
