"""Mean gradients on samples against the policy gradient by enumeration, on a policy of a few completions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from policy_world import World
from token_groups import Groups
from torch import Tensor

from rayalign.methods import Statistics, resolve

STRENGTH = 0.3
"""Of the KL, β."""
SAMPLES = 24_576
"""Completions in one estimate; fixed before anything was measured."""
REPEATS = 5

WORLD = World()


def test_the_world_is_whole() -> None:
    """Eleven completions: one of a token, two of two, eight... no probability is left over."""
    assert len(WORLD.completions) == 1 + 2 + 2 * 2 * 3
    assert WORLD.logp(WORLD.table(WORLD.theta)).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def estimates(name: str, num_candidates: int, **parameters: Any) -> list[Tensor]:
    """Gradients of the method's loss on fresh samples of the policy, one per repeat."""
    table = WORLD.table(WORLD.theta)
    found = []
    for repeat in range(REPEATS):
        groups = WORLD.groups(WORLD.draw(table, SAMPLES, seed=repeat), num_candidates, behavior=table)
        groups.prepare(name, **parameters)
        found.append(torch.autograd.grad(groups.loss(name, **parameters), WORLD.theta)[0])
        table = WORLD.table(WORLD.theta)
    return found


def cosine(gradients: Sequence[Tensor], exact: Tensor) -> tuple[float, float]:
    """Mean over repeats and its standard error."""
    found = torch.stack([torch.cosine_similarity(gradient, exact, dim=0) for gradient in gradients])
    return float(found.mean()), float(found.std() / math.sqrt(len(found)))


@pytest.mark.parametrize(
    ("name", "num_candidates", "parameters", "strength"),
    [
        ("rloo", 2, {"kl_coef": STRENGTH}, STRENGTH),
        ("rloo", 4, {"kl_coef": STRENGTH, "ratio": "token"}, STRENGTH),
        ("rloo", 4, {"kl_coef": STRENGTH, "clip": None, "importance_cap": 2.0}, STRENGTH),
        ("reinforce_pp", 1, {"kl_coef": STRENGTH}, STRENGTH),
        ("grpo", 4, {"normalize": "dr_grpo", "kl_coef": 0}, 0.0),
    ],
)
def test_the_mean_gradient_is_the_policy_gradient(
    name: str, num_candidates: int, parameters: dict[str, Any], strength: float
) -> None:
    mean, error = cosine(estimates(name, num_candidates, **parameters), -WORLD.gradient(strength))
    assert mean - 2 * error > 0.99


def test_leave_one_out_has_the_size_of_the_gradient_too() -> None:
    """RLOO is unbiased; Dr. GRPO's own reward in its baseline shrinks it by (K − 1)/K, and its constant divides."""
    exact = WORLD.gradient(0.0)
    rloo = torch.stack(estimates("rloo", 2, kl_coef=0)).mean(dim=0)
    assert float(-(rloo @ exact) / (exact @ exact)) == pytest.approx(1.0, abs=0.03)
    dr_grpo = torch.stack(estimates("grpo", 2, normalize="dr_grpo", kl_coef=0, constant_tokens=3)).mean(dim=0)
    assert float(-(dr_grpo @ exact) / (exact @ exact)) == pytest.approx(0.5 / 3, abs=0.01)


def test_over_all_pairs_of_completions_rloo_is_the_policy_gradient_exactly() -> None:
    """Not a sample: every pair, weighted by its probability."""
    table = WORLD.table(WORLD.theta)
    probability = WORLD.logp(table).exp().detach()
    pairs = list(itertools.product(range(len(WORLD.completions)), repeat=2))
    groups = WORLD.groups([number for pair in pairs for number in pair], 2, behavior=table)
    method = resolve("rloo")
    config = method.config(kl_coef=STRENGTH)
    groups.prepare("rloo", kl_coef=STRENGTH)
    (term,) = method.loss(groups.scored("rloo", config), config, Statistics())
    weight = torch.tensor([float(probability[a] * probability[b]) for a, b in pairs], dtype=torch.float64)
    expected_loss = (term.per_item.view(-1, 2).mean(dim=1) * weight).sum()
    slope = torch.autograd.grad(expected_loss, WORLD.theta)[0]
    torch.testing.assert_close(slope, -WORLD.gradient(STRENGTH), rtol=1e-9, atol=1e-12)


def ppo_groups(drawn: Sequence[int], behavior: Tensor, values: Tensor) -> Groups:
    groups = WORLD.groups(drawn, 1, behavior=behavior)
    groups.per_token["old_value"] = values[torch.cat([WORLD.prefix[number] for number in drawn])]
    return groups


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_ppo_with_an_exact_critic_is_the_policy_gradient_whatever_lambda(lam: float) -> None:
    """Over all completions, weighted by their probability: one step of the exact critic is as good as the whole rest.

    The loss is a mean over tokens and the policy gradient a sum, so that the expected length divides.
    """
    table = WORLD.table(WORLD.theta)
    probability = WORLD.logp(table).exp().detach()
    every = list(range(len(WORLD.completions)))
    groups = ppo_groups(every, table.detach(), WORLD.value(table.detach(), STRENGTH))
    groups.prepare("ppo", kl_coef=STRENGTH, lam=lam, whiten=False)
    config = resolve("ppo").config(kl_coef=STRENGTH)
    (term,) = resolve("ppo").loss(groups.scored("ppo", config), config, Statistics())
    expected_loss = (term.per_item * probability[groups.candidate_of]).sum()
    slope = torch.autograd.grad(expected_loss, WORLD.theta)[0]
    torch.testing.assert_close(slope, -WORLD.gradient(STRENGTH), rtol=1e-9, atol=1e-12)


def test_an_exact_critic_has_returns_that_it_already_says() -> None:
    """At λ = 0 the mean return over what follows a prefix is its value: the critic's gradient is 0."""
    table = WORLD.table(WORLD.theta).detach()
    every = list(range(len(WORLD.completions)))
    value = WORLD.value(table, STRENGTH)
    groups = ppo_groups(every, table, value)
    groups.prepare("ppo", kl_coef=STRENGTH, lam=0, whiten=False)
    said = value.clone().requires_grad_()
    config = resolve("ppo").config()
    critic = resolve("ppo").critic
    assert critic is not None
    per_token = said[torch.cat(WORLD.prefix)]
    (term,) = critic.loss(groups.scored("ppo", config, per_token), config, Statistics())
    weight = WORLD.logp(table).exp()[groups.candidate_of]
    slope = torch.autograd.grad((term.per_item * weight).sum(), said)[0]
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("critic", "parameters"),
    [("exact", {}), ("exact", {"whiten": False, "lam": 0.0}), ("none", {"lam": 1.0}), ("wrong", {"lam": 1.0})],
)
def test_ppo_on_samples_is_the_policy_gradient(critic: str, parameters: dict[str, Any]) -> None:
    """With an exact critic at any λ; with none, or a wrong one, at λ = 1, where values are a baseline and no more."""
    table = WORLD.table(WORLD.theta)
    exact = WORLD.value(table.detach(), STRENGTH)
    wrong = 0.3 * torch.randn(len(exact), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = {"exact": exact, "none": torch.zeros_like(exact), "wrong": wrong}[critic]
    found = []
    for repeat in range(REPEATS):
        groups = ppo_groups(WORLD.draw(table, SAMPLES, seed=repeat), table.detach(), values)
        groups.prepare("ppo", kl_coef=STRENGTH, **parameters)
        found.append(torch.autograd.grad(groups.loss("ppo", kl_coef=STRENGTH), WORLD.theta)[0])
        table = WORLD.table(WORLD.theta)
    mean, error = cosine(found, -WORLD.gradient(STRENGTH))
    assert mean - 2 * error > 0.99


def test_ppo_with_a_wrong_critic_and_small_lambda_is_another_gradient() -> None:
    """So that the test above could fail."""
    table = WORLD.table(WORLD.theta)
    probability = WORLD.logp(table).exp().detach()
    wrong = torch.randn(len(WORLD.features), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    groups = ppo_groups(range(len(WORLD.completions)), table.detach(), wrong)
    groups.prepare("ppo", kl_coef=STRENGTH, lam=0, whiten=False)
    config = resolve("ppo").config(kl_coef=STRENGTH)
    (term,) = resolve("ppo").loss(groups.scored("ppo", config), config, Statistics())
    slope = torch.autograd.grad((term.per_item * probability[groups.candidate_of]).sum(), WORLD.theta)[0]
    assert torch.cosine_similarity(slope, -WORLD.gradient(STRENGTH), dim=0) < 0.95


def test_grpo_kl_in_the_loss_pulls_along_the_forward_kl_of_every_token() -> None:
    """Without rewards, the mean gradient of k3 is that of Σ_t KL(π_ref‖π) at the prefixes that the policy visits."""
    table = WORLD.table(WORLD.theta)
    visits = torch.zeros(len(WORLD.features), dtype=torch.float64)
    probability = WORLD.logp(table).exp().detach()
    for number, prefix in enumerate(WORLD.prefix):
        visits.index_add_(0, prefix, probability[number].expand(len(prefix)))
    per_prefix = (WORLD.reference.exp() * (WORLD.reference - table)).sum(dim=1)
    exact = torch.autograd.grad((visits * per_prefix).sum(), WORLD.theta)[0]
    table = WORLD.table(WORLD.theta)
    found = []
    for repeat in range(REPEATS):
        groups = WORLD.groups(WORLD.draw(table, SAMPLES, seed=repeat), 4, behavior=table)
        groups.per_candidate["reward"] = torch.ones_like(groups.per_candidate["reward"])
        parameters = {"normalize": "dr_grpo", "constant_tokens": 1, "kl_coef": STRENGTH}
        assert groups.prepare("grpo", **parameters).eq(0).all()
        found.append(torch.autograd.grad(groups.loss("grpo", **parameters), WORLD.theta)[0] / STRENGTH)
        table = WORLD.table(WORLD.theta)
    mean, error = cosine(found, exact)
    assert mean - 2 * error > 0.99
    assert float(torch.stack(found).mean(dim=0).norm() / exact.norm()) == pytest.approx(1.0, abs=0.03)


def exo_cosine(num_candidates: int, *, on_policy: bool) -> tuple[float, float]:
    table = WORLD.table(WORLD.theta)
    behavior = table if on_policy else WORLD.reference
    found = []
    for repeat in range(REPEATS):
        drawn = WORLD.draw(behavior, SAMPLES, seed=repeat)
        groups = WORLD.groups(drawn, num_candidates, behavior=behavior)
        loss = groups.loss("exo_rw", beta_pi=1.0, beta_r=STRENGTH)
        found.append(torch.autograd.grad(loss, WORLD.theta)[0])
        table = WORLD.table(WORLD.theta)
        behavior = table if on_policy else WORLD.reference
    return cosine(found, -WORLD.gradient(STRENGTH))


def test_exo_on_the_references_samples_turns_to_the_policy_gradient_as_candidates_grow() -> None:
    found = [exo_cosine(size, on_policy=False)[0] for size in (2, 8, 64, 512)]
    assert found == sorted(found)
    mean, error = exo_cosine(512, on_policy=False)
    assert mean - 2 * error > 0.99


@pytest.mark.parametrize("num_candidates", [2, 8, 64])
def test_exo_corrected_for_its_own_samples_is_the_policy_gradient_at_any_size(num_candidates: int) -> None:
    mean, error = exo_cosine(num_candidates, on_policy=True)
    assert mean - 2 * error > 0.99


def test_the_ratio_makes_a_second_pass_unbiased() -> None:
    """Without a clip, samples of an older policy give the gradient at the newer one."""
    with torch.no_grad():
        older = WORLD.table(WORLD.theta + 0.3)
    found = []
    for repeat in range(REPEATS):
        groups = WORLD.groups(WORLD.draw(older, SAMPLES, seed=repeat), 4, behavior=older)
        groups.prepare("rloo", kl_coef=0)
        found.append(torch.autograd.grad(groups.loss("rloo", kl_coef=0, clip=None), WORLD.theta)[0])
    mean, error = cosine(found, -WORLD.gradient(0.0))
    assert mean - 2 * error > 0.99
