"""WPO's weight on top of other methods, over whole steps of several micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from rayalign.errors import UserError
from rayalign.methods import (
    METHODS,
    Method,
    MethodConfig,
    Statistics,
    Term,
    WPOWeighting,
    compose,
    resolve,
    wpo_pair_weight,
)
from rayalign.methods.wpo import pair_weight
from rayalign.testing import RandomGroup, random_groups, scored_batch, step_loss, step_statistics, without
from rayalign.types import Scored

Step = Sequence[Sequence[RandomGroup]]


def step_of(method: Method, step: Step, config: MethodConfig | None = None) -> float:
    config = config or method.config()
    batches = [scored_batch(groups, method.needed(config)) for groups in step]
    statistics = step_statistics(method, config, batches, groups_per_step=sum(map(len, step)))
    return step_loss(method, config, batches, statistics).item()


@pytest.fixture
def pairs() -> list[RandomGroup]:
    return random_groups(resolve("dpo"), num_groups=6)


def certain(group: RandomGroup) -> RandomGroup:
    """The group with every token's weight exactly 1."""
    for name in ("plain_token_logp", "log_sum_p2"):
        for values in group.per_token[name]:
            values.zero_()
    return group


def test_weights_of_one_change_nothing(pairs: list[RandomGroup]) -> None:
    dpo = resolve("dpo")
    certain_pairs = [certain(group) for group in pairs]
    assert step_of(compose(dpo, WPOWeighting()), [certain_pairs]) == step_of(dpo, [certain_pairs])


def test_method_wpo_is_dpo_with_the_weight(pairs: list[RandomGroup]) -> None:
    dpo, wpo = resolve("dpo"), resolve("wpo")
    composed = compose(dpo, WPOWeighting(alignment="greedy", clamp="each", which="rejected"))
    alone = wpo.config(beta=0.1, alignment="greedy", clamp="each", which="rejected")
    assert step_of(composed, [pairs], dpo.config(beta=0.1)) == step_of(wpo, [pairs], alone)


@pytest.mark.parametrize("name", ["ipo", "simpo", "mpo", "exo_pref"])
def test_any_pairwise_loss_is_multiplied_pair_by_pair(name: str, pairs: list[RandomGroup]) -> None:
    base, weighting = resolve(name), WPOWeighting()
    method, config = compose(base, weighting), base.config()
    scored = scored_batch(pairs, method.needed(config))
    (plain,), (weighted,) = base.loss(scored, config, Statistics()), method.loss(scored, config, Statistics())
    assert torch.equal(weighted.per_item, plain.per_item * pair_weight(scored, weighting))
    assert (weighted.over, weighted.name) == (plain.over, plain.name)
    assert method.config is base.config


def test_weight_is_a_constant_made_from_the_temperature_one_policy(pairs: list[RandomGroup]) -> None:
    scored = scored_batch(pairs, frozenset({"plain_token_logp", "log_sum_p2"}))
    weight = pair_weight(scored, WPOWeighting(clamp="none"))
    assert not weight.requires_grad
    for b, group in enumerate(pairs):
        logs = [
            float((group.per_token["plain_token_logp"][k] - group.per_token["log_sum_p2"][k]).mean()) for k in (0, 1)
        ]
        assert weight[b].item() == pytest.approx(math.exp(sum(logs)))


def test_permutation_deals_the_weights_of_the_whole_step(pairs: list[RandomGroup]) -> None:
    """The multiset of weights stays, the pairs that carry them change, and micro-batches do not matter."""
    dpo, weighting = resolve("dpo"), WPOWeighting(permute=True)
    method, config = compose(dpo, weighting), dpo.config()

    def weights(step: Step) -> dict[int, float]:
        batches = [scored_batch(groups, method.needed(config)) for groups in step]
        statistics = step_statistics(method, config, batches, groups_per_step=6)
        dealt = {}
        for scored in batches:
            (term,), (plain,) = method.loss(scored, config, statistics), dpo.loss(scored, config, statistics)
            dealt |= dict(
                zip(scored.batch.group_index.tolist(), (term.per_item / plain.per_item).tolist(), strict=True)
            )
        return dealt

    scored = scored_batch(pairs, method.needed(config))
    own = dict(zip(range(6), pair_weight(scored, weighting).tolist(), strict=True))
    whole, divided = weights([pairs]), weights([pairs[4:], [pairs[1], pairs[0]], pairs[2:4]])
    assert whole == pytest.approx(divided)
    assert sorted(whole.values()) == pytest.approx(sorted(own.values()))
    assert sum(abs(whole[index] - own[index]) > 1e-6 for index in own) >= 3


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_permutation_is_among_real_pairs_only(name: str) -> None:
    """Ties and quarantined prompts have a slot of the step and no weight: none is dealt one, or deals 0."""
    base = resolve(name)
    groups = random_groups(base, num_groups=8)
    for index in (1, 4, 5):
        groups[index] = without(groups[index], [1] if name == "dpo" else [0, 1], math.nan)
    method, config = compose(base, WPOWeighting(permute=True, clamp="none")), base.config()
    own = compose(base, WPOWeighting(clamp="none"))
    found = []
    for weighted in (own, method):
        batches = [scored_batch(part, weighted.needed(config)) for part in (groups[:3], groups[3:])]
        statistics = step_statistics(weighted, config, batches, groups_per_step=8)
        shares: list[float] = []
        for scored in batches:
            (term,), (plain,) = weighted.loss(scored, config, statistics), base.loss(scored, config, statistics)
            shares += (term.per_item / plain.per_item)[plain.mask].tolist()
        found.append(shares)
    before, after = found
    assert len(before) == len(after) == 5 and before != pytest.approx(after)
    if name == "dpo":
        assert sorted(after) == pytest.approx(sorted(before))
        assert sum(after) == pytest.approx(sum(before))
    else:
        assert min(after) > 0 and sum(after) == pytest.approx(2.0)  # 1 in each class


def test_permutation_changes_from_step_to_step_and_not_from_run_to_run(pairs: list[RandomGroup]) -> None:
    method = compose(resolve("dpo"), WPOWeighting(permute=True))
    scored = scored_batch(pairs, method.needs)
    sums = {"wpo/weights": torch.arange(6, dtype=torch.float64), "wpo/weighed": torch.ones(6)}

    def dealt(seed: int, step: int) -> list[float]:
        statistics = Statistics(sums=sums, groups_per_step=6, seed=seed, step=step)
        return method.loss(scored, method.config(), statistics)[0].per_item.tolist()

    assert dealt(0, 1) == dealt(0, 1)
    assert dealt(2**63 - 1, 1) == dealt(2**63 - 1, 1)
    assert len({tuple(dealt(seed, step)) for seed in (0, 1) for step in range(4)}) > 4


def test_a_method_without_permutation_costs_no_second_forward() -> None:
    assert compose(resolve("dpo"), WPOWeighting()).step_prepare is None
    assert compose(resolve("dpo"), WPOWeighting(permute=True)).step_prepare is not None


@pytest.mark.parametrize("permute", [False, True])
def test_weights_of_unpaired_examples_sum_to_one_in_each_class_of_the_step(permute: bool) -> None:
    kto = resolve("kto")
    method, config = compose(kto, WPOWeighting(permute=permute)), kto.config()
    groups = random_groups(kto, num_groups=7)
    batches = [scored_batch(part, method.needed(config)) for part in (groups[:2], groups[2:3], groups[3:])]
    statistics = step_statistics(method, config, batches, groups_per_step=7)
    shares = {True: 0.0, False: 0.0}
    for scored in batches:
        (weighted,), (plain,) = method.loss(scored, config, statistics), kto.loss(scored, config, statistics)
        assert weighted.over == "constant"
        for share, label in zip(weighted.per_item / plain.per_item, scored.candidate("label")[:, 0], strict=True):
            shares[bool(label)] += share.item()
    assert shares == pytest.approx({True: 1.0, False: 1.0})


def test_the_unpaired_weight_is_that_of_the_example_itself() -> None:
    kto = resolve("kto")
    method, config = compose(kto, WPOWeighting()), kto.config()
    groups = random_groups(kto, num_groups=4)
    scored = scored_batch(groups, method.needed(config))
    statistics = step_statistics(method, config, [scored], groups_per_step=4)
    (weighted,), (plain,) = method.loss(scored, config, statistics), kto.loss(scored, config, statistics)
    share = (weighted.per_item / plain.per_item).tolist()
    raw = [
        math.exp(float((group.per_token["plain_token_logp"][0] - group.per_token["log_sum_p2"][0]).mean()))
        for group in groups
    ]
    assert share[1] / share[3] == pytest.approx(raw[1] / raw[3])  # examples 1 and 3 are desirable
    assert share[0] / share[2] == pytest.approx(raw[0] / raw[2])


def test_clamping_each_cuts_unpaired_weights_before_they_are_normalised() -> None:
    kto = resolve("kto")
    groups = random_groups(kto, num_groups=4)
    for index, log_weight in ((1, math.log(3.0)), (3, math.log(0.5))):  # the desirable examples
        groups[index].per_token["plain_token_logp"][0].fill_(log_weight)
        groups[index].per_token["log_sum_p2"][0].zero_()
    for clamp, expected in (("product", 3 / 3.5), ("none", 3 / 3.5), ("each", 1 / 1.5)):
        method = compose(kto, WPOWeighting(clamp=clamp))
        scored = scored_batch(groups, method.needs)
        statistics = step_statistics(method, kto.config(), [scored], groups_per_step=4)
        (weighted,) = method.loss(scored, kto.config(), statistics)
        (plain,) = kto.loss(scored, kto.config(), statistics)
        assert (weighted.per_item / plain.per_item)[1].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wpo", "weighted by WPO already"),
        ("sft", "learns from neither"),
        ("reward_model", "learns from neither"),
        ("exo_rw", "learns from neither"),
        ("dpo_rw", "learns from neither"),
    ],
)
def test_what_cannot_be_weighted_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        compose(resolve(name), WPOWeighting())


def test_a_weight_on_a_weight_is_refused() -> None:
    with pytest.raises(UserError, match="weighted by WPO already"):
        compose(compose(resolve("ipo"), WPOWeighting(alignment="none")), WPOWeighting())


def test_a_side_of_a_pair_is_refused_where_there_are_no_pairs() -> None:
    with pytest.raises(UserError, match="chooses a side of a pair"):
        compose(resolve("kto"), WPOWeighting(which="rejected"))


def test_a_term_that_is_not_over_pairs_is_refused(pairs: list[RandomGroup]) -> None:
    def loss(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
        logp = scored.scores.token_logp
        return (Term(name="nll", per_item=-logp, mask=torch.ones_like(logp, dtype=torch.bool), over="tokens"),)

    method = compose(Method(name="mine", config=MethodConfig, loss=loss), WPOWeighting())
    with pytest.raises(UserError, match="term 'nll' of method 'mine' is over tokens"):
        step_of(method, [pairs])


def test_every_other_method_can_be_weighted() -> None:
    refused = {"wpo", "sft", "reward_model", "exo_rw", "dpo_rw", "rloo", "reinforce_pp", "grpo", "ppo"}
    for name in set(METHODS) - refused:
        assert compose(resolve(name), WPOWeighting()).name == f"{name}+wpo"


def test_clamp_cuts_before_or_after_multiplying() -> None:
    weight = torch.tensor([[2.0, 0.25], [2.0, 3.0], [0.5, 0.5]])
    assert wpo_pair_weight(weight, clamp="none").tolist() == [0.5, 6.0, 0.25]
    assert wpo_pair_weight(weight, clamp="product").tolist() == [0.5, 1.0, 0.25]
    assert wpo_pair_weight(weight, clamp="each").tolist() == [0.25, 1.0, 0.25]
    assert wpo_pair_weight(weight, clamp="product", which="chosen").tolist() == [1.0, 1.0, 0.5]
    assert wpo_pair_weight(weight, clamp="none", which="rejected").tolist() == [0.25, 3.0, 0.5]
