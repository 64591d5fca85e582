"""Why the first log-probs are not the reference's: the message names the cause, and advises what can help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Scenario, make_runner, make_source, objective, save_tiny, store, synthetic_groups

from rayalign.engine.batches import StreamWork
from rayalign.engine.first_step import PolicyMismatch, check_initial_logratio
from rayalign.engine.step import Runner
from rayalign.engine.strategy.base import make_strategy

SINGLE = make_strategy("single", torch.device("cpu"))
NOW = {"torch": "2.13.0", "attention": "sdpa", "dtype": "float32"}


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    folder = tmp_path_factory.mktemp("scenario")
    model = save_tiny(folder / "model")
    pairs = store(folder / "pairs", synthetic_groups([2] * 6), reference=model)
    return Scenario(model=model, streams=(pairs,), objectives=(objective("dpo"),))


@pytest.fixture
def first(scenario: Scenario) -> tuple[Runner, tuple[StreamWork, ...]]:
    return make_runner(scenario, SINGLE)[0], make_source(scenario, SINGLE).get(0)


def moved(work: tuple[StreamWork, ...], by: float) -> None:
    for batch in work[0].micro_batches:
        batch.per_token["ref_token_logp"].add_(by)


CAUSES: dict[str, tuple[float, dict[str, Any], str]] = {
    "another version of torch": (
        0.1,
        {"made": {**NOW, "torch": "2.11.0"}, "now": NOW},
        r"computed with something else \(torch: 2.11.0 then, 2.13.0 now\): run again with --fresh reference$",
    ),
    "nothing that is known": (0.1, {"made": NOW, "now": NOW}, r"only the machine .* run again with --fresh reference"),
    "no record": (0.1, {"made": {}, "now": NOW}, r"only the machine .* run again with --fresh reference"),
    "rounds": (0.1, {"made": None, "now": NOW}, r"own rollout actors computed the reference log-probs: .*report it$"),
    "missing": (float("nan"), {"made": NOW, "now": NOW}, r"\d+ reference log-probs are missing .* --fresh reference$"),
    "missing in rounds": (float("nan"), {"made": None, "now": NOW}, r"are missing .*the rollout actors .* failed"),
}  # fmt: skip


@pytest.mark.parametrize("case", CAUSES)
def test_the_cause_is_named(case: str, first: tuple[Runner, tuple[StreamWork, ...]]) -> None:
    by, facts, message = CAUSES[case]
    runner, work = first
    moved(work, by)
    with pytest.raises(PolicyMismatch, match=message) as error:
        check_initial_logratio(runner, work, **facts)
    assert str(error.value).startswith("before the first step |log π − log π_ref| per token is ")
    if facts["made"] is None:
        assert "--fresh" not in str(error.value)


def test_a_policy_that_gives_no_numbers_is_its_own_cause(first: tuple[Runner, tuple[StreamWork, ...]]) -> None:
    runner, work = first
    with torch.no_grad():
        runner.module.model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(
        PolicyMismatch, match=r"The policy's own log-probs of \d+ tokens are no finite numbers"
    ) as error:
        check_initial_logratio(runner, work, made=NOW, now=NOW)
    assert "--fresh" not in str(error.value)


def test_a_policy_that_draws_is_its_own_cause(first: tuple[Runner, tuple[StreamWork, ...]]) -> None:
    runner, work = first
    generator = torch.Generator().manual_seed(0)

    def noisy(module: torch.nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.5 * torch.randn(output.shape, generator=generator)

    handle = runner.module.model.model.layers[0].mlp.register_forward_hook(noisy)
    with pytest.raises(PolicyMismatch, match="scores the same tokens otherwise every time") as error:
        check_initial_logratio(runner, work, made=NOW, now=NOW)
    handle.remove()
    assert "--fresh" not in str(error.value)
    check_initial_logratio(runner, work, made=NOW, now=NOW)


def test_a_router_that_draws_in_training_is_still(tmp_path: Path) -> None:
    """Phi-3.5-MoE routes at random in training mode, and by a threshold that its noise also sets."""
    from causal_zoo import save_animal

    model = save_animal(tmp_path / "model", "phimoe", router_jitter_noise=0.01, input_jitter_noise=0.1)
    pairs = store(tmp_path / "pairs", synthetic_groups([2] * 3), reference=model)
    own = Scenario(model=model, streams=(pairs,), objectives=(objective("dpo"),), layout="concatenated")
    runner, _ = make_runner(replace(own, tokens_per_micro_batch=4096), SINGLE)
    check_initial_logratio(runner, make_source(replace(own, tokens_per_micro_batch=4096), SINGLE).get(0))
