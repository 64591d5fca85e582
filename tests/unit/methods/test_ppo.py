"""PPO through its two records: three tokens by hand, and the vectors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from token_groups import Groups, double
from torch import Tensor

from rayalign.methods import Method, MethodConfig, Statistics, Term, ppo_value_loss, resolve
from rayalign.methods.ppo import METHOD
from rayalign.types import Scored

VECTORS = {
    vector["id"]: vector
    for vector in json.loads((Path(__file__).parents[2] / "fixtures" / "vectors.json").read_text())["vectors"]
}


def near(values: Tensor, expected: list[float]) -> None:
    assert values.tolist() == pytest.approx(expected, abs=1e-9, nan_ok=True)


# By hand: one prompt, a completion of three tokens and one of two.


def hand_made(**columns: Tensor) -> Groups:
    """log μ − log π_ref is 0.1, −0.2, 0.3 | 0.4, −0.1; the critic says 0.5, 0.2, 0.4 | 0.1, −0.3."""
    logp = double([-1.0, -0.5, -2.0, -0.7, -1.2]).requires_grad_()
    behavior_logp = logp.detach().clone()
    given = {
        "reward": double([[1.0, 0.25]]),
        "behavior_token_logp": behavior_logp,
        "ref_token_logp": behavior_logp - double([0.1, -0.2, 0.3, 0.4, -0.1]),
        "old_value": double([0.5, 0.2, 0.4, 0.1, -0.3]),
    }
    return Groups([[3, 2]], logp, **{**given, **columns})


PLAIN: dict[str, Any] = {"kl_coef": 0.5, "gamma": 0.5, "lam": 0.5, "whiten": False}


def test_three_tokens_by_hand() -> None:
    """γ = λ = β = ½.

    Rewards −β u: −0.05, 0.10, −0.15 + 1 = 0.85 | −0.20, 0.05 + 0.25 = 0.30: the score on the last token of each row.
    δ: −0.05 + 0.10 − 0.5 = −0.45; 0.10 + 0.20 − 0.2 = 0.10; 0.85 + 0 − 0.4 = 0.45, since nothing comes after the end;
       −0.20 − 0.15 − 0.1 = −0.45; 0.30 + 0 + 0.3 = 0.60: the short row ends two tokens in, and the next row's value is
       none of its business.
    A with γλ = ¼: 0.45; 0.10 + 0.1125 = 0.2125; −0.45 + 0.053125 = −0.396875 | 0.60; −0.45 + 0.15 = −0.30.
    """
    groups = hand_made()
    advantage = [-0.396875, 0.2125, 0.45, -0.30, 0.60]
    near(groups.prepare("ppo", **PLAIN), advantage)
    near(groups.per_token["return"], [0.103125, 0.4125, 0.85, -0.20, 0.30])
    loss = groups.loss("ppo", **PLAIN)
    assert loss.item() == pytest.approx(-sum(advantage) / 5, abs=1e-12)  # at π = μ every ratio is 1
    near(torch.autograd.grad(loss, groups.token_logp)[0], [-a / 5 for a in advantage])


def test_whitening_moves_the_advantages_and_leaves_the_returns() -> None:
    groups = hand_made()
    raw = groups.prepare("ppo", **PLAIN)
    returns = groups.per_token["return"]
    white = groups.prepare("ppo", **{**PLAIN, "whiten": True})
    near(white, ((raw - raw.mean()) / (raw.var() + 1e-8).sqrt()).tolist())
    assert torch.equal(groups.per_token["return"], returns)


def test_lambda_1_is_the_reward_to_go_minus_the_value_and_lambda_0_one_step_of_it() -> None:
    groups = hand_made()
    to_go = [0.90, 0.95, 0.85, 0.10, 0.30]
    values = groups.per_token["old_value"]
    near(groups.prepare("ppo", kl_coef=0.5, lam=1, whiten=False) + values, to_go)
    near(groups.prepare("ppo", kl_coef=0.5, lam=0, whiten=False), [-0.35, 0.30, 0.45, -0.60, 0.60])


def test_the_critic_learns_the_returns_within_its_clip() -> None:
    """V' − returns is 0.4, 0.1, −0.3 | 0, −0.2; V' moved by 0.003125, 0.3125, 0.15 | −0.3, 0.4 from the old values.

    The clip (0.2) holds the second token at 0.4 of target 0.4125, and counts the larger square, which is its own 0.1;
    the fourth at −0.1 of target −0.2: its square 0.01 is larger than 0 and has no slope.
    """
    groups = hand_made()
    groups.prepare("ppo", **PLAIN)
    value = (groups.per_token["return"] + double([0.4, 0.1, -0.3, 0.0, -0.2])).requires_grad_()
    loss = groups.loss("ppo", value=value, **PLAIN)
    squares = [0.4**2, 0.1**2, 0.3**2, 0.1**2, (-0.1 - 0.30) ** 2]  # the last: held at −0.1, of target 0.3
    assert loss.item() == pytest.approx(sum(squares) / 2 / 5, abs=1e-12)
    near(torch.autograd.grad(loss, value)[0], [0.4 / 5, 0.1 / 5, -0.3 / 5, 0.0, 0.0])
    said = groups.metrics("ppo", value=value.detach(), **PLAIN)
    assert said == pytest.approx(
        {
            "critic/value": float(value.detach().mean()),
            "critic/return": 1.465625 / 5,
            "critic/squared_error": (0.16 + 0.01 + 0.09 + 0.04) / 5,
            "critic/clip_ratio": 3 / 5,
        }
    )
    unclipped = groups.loss("ppo", value=value, **{**PLAIN, "value_clip": None})
    assert unclipped.item() == pytest.approx((0.16 + 0.01 + 0.09 + 0.04) / 2 / 5, abs=1e-12)


def test_what_was_never_scored_has_no_advantage_and_no_target() -> None:
    groups = hand_made(reward=double([[1.0, math.nan]]))
    near(groups.prepare("ppo", **PLAIN), [-0.396875, 0.2125, 0.45, 0, 0])
    near(groups.per_token["return"], [0.103125, 0.4125, 0.85, math.nan, math.nan])
    value = double([0.0] * 5).requires_grad_()
    slope = torch.autograd.grad(groups.loss("ppo", value=value, **{**PLAIN, "value_clip": None}), value)[0]
    near(slope, [-0.103125 / 5, -0.4125 / 5, -0.85 / 5, 0, 0])


def test_a_perfect_critic_of_a_sure_reward_leaves_nothing_to_learn() -> None:
    """V = 1 before every token of what always earns 1: all advantages are 0, whitened too, and the returns are V."""
    groups = hand_made(reward=double([[1.0, 1.0]]), old_value=double([1.0] * 5))
    assert groups.prepare("ppo", kl_coef=0).eq(0).all()
    near(groups.per_token["return"], [1.0] * 5)


# The vectors, through the records.


def ragged(identity: str, *names: str) -> tuple[Tensor, list[int], list[Tensor]]:
    inputs = VECTORS[identity]["inputs"]
    mask = double(inputs["mask"]).bool()
    return mask, mask.sum(dim=1).tolist(), [double(inputs[name])[mask] for name in names]


def test_v26_advantages_and_returns() -> None:
    vector = VECTORS["V26"]
    mask, lengths, (logp, ref, values) = ragged("V26", "logp", "ref_logp", "values")
    groups = Groups(
        [lengths],
        logp,
        behavior_token_logp=logp,
        ref_token_logp=ref,
        old_value=values,
        reward=double([vector["inputs"]["score"]]),
    )
    parameters = vector["params"]
    expected = {name: double(column)[mask].tolist() for name, column in vector["expected"].items()}
    near(groups.prepare("ppo", **parameters, whiten=False), expected["advantages"])
    near(groups.per_token["return"], expected["returns"])
    near(groups.prepare("ppo", **parameters), expected["whitened_unbiased_var"])
    near(groups.per_token["return"], expected["returns"])


def test_v27_policy_loss() -> None:
    vector = VECTORS["V27"]
    _, lengths, (new, old, advantage) = ragged("V27", "new_logp", "old_logp", "advantages")
    groups = Groups([lengths], new, behavior_token_logp=old, advantage=advantage)
    for suffix, parameters in (("", {}), ("_dual_clip_3", {"dual_clip": 3.0})):
        loss = groups.loss("ppo", kl_coef=0, clip=vector["params"]["eps"], **parameters)
        assert loss.item() == pytest.approx(vector["expected"][f"loss_token_mean{suffix}"], rel=1e-9)


def test_v28_value_loss() -> None:
    vector = VECTORS["V28"]
    mask, lengths, (new, old, returns) = ragged("V28", "values_new", "values_old", "returns")
    groups = Groups([lengths], torch.zeros_like(new), old_value=old, **{"return": returns})
    new.requires_grad_()
    loss = groups.loss("ppo", value=new, value_clip=vector["params"]["cliprange_value"])
    assert loss.item() == pytest.approx(vector["expected"]["loss"], rel=1e-9)
    near(torch.autograd.grad(loss, new)[0], double(vector["expected"]["grad_values"])[mask].tolist())


# The record.


def test_policy_and_critic_ask_for_what_they_read() -> None:
    config = METHOD.config()
    assert METHOD.critic is not None
    assert METHOD.needed(config) == {"reward", "behavior_token_logp", "ref_token_logp", "advantage"}
    assert METHOD.critic.needed(config) == {"value", "old_value", "return"}
    assert METHOD.needed_of_round(config) == METHOD.needed(config) | {"old_value", "return"}
    assert METHOD.round_limit is not None
    assert METHOD.round_limit(config) is None
    assert METHOD.round_limit(METHOD.config(target_kl=0.02)) == ("kl/behavior_k3", 0.02)


def test_a_critic_must_be_one() -> None:
    def nothing(scored: Scored, config: MethodConfig, statistics: Statistics) -> tuple[Term, ...]:
        return ()

    with pytest.raises(ValueError, match="mine: a critic trains a scalar head, on what round_prepare makes"):
        Method(name="mine", config=MethodConfig, loss=nothing, critic=METHOD.critic)
    with pytest.raises(ValueError, match="mine: a critic trains a scalar head"):
        Method(
            name="mine", config=MethodConfig, loss=nothing, critic=resolve("rloo"), round_prepare=METHOD.round_prepare
        )
    with pytest.raises(ValueError, match="mine: round_limit is read where a critic is trained"):
        Method(name="mine", config=MethodConfig, loss=nothing, round_limit=METHOD.round_limit)


def test_the_clip_counts_the_larger_square() -> None:
    """V' = 0.5 near V = 0 is held at 0.2: of target 1 that is worse, of target 0 it is better."""
    found = ppo_value_loss(double([0.5, 0.5]), double([0.0, 0.0]), double([1.0, 0.0]), clip=0.2)
    near(found, [0.8**2 / 2, 0.5**2 / 2])
