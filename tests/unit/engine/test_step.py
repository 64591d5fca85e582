"""One optimizer step against plain PyTorch on the same sequences, one at a time."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import Scenario, labelled, make_runner, make_source, objective, save_tiny, store, synthetic_groups
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayalign.data.group import Candidate, Group
from rayalign.data.micro_batches import StepCounts
from rayalign.engine.batches import StreamWork
from rayalign.engine.objective import MAIN_STREAM, Objective, denominator
from rayalign.engine.step import NonFiniteStep, Runner
from rayalign.engine.strategy.base import make_strategy
from rayalign.errors import UserError
from rayalign.methods import Method, MethodConfig, Term
from rayalign.methods.method import Over

SINGLE = make_strategy("single", torch.device("cpu"))
PAIRS = synthetic_groups([2] * 9)
BETA = 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("step") / "model")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("step") / "other", initializer_range=0.1)


@pytest.fixture(scope="module")
def dpo(model: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """DPO against another model, with rows and micro-batches that hold few groups each."""
    stream = store(tmp_path_factory.mktemp("step") / "pairs", PAIRS, reference=other_model, groups_per_step=5)
    return Scenario(
        model=model,
        streams=(stream,),
        objectives=(objective("dpo", beta=BETA),),
        tokens_per_micro_batch=150,
        row_tokens=60,
    )


def step(scenario: Scenario, work: tuple[StreamWork, ...], *, max_grad_norm: float = 0.0) -> tuple[Runner, object]:
    """A runner after one step of plain gradient descent with rate 1, and what the step said."""
    runner, policy = make_runner(scenario, SINGLE)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    return runner, runner.step(0, work, optimizer=optimizer, max_grad_norm=max_grad_norm)


def groups_of(work: StreamWork, groups: list[Group]) -> list[Group]:
    """The groups that a step saw, by the names that the source gives them."""
    positions = sorted(int(position) for batch in work.micro_batches for position in batch.group_index)
    return [groups[int(work.describe(position).rpartition(":")[2]) - 1] for position in positions]


def sequence_logp(model: torch.nn.Module, group: Group) -> Tensor:
    """[K] log π(candidate | prompt) by the model's own forward of each whole sequence."""
    totals = []
    for candidate in group.candidates:
        ids = torch.from_numpy(np.concatenate([group.prompt_ids, candidate.ids])).long()
        logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0]
        totals.append(logp[len(group.prompt_ids) - 1 :].sum())
    return torch.stack(totals)


def plain(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory)


def test_a_loss_without_gradient_is_refused(dpo: Scenario) -> None:
    """A run that moves nothing would end well."""
    (plain,) = dpo.objectives

    def loss(*given: Any) -> tuple[Term, ...]:
        return tuple(replace(term, per_item=term.per_item.detach()) for term in plain.method.loss(*given))

    scenario = replace(dpo, objectives=(replace(plain, method=replace(plain.method, loss=loss)),))
    work = make_source(scenario, SINGLE).get(0)
    with pytest.raises(UserError, match="method 'dpo': its loss has no gradient: make it of scored.scores"):
        step(scenario, work)


def test_first_dpo_step_is_ln_2(model: Path, tmp_path: Path) -> None:
    stream = store(tmp_path / "pairs", PAIRS, reference=model)
    scenario = Scenario(model=model, streams=(stream,), objectives=(objective("dpo", beta=BETA),))
    _, result = step(scenario, make_source(scenario, SINGLE).get(0))
    assert result.loss == pytest.approx(math.log(2), abs=1e-6)
    assert result.metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert result.grad_norm > 0.1


def test_gradient_is_that_of_the_plain_formula(dpo: Scenario, model: Path, other_model: Path) -> None:
    work = make_source(dpo, SINGLE).get(3)
    assert len(work[0].micro_batches) > 1
    runner, result = step(dpo, work)

    policy, reference = plain(model), plain(other_model)
    margins = []
    for group in groups_of(work[0], PAIRS):
        with torch.no_grad():
            ref = sequence_logp(reference, group)
        ratio = sequence_logp(policy, group) - ref
        margins.append(BETA * (ratio[0] - ratio[1]))
    loss = -F.logsigmoid(torch.stack(margins)).mean()
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), abs=1e-6)
    assert result.metrics["rewards/margins"] == pytest.approx(torch.stack(margins).mean().item(), abs=1e-5)

    engine = dict(runner.module.model.named_parameters())
    squares = 0.0
    for name, parameter in policy.named_parameters():
        assert torch.allclose(engine[name].grad, parameter.grad, atol=1e-6, rtol=1e-4), name
        assert torch.allclose(engine[name], parameter - parameter.grad, atol=1e-6), name
        squares += parameter.grad.double().square().sum().item()
    assert result.grad_norm == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_clipping_scales_the_step_and_not_the_norm_that_is_reported(dpo: Scenario, model: Path) -> None:
    work = make_source(dpo, SINGLE).get(0)
    _, free = step(dpo, work)
    runner, clipped = step(dpo, work, max_grad_norm=0.25 * free.grad_norm)
    assert clipped.grad_norm == pytest.approx(free.grad_norm)
    before = dict(plain(model).named_parameters())
    moved = sum((before[name] - p).square().sum().item() for name, p in runner.module.model.named_parameters())
    assert math.sqrt(moved) == pytest.approx(0.25 * free.grad_norm, rel=1e-4)


def test_auxiliary_stream_adds_its_weighted_likelihood(dpo: Scenario, model: Path, tmp_path: Path) -> None:
    answers = synthetic_groups([1] * 4, seed=5)
    auxiliary = store(tmp_path / "answers", answers, name="desk", groups_per_step=3)
    term = objective("sft", stream="desk", weight=0.02, reduction="sequence")
    both = replace(dpo, streams=(*dpo.streams, auxiliary), objectives=(*dpo.objectives, term))
    work = make_source(both, SINGLE).get(1)
    _, alone = step(dpo, work[:1])
    _, result = step(both, work)

    policy = plain(model)
    with torch.no_grad():
        nll = torch.stack([-sequence_logp(policy, group)[0] for group in groups_of(work[1], answers)])
    assert result.metrics["loss/train/dpo"] == pytest.approx(alone.loss)
    assert result.metrics["loss/desk/sft"] == pytest.approx(0.02 * nll.mean().item(), rel=1e-5)
    assert result.loss == pytest.approx(alone.loss + 0.02 * nll.mean().item(), rel=1e-6)
    assert result.metrics["rewards/margins"] == alone.metrics["rewards/margins"]


def test_kto_baseline_is_taken_over_the_whole_step(model: Path, other_model: Path, tmp_path: Path) -> None:
    examples = [replace(example, line=line) for line, example in enumerate(labelled(PAIRS), start=1)]
    stream = store(tmp_path / "examples", examples, reference=model, groups_per_step=8)
    scenario = Scenario(
        model=other_model,
        streams=(stream,),
        objectives=(objective("kto", beta=BETA),),
        tokens_per_micro_batch=120,
        row_tokens=60,
    )
    work = make_source(scenario, SINGLE).get(0)
    assert len(work[0].micro_batches) > 1
    _, result = step(scenario, work)
    policy, reference = plain(other_model), plain(model)
    groups = groups_of(work[0], examples)
    with torch.no_grad():
        ratio = torch.stack([sequence_logp(policy, group) - sequence_logp(reference, group) for group in groups])
    kl = ratio[:, 1].mean().clamp(min=0)
    sign = torch.tensor([1.0 if group.per_candidate["label"][0] == 1 else -1.0 for group in groups])
    loss = torch.sigmoid(-sign * BETA * (ratio[:, 0] - kl)).mean()
    assert kl > 0.1
    assert result.metrics["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert result.loss == pytest.approx(loss.item(), abs=1e-6)


def test_kto_estimates_the_kl_on_the_step_s_own_mixture(model: Path, other_model: Path, tmp_path: Path) -> None:
    """The step's pairs, taken apart; beside each prompt the next pair's completion of the same side, set there by hand.

    Chosen answers are short and rejected ones long, so that an estimate on chosen answers alone would be another one.
    """
    pairs = [
        replace(pair, candidates=(pair.candidates[0], repeated(pair.candidates[1], 3)))
        for pair in synthetic_groups([2] * 4, seed=8)
    ]
    stream = store(tmp_path / "examples", labelled(pairs), reference=model, groups_per_step=8)
    scenario = Scenario(
        model=other_model, streams=(stream,), objectives=(objective("kto"),), tokens_per_micro_batch=4096
    )
    _, result = step(scenario, make_source(scenario, SINGLE).get(0))
    policy, reference = plain(other_model), plain(model)
    of_side = []
    for side in (0, 1):
        beside = [
            replace(pair, candidates=(after.candidates[side],))
            for pair, after in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
        ]
        with torch.no_grad():
            ratio = torch.cat([sequence_logp(policy, group) - sequence_logp(reference, group) for group in beside])
        of_side.append(ratio.mean().item())
    assert abs(of_side[0] - of_side[1]) > 0.1 and sum(of_side) > 0
    assert result.metrics["kl"] == pytest.approx(sum(of_side) / 2, rel=1e-5)


def repeated(candidate: Candidate, times: int) -> Candidate:
    return Candidate(ids=np.tile(candidate.ids, times), mask=np.tile(candidate.mask, times))


def test_metrics_are_means_over_groups_and_not_over_micro_batches(dpo: Scenario) -> None:
    work = make_source(dpo, SINGLE).get(0)
    sizes = {int(batch.candidate_mask.shape[0]) for batch in work[0].micro_batches}
    assert len(sizes) > 1
    _, fine = step(dpo, work)
    _, coarse = step(dpo, make_source(replace(dpo, tokens_per_micro_batch=4096), SINGLE).get(0))
    assert coarse.metrics == pytest.approx(fine.metrics, abs=1e-5)


def test_evaluate_measures_and_changes_nothing(dpo: Scenario, model: Path) -> None:
    work = make_source(dpo, SINGLE).get(2)
    runner, _ = make_runner(dpo, SINGLE)
    measured = runner.evaluate(0, work)
    assert all(p.grad is None for p in runner.module.parameters())
    assert all(
        torch.equal(p, q) for p, q in zip(runner.module.model.parameters(), plain(model).parameters(), strict=True)
    )
    _, result = step(dpo, work)
    assert measured == pytest.approx({"loss": result.loss, **result.metrics}, abs=1e-9)


def test_step_that_is_not_finite_names_its_groups_and_moves_nothing(dpo: Scenario) -> None:
    (part,) = make_source(dpo, SINGLE).get(0)
    poisoned = part.micro_batches[0]
    poisoned.per_candidate["ref_logp"][0, 1] = math.nan
    culprits = {part.describe(int(position)) for position in poisoned.group_index}
    runner, policy = make_runner(dpo, SINGLE)
    before = [parameter.clone() for parameter in policy.parameters()]
    optimizer = torch.optim.AdamW(policy.parameters())
    with pytest.raises(NonFiniteStep, match="step 7: loss nan") as caught:
        runner.step(6, [part], optimizer=optimizer, max_grad_norm=1.0)
    assert set(caught.value.suspects) == culprits and len(culprits) < 5
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.suspects) == (str(caught.value), caught.value.suspects) and math.isnan(copy.loss)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))
    assert not optimizer.state


def test_every_denominator_is_its_count_and_never_zero() -> None:
    counts = StepCounts(pairs=3, groups=4, sequences=7, tokens=50)
    items = torch.zeros(2)
    terms = {over: Term(name=over, per_item=items, mask=items > 0, over=over) for over in get_args(Over)}
    expected = {"pairs": 3, "groups": 4, "sequences": 7, "tokens": 50, "constant": 1}
    assert {over: denominator(term, counts) for over, term in terms.items()} == expected
    assert denominator(terms["pairs"], StepCounts(pairs=0, groups=1, sequences=1, tokens=1)) == 1
    told = [denominator(replace(terms["groups"], count=torch.tensor(count)), counts) for count in (2.0, 0.0)]
    assert told == [2, 1]


def test_terms_of_one_name_add_up_and_masked_values_may_be_nan(dpo: Scenario) -> None:
    def loss(scored, config, statistics):
        logp = scored.scores.logp[:, 0]
        mask = torch.arange(len(logp)) > 0
        hidden = torch.where(mask, logp, math.nan)
        term = Term(name="twice", per_item=hidden, mask=mask, over="groups", weight=0.5)
        return (term, term)

    method = Method(name="mine", config=MethodConfig, loss=loss)
    own = Objective(stream=MAIN_STREAM, method=method, config=MethodConfig(), weight=3.0)
    (part,) = make_source(replace(dpo, tokens_per_micro_batch=4096), SINGLE).get(0)
    runner, _ = make_runner(dpo, SINGLE)
    scored = runner.score(own, part.micro_batches[0])
    total, shares = own.loss(scored, runner.statistics(0, part), part.counts)
    expected = 3.0 * scored.scores.logp[1:, 0].double().sum() / 5
    assert total.item() == pytest.approx(expected.item()) and shares["twice"].item() == total.item()
    total.backward()
    assert all(p.grad.isfinite().all() for p in runner.module.parameters())
