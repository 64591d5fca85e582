"""Losses and gradients of TRL's own trainers on the same token ids, wherever TRL computes what its paper says.

TRL pads every sequence into a row of its own and calls the model's forward; the other side packs prompts once, runs two
micro-batches through the engine and divides by global counts. Where the two mean different things, the test's name
says what TRL does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from packed_work import by_group, packed, work_of
from random_groups import random_groups
from tiny_models import tiny
from tiny_tokenizers import byte_level
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from rayalign.data.group import Group
from rayalign.engine.model.forward import Policy
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.step import Runner, StepResult
from rayalign.engine.strategy.base import Single
from rayalign.methods import compose, resolve
from rayalign.methods.method import Method, Statistics
from rayalign.methods.weighting import WPOWeighting
from rayalign.types import Scored, Scores

TOKENIZER = byte_level()
VOCABULARY = len(TOKENIZER)
PAIRS = random_groups([2] * 8, vocabulary=VOCABULARY, seed=4)
BETA = 0.6


def model(seed: int) -> PreTrainedModel:
    """Weights so small that the likelihood of random tokens is close to that of the model's own: weights around 1."""
    return tiny("llama", vocab_size=VOCABULARY, initializer_range=0.08, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    loss: float
    gradient: dict[str, Tensor]
    metrics: dict[str, float]


# rayalign


def ours(groups: Sequence[Group], method: Method, *, reference: bool = True, **parameters: Any) -> Outcome:
    """One step of the engine on two micro-batches; the optimizer does not move anything."""
    groups = scored_by_reference(groups) if reference else groups
    policy = Policy(model(0))
    runner = Runner(
        module=policy,
        objectives={MAIN_STREAM: Objective(stream=MAIN_STREAM, method=method, config=method.config(**parameters))},
        strategy=Single(torch.device("cpu")),
        compute_dtype=torch.float32,
        seed=0,
    )
    still = torch.optim.SGD(policy.parameters(), lr=0.0)
    result: StepResult = runner.step(0, [work_of(groups)], optimizer=still, max_grad_norm=0.0)
    return Outcome(loss=result.loss, gradient=gradient(policy.model), metrics=dict(result.metrics))


def scored_by_reference(groups: Sequence[Group]) -> list[Group]:
    with torch.no_grad():
        logp = Policy(model(1))(packed(groups)).token_logp.numpy()
    parts = by_group(logp, groups)
    return [replace(group, per_token={"ref_token_logp": part}) for group, part in zip(groups, parts, strict=True)]


# TRL


def training_arguments(directory: Path) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": len(PAIRS),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


TEXT = Dataset.from_list([{"prompt": "What is it?", "chosen": " The sky.", "rejected": " The answer."}])
"""What a trainer wants to be given before it can be asked for the loss of any batch."""


def outcome(trainer: Any, batch: dict[str, Any]) -> Outcome:
    """TRL's loss of a batch that its own collator made, its gradient, and the metrics it logs."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    logged = getattr(trainer, "_metrics", None) or trainer._stored_metrics
    metrics = {name: values[-1] for name, values in logged["train"].items()}
    return Outcome(loss=loss.item(), gradient=gradient(trainer.model), metrics=metrics)


def trl_dpo(directory: Path, groups: Sequence[Group] = PAIRS, **parameters: Any) -> Outcome:
    trainer = DPOTrainer(
        model=model(0),
        ref_model=model(1),
        args=DPOConfig(**training_arguments(directory), beta=BETA, **parameters),
        train_dataset=TEXT,
        processing_class=TOKENIZER,
    )
    return outcome(trainer, trainer.data_collator([pair_ids(group) for group in groups]))


def trl_kto(directory: Path, examples: Sequence[Group], **parameters: Any) -> Outcome:
    rows = [{"prompt": "What is it?", "completion": " The sky.", "label": label} for label in (True, False)]
    trainer = KTOTrainer(
        model=model(0),
        ref_model=model(1),
        args=KTOConfig(**training_arguments(directory), beta=BETA, **parameters),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
    )
    batch = trainer.data_collator(
        [
            {
                "prompt_ids": group.prompt_ids.tolist(),
                "completion_ids": group.candidates[0].ids.tolist(),
                "KL_completion_ids": group.candidates[1].ids.tolist(),
                "label": bool(group.per_candidate["label"][0]),
            }
            for group in examples
        ]
    )
    return outcome(trainer, batch)


def trl_without_reference(trainer_class: type, arguments: Any) -> Outcome:
    trainer = trainer_class(model=model(0), args=arguments, train_dataset=TEXT, processing_class=TOKENIZER)
    rows = []
    for group in PAIRS:
        row = {"prompt": "", "prompt_input_ids": group.prompt_ids.tolist()}
        for side, candidate in zip(("chosen", "rejected"), group.candidates, strict=True):
            whole = [*group.prompt_ids.tolist(), *candidate.ids.tolist()]
            row[f"{side}_input_ids"] = whole
            row[f"{side}_attention_mask"] = [1] * len(whole)
            row[f"{side}_labels"] = [-100] * len(group.prompt_ids) + candidate.ids.tolist()
        rows.append(row)
    return outcome(trainer, trainer.data_collator(rows))


def pair_ids(group: Group) -> dict[str, list[int]]:
    chosen, rejected = group.candidates
    return {
        "prompt_ids": group.prompt_ids.tolist(),
        "chosen_ids": chosen.ids.tolist(),
        "rejected_ids": rejected.ids.tolist(),
    }


# The comparison


def gradient(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_same(one: Outcome, other: Outcome) -> None:
    assert one.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-6)
    assert one.gradient.keys() == other.gradient.keys() and len(one.gradient) == len(dict(model(0).named_parameters()))
    norm = torch.stack([value.norm() for value in other.gradient.values()]).norm()
    assert norm > 1e-3
    for name, value in other.gradient.items():
        assert (one.gradient[name] - value).norm() <= 1e-5 * norm, name


DPO_FAMILY: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "sigmoid": ({}, "dpo", {"beta": BETA}),
    "hinge": ({}, "hinge", {"beta": BETA}),
    "ipo": ({}, "ipo", {"tau": BETA, "normalize": "mean"}),
    "exo_pair": ({"label_smoothing": 1e-3}, "exo_pref", {"beta_pi": BETA, "label_smoothing": 1e-3}),
    "robust": ({"label_smoothing": 0.2}, "robust_dpo", {"beta": BETA, "label_smoothing": 0.2}),
}


@pytest.mark.parametrize("loss_type", DPO_FAMILY)
def test_losses_with_a_reference_agree(loss_type: str, tmp_path: Path) -> None:
    theirs, name, parameters = DPO_FAMILY[loss_type]
    assert_same(ours(PAIRS, resolve(name), **parameters), trl_dpo(tmp_path, loss_type=loss_type, **theirs))


def test_metrics_of_trl_s_names_are_trl_s_numbers(tmp_path: Path) -> None:
    here, there = ours(PAIRS, resolve("dpo"), beta=BETA), trl_dpo(tmp_path)
    shared = here.metrics.keys() & there.metrics.keys()
    assert shared == {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")} | {
        "logps/chosen",
        "logps/rejected",
    }
    for name in shared:
        assert here.metrics[name] == pytest.approx(there.metrics[name], rel=1e-5, abs=1e-5), name


def test_trl_has_no_cdpo_any_more_its_sigmoid_loss_ignores_label_smoothing(tmp_path: Path) -> None:
    smoothed = trl_dpo(tmp_path, label_smoothing=0.2)
    assert_same(ours(PAIRS, resolve("dpo"), beta=BETA), smoothed)
    assert abs(ours(PAIRS, resolve("dpo"), beta=BETA, label_smoothing=0.2).loss - smoothed.loss) > 0.01


def test_trl_s_ipo_is_the_mean_form_and_not_the_sum(tmp_path: Path) -> None:
    there = trl_dpo(tmp_path, loss_type="ipo")
    assert abs(ours(PAIRS, resolve("ipo"), tau=BETA, normalize="sum").loss - there.loss) > 0.1


# WPO


def wpo(clamp: str) -> Method:
    return compose(resolve("dpo"), WPOWeighting.model_validate({"alignment": "sampled", "clamp": clamp}))


@torch.no_grad()
def with_likely_answers(groups: Sequence[Group]) -> list[Group]:
    """Every other pair's answers become the policy's own favourite tokens: such pairs weigh more than 1."""
    policy, changed = model(0), list(groups)
    for index in range(0, len(groups), 2):
        candidates = []
        for candidate in groups[index].candidates:
            ids = groups[index].prompt_ids.tolist()
            for _ in candidate.ids:
                ids.append(int(policy(torch.tensor([ids])).logits[0, -1].argmax()))
            favourite = np.array(ids[len(groups[index].prompt_ids) :], np.int32)
            candidates.append(replace(candidate, ids=favourite))
        changed[index] = replace(groups[index], candidates=tuple(candidates))
    return changed


def test_trl_s_wpo_has_no_clamp_any_more_and_agrees_without_ours(tmp_path: Path) -> None:
    pairs = with_likely_answers(PAIRS)
    there = trl_dpo(tmp_path, pairs, use_weighting=True)
    assert_same(ours(pairs, wpo("none"), beta=BETA), there)
    clamped = ours(pairs, wpo("product"), beta=BETA)
    assert clamped.metrics["wpo/clamped"] == 0.5 and clamped.loss < 0.9 * there.loss


def test_the_authors_clamp_differs_from_trl_exactly_where_the_weight_exceeds_one(tmp_path: Path) -> None:
    for index, group in enumerate(with_likely_answers(PAIRS[:4])):
        there = trl_dpo(tmp_path, [group], use_weighting=True).loss
        weight = there / trl_dpo(tmp_path, [group]).loss
        assert (weight > 1) == (index % 2 == 0)
        clamped = ours([group, group], wpo("product"), beta=BETA).loss  # once in each micro-batch
        assert clamped == pytest.approx(there / max(1.0, weight), rel=1e-4)


# KTO


def labelled() -> list[Group]:
    """Every completion with a label and the completion of the next group; TRL rotates within a batch as well."""
    answers = [group.candidates[0] for group in PAIRS]
    return [
        replace(
            group,
            candidates=(answer, other),
            per_candidate={"label": np.array([index % 3 != 0, np.nan], np.float32)},
        )
        for index, (group, answer, other) in enumerate(zip(PAIRS, answers, [*answers[1:], answers[0]], strict=True))
    ]


def test_kto_agrees(tmp_path: Path) -> None:
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    there = trl_kto(tmp_path, labelled(), **weights)
    here = ours(labelled(), resolve("kto"), beta=BETA, **weights)
    assert there.metrics["kl"] > 0.01, "the estimate must not be cut at 0 here"
    assert here.metrics["kl"] == pytest.approx(there.metrics["kl"], rel=1e-4)
    assert_same(here, there)


# Without a reference


def test_simpo_agrees_with_cpo_trainer(tmp_path: Path) -> None:
    arguments = CPOConfig(**training_arguments(tmp_path), loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5)
    here = ours(PAIRS, resolve("simpo"), reference=False, beta=2.0, gamma=0.5)
    assert_same(here, trl_without_reference(CPOTrainer, arguments))


def test_orpo_s_odds_ratio_agrees_and_trl_s_likelihood_counts_the_prompt(tmp_path: Path) -> None:
    there = {
        weight: trl_without_reference(ORPOTrainer, ORPOConfig(**training_arguments(tmp_path), beta=weight))
        for weight in (0.0, 2.0)
    }
    here = {weight: ours(PAIRS, resolve("orpo"), reference=False, weight=weight) for weight in (0.0, 2.0)}
    assert_same(difference(here[2.0], here[0.0]), difference(there[2.0], there[0.0]))
    assert here[0.0].loss == pytest.approx(mean_nll(whole=False, of="sequences"), rel=1e-5)
    assert there[0.0].loss == pytest.approx(mean_nll(whole=True, of="tokens"), rel=1e-5)


def difference(one: Outcome, other: Outcome) -> Outcome:
    gradient = {name: value - other.gradient[name] for name, value in one.gradient.items()}
    return Outcome(loss=one.loss - other.loss, gradient=gradient, metrics={})


@torch.no_grad()
def mean_nll(*, whole: bool, of: str) -> float:
    """Of the chosen responses, or of prompts and chosen responses; a mean over tokens, or over sequences of means."""
    policy, sequences = model(0), []
    for group in PAIRS:
        ids = torch.from_numpy(np.concatenate([group.prompt_ids, group.candidates[0].ids])).long()
        logp = policy(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        sequences.append(-logp if whole else -logp[len(group.prompt_ids) - 1 :])
    return (torch.cat(sequences) if of == "tokens" else torch.stack([nll.mean() for nll in sequences])).mean().item()


# The reward model


def test_the_reward_model_s_loss_agrees(tmp_path: Path) -> None:
    config = copy.deepcopy(model(0).config)
    config.num_labels = 1
    torch.manual_seed(0)
    scorer = AutoModelForSequenceClassification.from_config(config)
    mine = copy.deepcopy(scorer)
    margins = [0.1 * index for index in range(len(PAIRS))]
    trainer = RewardTrainer(
        model=scorer,
        args=RewardConfig(**training_arguments(tmp_path), center_rewards_coefficient=0.05),
        train_dataset=TEXT,
        processing_class=TOKENIZER,
    )
    rows = [{key: ids[0] + ids[1] for key, ids in sides(group).items()} for group in PAIRS]
    batch = trainer.data_collator([{**row, "margin": margin} for row, margin in zip(rows, margins, strict=True)])
    there = outcome(trainer, batch)

    method = resolve("reward_model")
    [term] = method.loss(scored_by_head(mine, margins), method.config(center=0.05), Statistics())
    loss = term.per_item.mean()
    loss.backward()
    assert loss.item() == pytest.approx(there.loss, rel=1e-5)
    for name, value in gradient(mine).items():
        assert torch.allclose(value, there.gradient[name], rtol=1e-4, atol=1e-6), name


def sides(group: Group) -> dict[str, tuple[list[int], list[int]]]:
    prompt, (chosen, rejected) = group.prompt_ids.tolist(), group.candidates
    return {"chosen_ids": (prompt, chosen.ids.tolist()), "rejected_ids": (prompt, rejected.ids.tolist())}


def scored_by_head(scorer: PreTrainedModel, margins: Sequence[float]) -> Scored:
    """Scores of both answers from the scalar head, each sequence by itself."""
    scores, batch = [], packed(PAIRS)
    for group in PAIRS:
        for prompt, response in sides(group).values():
            hidden = scorer.base_model(torch.tensor([prompt + response])).last_hidden_state[0]
            scores.append(scorer.score(hidden)[-1, 0])
    column = torch.tensor([[margin, torch.nan] for margin in margins])
    nothing = torch.zeros(len(PAIRS), 2)
    return Scored(
        batch=replace(batch, per_candidate={"margin": column, "rank": torch.tensor([[0.0, 1.0]] * len(PAIRS))}),
        scores=Scores(
            token_logp=torch.zeros(len(batch.target_ids)),
            logp=nothing,
            length=nothing.long(),
            score=torch.stack(scores).view(-1, 2),
        ),
        needs=frozenset({"score", "margin", "rank"}),
    )
