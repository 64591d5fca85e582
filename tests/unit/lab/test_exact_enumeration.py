"""What the exact experiments count: distances, optima, the frontier, sequences and weights, by hand or a second way."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from lab.exact import e2, e4b, e8
from lab.exact.enumeration import Sequences, best_of_n, expected, frontier, kl, optimum
from lab.exact.preferences import BETA
from lab.exact.training import generator, normal
from torch import Tensor


def log_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def world() -> tuple[Tensor, Tensor]:
    """Reference and reward of three prompts and five completions."""
    random = generator(3)
    return torch.log_softmax(normal(random, 3, 5), dim=-1), normal(random, 3, 5)


def test_distance_and_expectation_by_hand() -> None:
    policy, reference = log_of([0.5, 0.5], [0.25, 0.75]), log_of([0.25, 0.75], [0.25, 0.75])
    assert kl(policy, reference) == pytest.approx(0.5 * math.log(4 / 3) / 2)  # ½ ln 2 + ½ ln ⅔, and 0
    assert kl(reference, policy) == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2)
    assert expected(policy, torch.tensor([[0.0, 1.0], [4.0, 0.0]])) == pytest.approx((0.5 + 1.0) / 2)


def test_the_optimum_by_hand() -> None:
    reward = torch.tensor([[0.0, 2 * math.log(3)]], dtype=torch.float64)
    assert optimum(log_of([0.5, 0.5]), reward, 2.0).exp().tolist() == [pytest.approx([0.25, 0.75])]


def test_every_policy_misses_the_optimum_by_its_distance_to_it() -> None:
    """E[r] − β KL(π‖π_ref) = β log Z − β KL(π‖π*), prompt by prompt."""
    ref_logp, reward = world()
    beta, policy = 0.7, torch.log_softmax(normal(generator(4), 3, 5), dim=-1)
    best = optimum(ref_logp, reward, beta)
    log_z = float(torch.logsumexp(ref_logp + reward / beta, dim=-1).mean())
    objective = expected(policy, reward) - beta * kl(policy, ref_logp)
    assert objective == pytest.approx(beta * log_z - beta * kl(policy, best))


def test_the_frontier_of_two_completions_by_hand() -> None:
    """With rewards 0 and 1, E[r] is the second one's probability, so the frontier is the KL's inverse."""
    ref_logp, reward = log_of([0.5, 0.5]), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    level = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert frontier(ref_logp, reward, [0.0, level, math.log(2)]) == pytest.approx([0.5, 0.8, 1.0], abs=1e-6)


def test_the_frontier_against_its_dual() -> None:
    """By weak duality no policy exceeds β E_x log E_ref exp(r/β) + β κ for any β, and the best β is tight."""
    ref_logp, reward = world()
    levels = [0.05, 0.3, 0.8]
    betas = torch.logspace(-2, 4, 20_001, dtype=torch.float64)
    log_z = torch.logsumexp(ref_logp + reward / betas[:, None, None], dim=-1).mean(dim=-1)
    assert frontier(ref_logp, reward, levels) == pytest.approx(
        [float((betas * (log_z + level)).min()) for level in levels], abs=1e-6
    )


def test_no_policy_lies_above_the_frontier_however_its_prompts_share_the_kl() -> None:
    ref_logp, reward = world()
    random = generator(5)
    for _ in range(50):
        beta = 0.2 + torch.rand(3, 1, generator=random, dtype=torch.float64)
        policy = torch.log_softmax(optimum(ref_logp, reward, beta) + 0.1 * normal(random, 3, 5), dim=-1)
        (best,) = frontier(ref_logp, reward, [kl(policy, ref_logp)])
        assert expected(policy, reward) < best


def test_best_of_two_by_hand() -> None:
    found = best_of_n(log_of([0.75, 0.25], [0.5, 0.5]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 2).exp()
    assert found.tolist() == [pytest.approx([0.5625, 0.4375]), pytest.approx([0.75, 0.25])]


# Sequences.


def test_sequences_a_second_way() -> None:
    """A dictionary from prefix to row, in the order of first use."""
    found = Sequences(3, 3)
    every = list(itertools.product(range(3), repeat=3))
    rows = {prefix: row for row, prefix in enumerate([(), *itertools.product(range(3), repeat=1)])}
    rows |= {prefix: 4 + row for row, prefix in enumerate(itertools.product(range(3), repeat=2))}
    assert [tuple(sequence) for sequence in found.tokens.tolist()] == every
    assert found.prefix.tolist() == [[rows[sequence[:t]] for t in range(3)] for sequence in every]
    assert found.prefix_tokens().tolist() == [[*prefix, -1, -1][:2] for prefix in rows]
    logits = normal(generator(6), 2, found.num_prefixes, 3)
    probability = torch.softmax(logits, dim=-1)
    logp = found.logp(logits)
    wanted = [math.prod(float(probability[1, rows[s[:t]], s[t]]) for t in range(3)) for s in every]
    assert logp[1].exp().tolist() == pytest.approx(wanted)
    assert logp.exp().sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    some = torch.tensor([[3, 5], [26, 0]])
    assert torch.equal(found.logp_of(logits, torch.tensor([1, 0]), some), logp[torch.tensor([[1], [0]]), some])


def test_weights_of_a_sequence_by_hand() -> None:
    """Tokens 0 then 1 of probability ¾ and ⅕, where the other token has ¼ and ⅘."""
    found = Sequences(2, 2)
    table = log_of([0.75, 0.25], [0.8, 0.2], [0.5, 0.5])[None]
    weights = {
        name: found.weight(table, torch.tensor([0]), torch.tensor([1]), name).item()
        for name in ("none", "greedy", "sampled")
    }
    assert weights["none"] == pytest.approx(math.sqrt(0.75 * 0.2))
    assert weights["greedy"] == pytest.approx(math.sqrt(0.2 / 0.8))
    assert weights["sampled"] == pytest.approx(math.sqrt(0.75 / 0.625 * 0.2 / 0.68))


@pytest.mark.parametrize("alignment", e8.ALIGNMENTS)
def test_moments_that_factor_are_those_of_all_sequences(alignment: str) -> None:
    logits = e8.logits(7, 4, prompts=3, tokens=3)
    found = Sequences(4, 3)
    place = (found.prefix_tokens() >= 0).sum(dim=1)
    table = logits[:, place]
    prompt = torch.arange(3).repeat_interleave(len(found))
    weight = found.weight(table, prompt, torch.arange(len(found)).repeat(3), alignment)
    probability = found.logp(table).exp().flatten() / 3
    mean = float(probability @ weight)
    deviation = math.sqrt(float(probability @ (weight - mean) ** 2))
    assert e8.moments(logits, alignment) == pytest.approx((mean, deviation))


# Groups and pairs.


def test_orders_of_multisets_by_hand() -> None:
    rows = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 2], [0, 1, 2, 3]])
    assert e2.log_orders(rows).exp().tolist() == pytest.approx([1, 4, 6, 12, 24])


@pytest.mark.parametrize("size", [2, 4])
def test_shares_of_multisets_sum_to_one(size: int) -> None:
    _, share = e2.groups(e2.world(8).ref_logp, size, generator(8))
    assert float(share.sum()) == pytest.approx(1.0)


def test_the_gradient_over_multisets_is_that_over_ordered_pairs() -> None:
    of = e2.world(8)
    found = e2.gradient(of, e2.DPO, 2, generator(8))
    total = torch.zeros(())
    for a, b in itertools.product(range(e2.OUTCOMES), repeat=2):
        pair = torch.tensor([[a, b]])
        share = of.ref_logp[pair].sum().exp()
        target = torch.softmax(of.reward[pair], dim=1)
        total = total - share * (target * torch.log_softmax((of.logp - of.ref_logp)[pair], dim=1)).sum()
    assert found.tolist() == pytest.approx(torch.autograd.grad(total, of.theta)[0].tolist())


def test_the_gradient_of_own_pairs_in_closed_form() -> None:
    """At the reference DPO's slope is −β/2 on every pair, and a sequence is chosen over all that earn less.

    In a region of probability P, y is chosen with probability 2 π(y) π(less than y) / P. That minus the probability of
    being rejected, at each of its tokens, is the gradient in the logits: the softmax's own part cancels.
    """
    every = e4b.task(8, 0.5)
    first, later = (tensor[:1] for tensor in every.start)
    of = replace(every, reward=every.reward[:1], start=[first, later])
    probability, earned = e4b.SEQUENCES.logp(e4b.logits([first, later]))[0].exp(), of.reward[0]
    wanted = torch.zeros(4, 6, dtype=torch.float64)
    for region in (0, 1):
        inside = torch.nonzero(region == e4b.REGION).squeeze(1)
        share, reward = probability[inside], earned[inside]
        beaten = torch.sign(reward[:, None] - reward) @ share  # P(less than y) − P(more than y); equals count for none
        surplus = 2 * share * beaten / share.sum()
        for t in range(4):
            wanted[t].index_add_(0, e4b.SEQUENCES.tokens[inside, t], -BETA / 2 * surplus)
    assert e4b.own_gradient(of).tolist() == pytest.approx(wanted.flatten().tolist(), abs=1e-12)


def test_pairs_are_of_one_region_and_the_better_one_is_chosen() -> None:
    of = e4b.task(8, 0.7)
    sequence, prompt = of.stored.sequence, of.stored.prompt[:, None]
    region = e4b.REGION[sequence]
    assert torch.equal(region[:, 0], region[:, 1])
    reward = of.reward[prompt, sequence]
    assert bool((reward[:, 0] >= reward[:, 1]).all())
    # 17 of 24 pairs of each prompt are the other writer's, who writes region 1 nineteen times out of twenty
    assert 0.5 < float(region.double().mean()) < 0.9
