"""What is taken over a whole step, and what is logged of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from rayalign.methods import (
    Method,
    MethodConfig,
    Statistics,
    WPOWeighting,
    compose,
    ranking_loss,
    resolve,
    reward_model_loss,
)
from rayalign.testing import RandomGroup, random_groups, scored_batch, step_loss, step_statistics, without


def with_numbers(
    group: RandomGroup, logp: Sequence[float], ref_logp: Sequence[float], **columns: Sequence[float]
) -> RandomGroup:
    """The group with one-token candidates of these log-probabilities."""
    return replace(
        group,
        token_logp=tuple(torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in logp),
        per_token={name: tuple(values[:1] for values in each) for name, each in group.per_token.items()},
        per_candidate={
            **group.per_candidate,
            "ref_logp": tuple(ref_logp),
            **{name: tuple(values) for name, values in columns.items()},
        },
    )


def logged(method: Method, groups: Sequence[RandomGroup], config: MethodConfig | None = None) -> dict[str, float]:
    config = config or method.config()
    scored = scored_batch(groups, method.needed(config))
    statistics = step_statistics(method, config, [scored], groups_per_step=len(groups))
    ratios = method.metrics(scored, config, statistics)
    return {name: (total / count).item() for name, (total, count) in ratios.items()}


def test_kto_estimates_the_kl_on_the_mismatched_completions_of_the_whole_step() -> None:
    kto = resolve("kto")
    numbers = [(-1.0, -2.0), (-1.5, -1.0), (-0.5, -3.0)]  # example, mismatched; reference −1.6 and −2.5
    groups = [
        with_numbers(group, logp, (-1.6, -2.5))
        for group, logp in zip(random_groups(kto, num_groups=3), numbers, strict=True)
    ]
    groups[2] = without(groups[2], [1], math.nan)  # no mismatched completion here
    z0 = (0.5 + 1.5) / 2
    assert logged(kto, groups)["kl"] == pytest.approx(z0)

    config = kto.config(beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    batches = [scored_batch(part, kto.needs) for part in (groups[:1], groups[1:])]
    statistics = step_statistics(kto, config, batches, groups_per_step=3)
    surplus = [0.2 * (logp - -1.6 - z0) for logp in (-1.0, -1.5, -0.5)]
    sigmoid = [1 / (1 + math.exp(-value)) for value in surplus]
    expected = (0.5 * sigmoid[0] + 1.5 * (1 - sigmoid[1]) + 0.5 * sigmoid[2]) / 3  # labels 0, 1, 0
    assert step_loss(kto, config, batches, statistics).item() == pytest.approx(expected)


def test_an_example_without_a_label_counts_nowhere_in_kto() -> None:
    """Neither in the loss, its mean, the estimate of the KL, nor a metric; nor does WPO's weight on top see it."""
    kto = resolve("kto")
    groups = random_groups(kto, num_groups=4)
    rest = [groups[0], groups[2], groups[3]]
    groups[1] = replace(groups[1], per_candidate={**groups[1].per_candidate, "label": (math.nan, math.nan)})
    for method in (kto, compose(kto, WPOWeighting()), compose(kto, WPOWeighting(permute=True))):
        found = []
        for own in (groups, rest):
            batches = [scored_batch(part, method.needed(kto.config())) for part in (own[:2], own[2:])]
            statistics = step_statistics(method, kto.config(), batches, groups_per_step=4)
            loss = step_loss(method, kto.config(), batches, statistics)
            leaves = [leaf for group in rest for leaf in group.token_logp]
            gradients = torch.autograd.grad(loss, [*leaves, *groups[1].token_logp], allow_unused=True)
            assert all(gradient is None or not gradient.any() for gradient in gradients[len(leaves) :])
            found.append({"loss": loss.item(), "slope": float(torch.cat(gradients[: len(leaves)]).norm())})
            found[-1] |= logged(method, own)
        assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_kto_takes_a_negative_estimate_as_zero() -> None:
    kto = resolve("kto")
    groups = [with_numbers(group, (-1.0, -9.0), (-1.0, -1.0)) for group in random_groups(kto, num_groups=2)]
    assert logged(kto, groups)["kl"] == 0.0


def test_kto_gives_no_gradient_to_the_mismatched_completions() -> None:
    kto = resolve("kto")
    groups = random_groups(kto, num_groups=3)
    batch = [scored_batch(groups, kto.needs)]
    loss = step_loss(kto, kto.config(), batch, step_statistics(kto, kto.config(), batch, groups_per_step=3))
    for group in groups:
        example, mismatched = torch.autograd.grad(loss, group.token_logp, retain_graph=True)
        assert example.abs().min() > 0
        assert mismatched.eq(0).all()


def test_preference_metrics_have_trl_s_names_and_count_a_tie_as_half() -> None:
    dpo = resolve("dpo")
    numbers = [((-1.0, -2.0), (-1.5, -1.5)), ((-3.0, -1.0), (-2.0, -2.0)), ((-2.0, -2.0), (-1.0, -1.0))]
    groups = [with_numbers(group, *each) for group, each in zip(random_groups(dpo, num_groups=3), numbers, strict=True)]
    assert logged(dpo, groups, dpo.config(beta=0.5)) == pytest.approx(
        {
            "rewards/chosen": 0.5 * (0.5 - 1 - 1) / 3,
            "rewards/rejected": 0.5 * (-0.5 + 1 - 1) / 3,
            "rewards/accuracies": (1 + 0 + 0.5) / 3,
            "rewards/margins": 0.5 * (1 - 2 + 0) / 3,
            "logps/chosen": -2.0,
            "logps/rejected": -5 / 3,
        }
    )


def test_wpo_logs_its_weights() -> None:
    method = compose(resolve("dpo"), WPOWeighting(alignment="none"))
    groups = [with_numbers(group, (-1, -1), (-1, -1)) for group in random_groups(method, num_groups=2)]
    for group, values in zip(groups, [(0.5, -0.5), (0.0, math.log(0.5))], strict=True):
        for token, value in zip(group.per_token["plain_token_logp"], values, strict=True):
            token.fill_(value + (0.2 if group is groups[0] else 0.0))
    values = logged(method, groups)
    # Pair weights e^0.4 → 1 by the clamp, and 0.5.
    assert values["wpo/weight"] == pytest.approx(0.75)
    assert values["wpo/weight_squared"] == pytest.approx((1 + 0.25) / 2)
    assert values["wpo/clamped"] == 0.5
    assert values["wpo/weight_chosen"] == pytest.approx((math.exp(0.7) + 1) / 2)
    assert values["wpo/weight_rejected"] == pytest.approx((math.exp(-0.3) + 0.5) / 2)
    assert "rewards/accuracies" in values


def test_mpo_logs_the_share_of_pairs_without_gradient() -> None:
    mpo = resolve("mpo")
    numbers = [(-1.0, -2.0), (-1.0, -9.0), (-12.0, -1.0)]
    groups = [
        with_numbers(group, logp, (0, 0)) for group, logp in zip(random_groups(mpo, num_groups=3), numbers, strict=True)
    ]
    assert logged(mpo, groups)["mpo/saturated"] == pytest.approx(2 / 3)


def test_group_metrics_compare_the_policy_s_favourite_with_the_best_reward() -> None:
    exo = resolve("exo_rw")
    reward = (0.1, 0.9, 0.5, 0.9)
    groups = [
        with_numbers(group, logp, (-2, -2, -2, -2), reward=reward)
        for group, logp in zip(random_groups(exo, num_groups=2), [(-3, -3, -3, -1), (-1, -3, -3, -3)], strict=True)
    ]
    assert logged(exo, groups) == pytest.approx({"reward": 0.6, "rewards/accuracies": 0.5})


def test_reward_model_subtracts_the_margin_and_averages_over_the_pairs_of_a_ranking() -> None:
    method = resolve("reward_model")
    group, other = (
        replace(
            group,
            score=tuple(torch.tensor(score, dtype=torch.float64) for score in (1.0, 0.25, 7.0, 0.0)),
            per_candidate={"margin": (0.5,) + (math.nan,) * 3, "rank": rank},
        )
        for group, rank in zip(
            random_groups(method, num_groups=2),
            # The third is in no order in the first group; in the second it ties with the last one.
            [(0.0, 1.0, math.nan, math.nan), (1.0, 0.0, 2.0, 2.0)],
            strict=True,
        )
    )
    scored = scored_batch([group, other], method.needs)
    (term,) = method.loss(scored, method.config(), Statistics())
    margins = [0.25 - 1.0, 0.25 - 7.0, 0.25 - 0.0, 1.0 - 7.0, 1.0 - 0.0]
    losses = [math.log1p(math.exp(-(margin - 0.5))) for margin in margins]
    assert term.per_item.tolist() == pytest.approx([math.log1p(math.exp(-(0.75 - 0.5))), sum(losses) / 5])
    values = logged(method, [group, other])
    assert values["rewards/margins"] == pytest.approx((0.75 + sum(margins)) / 6)
    assert values["rewards/accuracies"] == pytest.approx(3 / 6)
    assert values["rewards/chosen"] == pytest.approx((1.0 + 3 * 0.25 + 2 * 1.0) / 6)
    doubts = [1 / (1 + math.exp(margin)) for margin in (0.75, *margins)]
    assert values["rewards/brier"] == pytest.approx(sum(doubt**2 for doubt in doubts) / 6)


def test_a_ranking_of_two_is_a_pair_and_one_without_an_order_is_nothing() -> None:
    score = torch.tensor([[1.5, -0.5], [0.2, 0.4]], dtype=torch.float64, requires_grad=True)
    rank = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    pair = reward_model_loss(score, margin=0.3, center=0.1)
    assert torch.equal(ranking_loss(score, rank, margin=0.3, center=0.1), pair)
    assert torch.equal(ranking_loss(score.flip(1), rank.flip(1), margin=0.3, center=0.1), pair)
    nothing = ranking_loss(score, torch.zeros(2, 2), center=0.1)
    assert nothing.tolist() == [0.0, 0.0]
    nothing.sum().backward()
    assert not score.grad.any()
