"""Every method passes the check, and the check catches each kind of mistake with a sentence that names it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rayalign.config.method import why_not_weighted
from rayalign.methods import METHODS, Method, MethodConfig, Statistics, Term, WPOWeighting, compose, dpo_loss, resolve
from rayalign.testing import check_method
from rayalign.types import Round, Scored

VARIANTS = {
    "dpo": [{"label_smoothing": 0.2}],
    "exo_rw": [{"behavior_correction": "off"}, {"behavior": "assume_reference"}],
    "ipo": [{"normalize": "mean"}],
    "mpo": [
        {"objective": "logprob", "normalize": "sum"},
        {"use_reference": True, "label_smoothing": 0.1},
    ],
    "reward_model": [{"center": 0.1}],
    "sft": [{"reduction": "sequence"}],
    "simpo": [{"label_smoothing": 0.1, "gamma": 1.0}],
    "grpo": [
        {"normalize": "dr_grpo", "constant_tokens": 4},
        {"normalize": "dapo", "clip_high": 0.28, "kl_coef": 0},
        {"dual_clip": 3.0},
    ],
    "ppo": [{"gamma": 0.9, "lam": 0.5}, {"kl_coef": 0, "whiten": False}, {"value_clip": None, "dual_clip": 3.0}],
    "reinforce_pp": [{"gamma": 0.9}, {"kl_coef": 0}, {"clip": None}],
    "rloo": [{"ratio": "token"}, {"kl_coef": 0}, {"ratio": "token", "dual_clip": 3.0}],
    "wpo": [{"alignment": "none", "clamp": "each"}, {"alignment": "greedy", "clamp": "none", "which": "rejected"}],
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_passes(name: str) -> None:
    check_method(resolve(name))


@pytest.mark.parametrize(("name", "values"), [(name, values) for name in VARIANTS for values in VARIANTS[name]])
def test_every_variant_passes(name: str, values: dict[str, object]) -> None:
    method = resolve(name)
    check_method(method, method.config(**values))


WEIGHABLE = [name for name in METHODS if name != "dpo" and why_not_weighted(resolve(name), WPOWeighting()) is None]
ALIGNMENTS = ["none", "greedy", "sampled"]


@pytest.mark.parametrize(
    ("name", "alignment"), [*((name, "sampled") for name in WEIGHABLE), *(("dpo", each) for each in ALIGNMENTS)]
)
def test_every_weighted_method_passes(name: str, alignment: str) -> None:
    check_method(compose(resolve(name), WPOWeighting(alignment=alignment)))


def pairs(scored: Scored) -> tuple[torch.Tensor, torch.Tensor]:
    real = scored.pair_mask[:, None]
    return torch.where(real, scored.scores.logp, 0), torch.where(real, scored.candidate("ref_logp"), 0)


def sound(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    losses = dpo_loss(*pairs(scored), beta=0.1)
    return (Term(name="term", per_item=losses, mask=scored.pair_mask, over="pairs"),)


def multiplies_by_the_mask(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    losses = dpo_loss(scored.scores.logp, scored.candidate("ref_logp"), beta=0.1) * scored.pair_mask
    return (Term(name="term", per_item=losses, mask=torch.ones_like(scored.pair_mask), over="pairs"),)


def masks_after_computing(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    losses = dpo_loss(scored.scores.logp, scored.candidate("ref_logp"), beta=0.1)
    return (Term(name="term", per_item=losses, mask=scored.pair_mask, over="pairs"),)


def takes_a_mean(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    losses = dpo_loss(*pairs(scored), beta=0.1)
    return (Term(name="term", per_item=losses.mean()[None], mask=torch.tensor([True]), over="constant"),)


def declares_no_scale(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    return tuple(replace(term, over="constant") for term in sound(scored, config, statistics))


def is_over_the_wrong_items(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    return tuple(replace(term, over="tokens") for term in sound(scored, config, statistics))


def detaches(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    policy_logp, ref_logp = pairs(scored)
    z = 0.1 * (policy_logp - ref_logp)
    losses = -F.logsigmoid(z[:, 0] - z[:, 1].detach())
    return (Term(name="term", per_item=losses, mask=scored.pair_mask, over="pairs"),)


def has_no_gradient(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    return tuple(replace(term, per_item=term.per_item.detach()) for term in sound(scored, config, statistics))


def reads_the_batch_order(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    rank = torch.arange(len(scored.pair_mask), dtype=torch.float64)
    return tuple(replace(term, per_item=term.per_item * rank) for term in sound(scored, config, statistics))


def centers_on_the_micro_batch(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    policy_logp, ref_logp = pairs(scored)
    losses = dpo_loss(policy_logp, ref_logp, beta=0.1) * policy_logp.mean().exp()
    return (Term(name="term", per_item=losses, mask=scored.pair_mask, over="pairs"),)


def reads_more_than_declared(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    scored.candidate("reward")
    return sound(scored, config, statistics)


def method_of(loss: object, **changes: object) -> Method:
    return Method(name="mine", config=MethodConfig, loss=loss, **{"needs": frozenset({"ref_logp"}), **changes})


def test_a_sound_method_passes() -> None:
    check_method(method_of(sound))


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (multiplies_by_the_mask, "lets a masked value reach the loss"),
        (masks_after_computing, "lets a masked value reach the gradient"),
        (takes_a_mean, "divided into micro-batches"),
        (declares_no_scale, "has the wrong scale"),
        (is_over_the_wrong_items, "is over tokens, of which the batch has"),
        (detaches, "something is detached"),
        (has_no_gradient, "has no gradient"),
        (reads_the_batch_order, "depends on the order of groups"),
        (centers_on_the_micro_batch, "divided into micro-batches"),
        (reads_more_than_declared, "'reward' is used but not declared"),
    ],
)
def test_each_mistake_is_named(loss: object, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_method(method_of(loss))


@pytest.mark.parametrize("name", ["rloo", "reinforce_pp", "grpo", "ppo"])
def test_a_capped_ratio_is_a_weight_and_so_detached_on_purpose(name: str) -> None:
    method = resolve(name)
    check_method(method, method.config(clip=None, importance_cap=2.0), finite_differences=False)


def on_round(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
    real = scored.batch.candidate_mask.flatten()[scored.batch.candidate_of]
    losses = -torch.where(real, scored.token("advantage"), 0) * torch.where(real, scored.scores.token_logp, 0)
    return (Term(name="term", per_item=losses, mask=real, over="tokens"),)


def spread(prepared: Round, config: MethodConfig) -> dict[str, torch.Tensor]:
    known = torch.where(prepared.candidate_mask, prepared.candidate("reward"), 0)
    return {"advantage": known.flatten()[prepared.candidate_of]}


def forgets_the_mask(prepared: Round, config: MethodConfig) -> dict[str, torch.Tensor]:
    reward = prepared.candidate("reward")
    return {"advantage": (reward - reward.mean()).flatten()[prepared.candidate_of]}


def counts_its_place(prepared: Round, config: MethodConfig) -> dict[str, torch.Tensor]:
    return {"advantage": spread(prepared, config)["advantage"] * prepared.candidate_of}


def makes_one_number_a_candidate(prepared: Round, config: MethodConfig) -> dict[str, torch.Tensor]:
    return {"advantage": prepared.candidate("reward").flatten()}


def makes_another_column(prepared: Round, config: MethodConfig) -> dict[str, torch.Tensor]:
    return {"return": spread(prepared, config)["advantage"]}


def reads_an_undeclared_column(prepared: Round, config: MethodConfig) -> dict[str, torch.Tensor]:
    prepared.token("ref_token_logp")
    return spread(prepared, config)


def rolls_dice(prepared: Round, config: MethodConfig) -> dict[str, torch.Tensor]:
    made = spread(prepared, config)["advantage"]
    return {"advantage": made + torch.rand_like(made)}


ON_ROUND = {"candidates": "group", "needs": frozenset({"reward", "advantage"})}


def test_a_sound_method_on_rounds_passes() -> None:
    check_method(method_of(on_round, round_prepare=spread, **ON_ROUND))


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (None, r"needs \['advantage'\], which a round_prepare must make"),
        (forgets_the_mask, "round_prepare's 'advantage' lets a masked value through"),
        (counts_its_place, "round_prepare's 'advantage' depends on the order of groups"),
        (makes_one_number_a_candidate, "must have one number per token"),
        (makes_another_column, r"prepares the columns \['return'\], and its needs declare \['advantage'\]"),
        (reads_an_undeclared_column, "'ref_token_logp' is used but not declared"),
        (rolls_dice, "round_prepare's 'advantage' differs when made again"),
    ],
)
def test_each_mistake_in_a_round_is_named(prepare: object, sentence: str) -> None:
    method = method_of(on_round, round_prepare=prepare, **ON_ROUND)
    if prepare is None:
        method = replace(method, needs=method.needs - {"reward"})
    with pytest.raises(AssertionError, match=sentence):
        check_method(method)


def test_a_need_that_is_never_read_is_named() -> None:
    with pytest.raises(AssertionError, match="declares the need 'reward' and never reads it"):
        check_method(method_of(sound, needs=frozenset({"ref_logp", "reward"})))


def test_a_loss_that_detaches_on_purpose_may_say_so() -> None:
    check_method(method_of(detaches), finite_differences=False)


def test_metrics_that_let_nan_through_are_named() -> None:
    def metrics(scored: Scored, config: MethodConfig, statistics: Statistics) -> dict[str, tuple]:
        return {"mine": (scored.candidate("ref_logp").sum(), scored.pair_mask.sum())}

    with pytest.raises(AssertionError, match="metric 'mine' lets a masked value through"):
        check_method(method_of(sound, metrics=metrics))
