"""Each exact experiment for a few steps: its losses are those of the records, and it begins where it should."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from lab.exact import e1, e2, e3, e4, e4b, e6, e7, e8
from lab.exact.enumeration import expected, kl
from lab.exact.preferences import CELLS, KL, REWARD, Cell, batch_loss, train
from lab.exact.training import copies, descend, forward, generator, network, normal, trainable
from token_groups import Groups

from rayalign.methods import dpo_loss


def test_updates_are_counted_from_none() -> None:
    """Adam's first step has the size of the learning rate, whatever the gradient."""
    (value,) = trainable([torch.zeros(1, dtype=torch.float64)])
    found = {step: value.item() for step in descend([value], lambda step: 7 * (1 - value).sum(), lr=0.1, at=(0, 1, 3))}
    assert found == pytest.approx({0: 0.0, 1: 0.1, 3: 0.3}, abs=1e-6)


def test_copies_of_a_network_are_that_network() -> None:
    random = generator(1)
    parameters, inputs = network(random, (4, 8, 3)), normal(random, 5, 4)
    several = forward(copies(parameters, 2), inputs)
    assert several.shape == (2, 5, 3)
    assert torch.allclose(several, forward(parameters, inputs).expand(2, 5, 3))


# E1 and E2.


def test_the_reward_of_e1_makes_its_optimum() -> None:
    """E[r] − KL(π‖π_ref) = −KL(π‖π*): the two bumps are the optimum at β = 1 and log Z is 0."""
    policy = e1.fixed(-0.4, 1.2)
    found = e1.quantities(policy)
    objective = expected(policy[None], e1.REWARD[None]) - kl(policy[None], e1.REFERENCE[None])
    assert objective == pytest.approx(-found["reverse KL"])
    assert found["mean"] == pytest.approx(-0.4, abs=0.01) and found["deviation"] == pytest.approx(1.2, abs=0.02)
    assert e1.quantities(e1.OPTIMUM)["reverse KL"] == pytest.approx(0.0, abs=1e-12)


def test_cells_of_e1_are_trained_apart() -> None:
    cells = list(itertools.product((e1.EXO, e1.DPO), e1.SIZES))
    together = e1.fit(5, cells, steps=10)
    for number in (1, 6):
        (alone,) = e1.fit(5, [cells[number]], steps=10)
        assert torch.allclose(together[number], alone)
    assert not torch.allclose(together[1], together[5])


def test_exo_on_own_samples_has_rloo_s_gradient() -> None:
    of = e2.world(3)
    for size in (2, 3):
        found = e2.gradient(of, e2.CORRECTED, size, generator(4))
        assert found.tolist() == pytest.approx(e2.rloo_gradient(of, size, generator(4)).tolist())


# E3 and E6.


def test_preferences_of_e3_say_nothing_of_half_of_the_prompts() -> None:
    of = e3.world(2)
    prompt, replies = of.pairs
    assert set(prompt.tolist()) == set(range(e3.PREFERRED)) and of.stream.shape == (e3.PROMPTS, e3.SAMPLES)
    reward = of.reward[prompt[:, None], replies]
    assert bool((reward[:, 0] > reward[:, 1]).all())


def test_e3_begins_at_the_reference_and_its_stream_holds_what_is_not_preferred() -> None:
    points = {(point.cell, point.at): point.values for point in e3.train(e3.world(2), at=(0, 40))}
    assert [cell for cell, at in points if at == 0] == list(e3.CELLS)
    for name in e3.CELLS:
        assert points[name, 0] == pytest.approx(dict.fromkeys(points[name, 0], 0.0), abs=1e-12)
        assert points[name, 40][e3.GAIN] > 0.1 and points[name, 40][e3.MARGIN] > 0.3
    assert points[e3.MPO, 40][e3.HELD_OUT] < points[e3.ALONE, 40][e3.HELD_OUT] / 2
    assert points[e3.CONTROL, 40][e3.HELD_OUT] < points["dpo", 40][e3.HELD_OUT] / 2


@pytest.mark.parametrize(("name", "limit"), [*e6.OPTIMA.items()][:3])
def test_margins_of_e6_stop_at_the_optimum(name: str, limit: float) -> None:
    (point,) = e6.train(name, 2, at=(500,))
    assert point.values["margin"] == pytest.approx(limit, abs=0.02)


def test_the_fixed_point_of_mpo_with_the_reference() -> None:
    first, last = e6.train(e6.REGULARISED, 2, at=(1, 400))
    assert last.values["residual"] < 1e-3 < 1e-2 < first.values["residual"]
    ref_logp = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    # at π = π_ref, h = τ ln 2, and τ s(h) s(−h) / λ of probability is missing from the chosen reply
    h = e6.TAU * math.log(2)
    wanted = e6.TAU / e6.WEIGHT / (1 + math.exp(-h)) / (1 + math.exp(h))
    assert e6.residual(ref_logp, ref_logp, torch.tensor([0, 1])) == pytest.approx(wanted)


# E4 and E4b.


def test_weights_and_their_controls() -> None:
    of = e4b.task(2, 0.5)
    logits = e4b.logits(of.start) + 0.3 * normal(generator(3), 1, e4b.SEQUENCES.num_prefixes, 6)
    ref_logp, pairs = e4b.SEQUENCES.logp(e4b.logits(of.start)), of.stored
    index = pairs.prompt[:, None], pairs.sequence
    losses = dpo_loss(e4b.SEQUENCES.logp(logits)[index], ref_logp[index], beta=0.1)

    def found(cell: Cell) -> float:
        return batch_loss(of, cell, logits, ref_logp, pairs, generator(1)).item()

    token_logp = e4b.SEQUENCES.token_logp(logits)[index]
    plain = token_logp.mean(dim=-1).exp()
    assert found(CELLS["dpo"]) == pytest.approx(losses.mean().item())
    assert found(CELLS["wpo none"]) == pytest.approx((plain.prod(dim=1) * losses).mean().item())
    assert found(Cell(alignment="none", which="chosen")) == pytest.approx((plain[:, 0] * losses).mean().item())
    shuffled = plain.prod(dim=1)[torch.randperm(len(plain), generator=generator(1))]
    assert found(Cell(alignment="none", permuted=True)) == pytest.approx((shuffled * losses).mean().item())


@pytest.mark.parametrize("name", ["dpo", "wpo sampled", "dpo hybrid", "dpo online"])
def test_e4_begins_at_the_reference_and_learns(name: str) -> None:
    of, writer = e4.task(2)
    ref_logp = e4.SEQUENCES.logp(of.logits(of.start))
    begin, end = train(of, CELLS[name], 2, lr=1e-3, at=(0, 20))
    assert begin[1][KL] == pytest.approx(0.0, abs=1e-12)
    assert begin[1][REWARD] == pytest.approx(expected(ref_logp, of.reward))
    assert 1e-3 < end[1][KL] < 1.0 and kl(writer, ref_logp) > 1.0
    if name == "dpo online":
        assert end[1][REWARD] > begin[1][REWARD] + 0.02


def test_a_cell_of_the_same_seed_is_the_same() -> None:
    of = e4b.task(2, 0.7)
    first, second = (train(of, CELLS["dpo online"], 2, lr=0.02, at=(3,)) for _ in range(2))
    assert first == second


# E7 and E8.


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("rloo", {"kl_coef": e7.BETA}),
        ("grpo", {"kl_coef": e7.BETA}),
        ("ppo", {"kl_coef": e7.BETA}),
        ("exo_rw", {"beta_pi": 1.0, "beta_r": e7.BETA}),
        ("dpo_rw", {"beta_pi": 1.0, "beta_r": e7.BETA}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_losses_of_e7_are_those_of_the_methods_records(name: str, parameters: dict[str, float]) -> None:
    """Value and gradient in log π, away from the reference."""
    of = e7.world(2)
    theta = of.start + 0.3 * normal(generator(3), e7.PARAMETERS)
    critic = normal(generator(4), e7.PROMPTS, e7.SEQUENCES.num_prefixes)
    drawn = e7.draw_groups(of, name, theta, critic, generator(5))
    token_logp = (drawn.token_logp + 0.05 * normal(generator(6), len(drawn.token_logp))).requires_grad_()
    moved = e7.Groups(
        sequence=drawn.sequence,
        token_logp=token_logp,
        behavior_token_logp=drawn.behavior_token_logp,
        ref_token_logp=drawn.ref_token_logp,
        reward=drawn.reward,
        value=drawn.value,
    )
    record = Groups(
        [[e7.SEQUENCES.length] * e7.CANDIDATES] * e7.PROMPTS,
        token_logp,
        behavior_token_logp=drawn.behavior_token_logp,
        ref_token_logp=drawn.ref_token_logp,
        reward=drawn.reward,
        old_value=drawn.value,
    )
    if name in e7.ON_POLICY:
        record.prepare(name, **parameters)
    wanted, found = record.loss(name, **parameters), e7.METHODS[name](moved)
    if name == "ppo":
        wanted = wanted + record.loss(name, value=drawn.value, **parameters)
    assert found.item() == pytest.approx(wanted.item())
    slopes = [torch.autograd.grad(loss, token_logp)[0].tolist() for loss in (found, wanted)]
    assert slopes[0] == pytest.approx(slopes[1], abs=1e-12)


def test_no_point_of_e7_lies_above_the_frontier() -> None:
    points = e7.measure(2, at=(0, 6))
    assert {point.cell for point in points} == {*e7.METHODS, "best of n"}
    begin = {point.values[REWARD] for point in points if point.at == 0}
    assert max(begin) - min(begin) < 1e-12
    for point in points:
        if point.at:
            assert point.values[e7.SLACK] > -1e-9 and 0.1 < point.values[e7.EFFICIENCY] < 1.0


def test_e8_measures_all_cells() -> None:
    points = e8.measure(2)
    assert [(point.cell, point.at) for point in points] == [
        (alignment, size) for size in e8.VOCABULARIES for alignment in e8.ALIGNMENTS
    ]
    for point in points:
        assert point.values[e8.VARIATION] == pytest.approx(point.values[e8.DEVIATION] / point.values[e8.MEAN])
