"""The 57 reference vectors: every value and every gradient in float64, at a relative tolerance of 1e-9.

The vectors were computed with numpy from the equations, and their gradients confirmed by finite differences. Where a
vector pins what another implementation does differently, the test here is that this package does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayalign.functional.advantages import gae, grpo_advantage, kl_shaped_reward, rloo_advantage, whiten
from rayalign.functional.best_of_n import best_of_n_distribution
from rayalign.functional.kl import exact_kl, k1, k2, k3
from rayalign.functional.logprobs import log_max_p, log_sum_p2, token_logp
from rayalign.functional.masked import masked_mean, masked_sum
from rayalign.methods import (
    dpo_loss,
    dpo_rw_loss,
    exo_loss,
    exo_pref_targets,
    exo_reward_targets,
    grpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    mpo_loss,
    orpo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    reinforce_loss,
    reward_model_loss,
    robust_dpo_loss,
    sft_loss,
    simpo_loss,
    slic_loss,
    wpo_pair_weight,
    wpo_unpaired_weight,
    wpo_weight,
)
from rayalign.report.best_of_n import kl_bound

Vector = dict[str, Any]
FIXTURE = Path(__file__).parents[2] / "fixtures" / "vectors.json"
VECTORS: dict[str, Vector] = {vector["id"]: vector for vector in json.loads(FIXTURE.read_text())["vectors"]}


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(actual: Tensor | float, expected: object) -> None:
    actual, expected = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def columns(inputs: Vector, name: str) -> Tensor:
    """[B, 2] from ``name_w`` and ``name_l``."""
    return torch.stack([double(inputs[f"{name}_w"]), double(inputs[f"{name}_l"])], dim=1)


def check_pairs(vector: Vector, loss: Callable[[Tensor], Tensor], *, per_pair: bool = True) -> None:
    """``loss`` maps policy log-probabilities [B, 2] to [B]."""
    policy_logp = columns(vector["inputs"], "lp").requires_grad_()
    losses = loss(policy_logp)
    expected = vector["expected"]
    if per_pair:
        same(losses, expected["per_sample"])
    same(losses.mean(), expected["loss"])
    slope = gradient(losses.mean(), policy_logp)
    same(slope[:, 0], expected["grad_lp_w"])
    same(slope[:, 1], expected["grad_lp_l"])


# Pairs


def check_dpo(vector: Vector) -> None:
    ref_logp, params = columns(vector["inputs"], "ref"), vector["params"]
    function = robust_dpo_loss if params["robust"] else dpo_loss
    check_pairs(vector, lambda logp: function(logp, ref_logp, beta=params["beta"], label_smoothing=params["eps"]))


def check_dpo_stability(vector: Vector) -> None:
    margin = double(vector["inputs"]["margin"])
    policy_logp = torch.stack([margin, torch.zeros_like(margin)], dim=1).requires_grad_()
    losses = dpo_loss(policy_logp, torch.zeros_like(policy_logp), beta=vector["params"]["beta"])
    same(losses, vector["expected"]["per_sample"])
    same(gradient(losses.sum(), policy_logp)[:, 0], vector["expected"]["dloss_dmargin_per_sample"])


def check_ipo(vector: Vector) -> None:
    ref_logp, length = columns(vector["inputs"], "ref"), columns(vector["inputs"], "len")
    normalize = "mean" if vector["params"]["length_normalised"] else "sum"
    check_pairs(vector, lambda logp: ipo_loss(logp, ref_logp, length, tau=vector["params"]["tau"], normalize=normalize))


def check_hinge(vector: Vector) -> None:
    ref_logp = columns(vector["inputs"], "ref")
    check_pairs(vector, lambda logp: hinge_loss(logp, ref_logp, beta=vector["params"]["beta"]))


def check_slic(vector: Vector) -> None:
    params = vector["params"]
    target = double(vector["inputs"]["lp_reg"]).requires_grad_()

    def loss(policy_logp: Tensor) -> Tensor:
        return slic_loss(policy_logp, target, delta=params["delta"], reg_weight=params["lam"])

    check_pairs(vector, loss)
    slope = gradient(loss(columns(vector["inputs"], "lp")).mean(), target)
    same(slope, vector["expected"]["grad_lp_reg"])


def check_simpo(vector: Vector) -> None:
    length, params = columns(vector["inputs"], "len"), vector["params"]
    check_pairs(
        vector,
        lambda logp: simpo_loss(
            logp, length, beta=params["beta"], gamma=params["gamma"], label_smoothing=params["eps"]
        ),
    )


def check_orpo(vector: Vector) -> None:
    length = columns(vector["inputs"], "len")
    check_pairs(vector, lambda logp: orpo_loss(logp, length, weight=vector["params"]["lam"]))


def check_kto(vector: Vector) -> None:
    inputs, params = vector["inputs"], vector["params"]
    kl = (double(inputs["kl_policy_logps"]) - double(inputs["kl_ref_logps"])).mean().clamp(min=0)
    same(kl, vector["expected"]["z0"])
    desirable = torch.tensor([[True, False]]).expand(3, 2).flatten()

    def loss(policy_logp: Tensor) -> Tensor:
        return kto_loss(
            policy_logp.flatten(),
            columns(inputs, "ref").flatten(),
            desirable,
            kl,
            beta=params["beta"],
            desirable_weight=params["lambda_D"],
            undesirable_weight=params["lambda_U"],
        )

    check_pairs(vector, loss, per_pair=False)


def check_reward_model(vector: Vector) -> None:
    inputs, expected = vector["inputs"], vector["expected"]
    reward = torch.stack([double(inputs["reward_chosen"]), double(inputs["reward_rejected"])], dim=1).requires_grad_()
    plain = reward_model_loss(reward).mean()
    same(plain, expected["loss"])
    same(gradient(plain, reward)[:, 0], expected["grad_chosen"])
    same(gradient(plain, reward)[:, 1], expected["grad_rejected"])
    shaped = reward_model_loss(reward, margin=double(inputs["margin"]), center=vector["params"]["center_coef"]).mean()
    same(shaped, expected["loss_margin_centered"])
    same(gradient(shaped, reward)[:, 0], expected["grad_chosen_margin_centered"])
    same((reward[:, 0] > reward[:, 1]).double().mean(), expected["accuracy"])


# EXO and DPO-rw


def check_exo_pref(vector: Vector) -> None:
    params, ref_logp = vector["params"], columns(vector["inputs"], "ref")
    targets = exo_pref_targets(math.exp(params["log_p_l"]))
    check_pairs(vector, lambda logp: exo_loss(logp, ref_logp, targets.expand(3, 2), beta_pi=params["beta_pi"]))


def check_exo_author_code(vector: Vector) -> None:
    """The authors' label (0, −10) is not normalised: the gradient is ours, the value lies log(1 + e⁻¹⁰) away."""
    params, inputs, expected = vector["params"], vector["inputs"], vector["expected"]
    targets = double([params["log_p_w"], params["log_p_l"]]).expand(3, 2)
    policy_logp = columns(inputs, "lp").requires_grad_()
    losses = exo_loss(policy_logp, columns(inputs, "ref"), targets, beta_pi=params["beta_pi"])
    same(losses, double(expected["per_sample"]) + math.log1p(math.exp(-10)))
    slope = gradient(losses.mean(), policy_logp)
    same(slope[:, 0], expected["grad_lp_w"])
    same(slope[:, 1], expected["grad_lp_l"])


def check_groups(vector: Vector) -> None:
    groups, params, expected = vector["inputs"]["groups"], vector["params"], vector["expected"]
    policy_logp, ref_logp, reward = (double([group[name] for group in groups]) for name in ("lp", "ref", "reward"))
    policy_logp.requires_grad_()
    if vector["method"] == "dpo_rw":
        losses = dpo_rw_loss(policy_logp, ref_logp, reward, beta_pi=params["beta_pi"], beta_r=params["beta_r"])
    else:
        targets = exo_reward_targets(reward, params["beta_r"])
        losses = exo_loss(policy_logp, ref_logp, targets, beta_pi=params["beta_pi"])
    same(losses, expected["per_group"])
    same(losses.mean(), expected["loss"])
    same(gradient(losses.mean(), policy_logp), expected["grad_lp"])


def check_pref_is_reward_at_two(vector: Vector) -> None:
    params, inputs = vector["params"], VECTORS["V01"]["inputs"]
    pair = (columns(inputs, "lp")[:1], columns(inputs, "ref")[:1])
    from_reward = exo_reward_targets(double([[vector["inputs"]["reward_gap"], 0.0]]), params["beta_r"])
    from_label = exo_pref_targets(params["eps"])[None]
    same(exo_loss(*pair, from_reward, beta_pi=params["beta_pi"])[0], vector["expected"]["exo_rw"])
    same(exo_loss(*pair, from_label, beta_pi=params["beta_pi"])[0], vector["expected"]["exo_pref"])


def check_gradient_profiles(vector: Vector) -> None:
    h, eps = double(vector["inputs"]["h"]), vector["params"]["eps"]
    policy_logp = torch.stack([h, torch.zeros_like(h)], dim=1).requires_grad_()
    zero = torch.zeros_like(policy_logp)
    losses = {
        "exo": exo_loss(policy_logp, zero, exo_pref_targets(eps).expand(len(h), 2), beta_pi=1.0),
        "dpo": dpo_loss(policy_logp, zero, beta=1.0),
        "cdpo": dpo_loss(policy_logp, zero, beta=1.0, label_smoothing=eps),
        "mpo": mpo_loss(policy_logp, tau=1.0, objective="prob"),
    }
    for name, loss in losses.items():
        same(gradient(loss.sum(), policy_logp)[:, 0], vector["expected"][f"{name}_dLdh"])


def check_exo_behavior(vector: Vector) -> None:
    inputs, params, expected = vector["inputs"], vector["params"], vector["expected"]
    policy_logp, ref_logp, behavior_logp, reward = (double([inputs[name]]) for name in ("lp", "ref", "mu", "reward"))
    policy_logp.requires_grad_()
    targets = exo_reward_targets(reward, params["beta_r"])
    loss = partial(exo_loss, policy_logp, ref_logp, targets, beta_pi=params["beta_pi"])
    corrected = loss(behavior_logp=behavior_logp)
    same(corrected[0], expected["loss"])
    same(gradient(corrected.sum(), policy_logp)[0], expected["grad_lp"])
    on_policy = gradient(loss(behavior_logp=policy_logp.detach()).sum(), policy_logp)[0]
    same(on_policy, expected["grad_lp_onpolicy_mu_equals_pi"])
    same(on_policy, expected["reinforce_group_mean_grad"])
    shaped = targets - (policy_logp - ref_logp).detach()
    reinforce = reinforce_loss(policy_logp[0], (shaped - shaped.mean())[0]).mean()
    same(on_policy, gradient(reinforce, policy_logp)[0])


# WPO


def wpo_inputs(pairs: list[Vector]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits of each candidate (leaves), all targets, and candidate_of."""
    sides = [(pair[f"logits_{side}"], pair[f"y_{side}"]) for pair in pairs for side in "wl"]
    logits = [double(values).requires_grad_() for values, _ in sides]
    target_ids = torch.cat([torch.tensor(targets) for _, targets in sides])
    candidate_of = torch.cat([torch.full((len(targets),), c) for c, (_, targets) in enumerate(sides)])
    return logits, target_ids, candidate_of


def weights_of(logits: Tensor, target_ids: Tensor, candidate_of: Tensor, alignment: str) -> Tensor:
    count = int(candidate_of.max()) + 1
    weight = wpo_weight(
        token_logp(logits, target_ids),
        candidate_of,
        num_candidates=count,
        alignment=alignment,
        log_sum_p2=log_sum_p2(logits) if alignment == "sampled" else None,
        log_max_p=log_max_p(logits) if alignment == "greedy" else None,
    )
    return weight.view(-1, 2)


def check_wpo(vector: Vector) -> None:
    inputs, params, expected = vector["inputs"], vector["params"], vector["expected"]
    leaves, target_ids, candidate_of = wpo_inputs(inputs["pairs"])
    logits = torch.cat(leaves)
    weight = weights_of(logits, target_ids, candidate_of, params["alignment"])
    same(weight[:, 0].log(), expected["log_w_chosen"])
    same(weight[:, 1].log(), expected["log_w_rejected"])
    clamp = "product" if params["clamp_product_at_1"] else "none"
    which = {"both": "both", "w": "chosen", "l": "rejected"}[params["which"]]
    pair = wpo_pair_weight(weight, clamp=clamp, which=which)
    same(pair, expected["weight"])
    summed = torch.zeros(6, dtype=torch.float64).index_add(0, candidate_of, token_logp(logits, target_ids))
    policy_logp, ref_logp = summed.view(3, 2), columns(inputs, "ref")
    same((policy_logp - ref_logp)[:, 0] - (policy_logp - ref_logp)[:, 1], expected["margin"])
    losses = pair * dpo_loss(policy_logp, ref_logp, beta=params["beta"])
    same(losses, expected["per_sample"])
    same(losses.mean(), expected["loss"])
    slopes = torch.autograd.grad(losses.mean(), leaves)
    for i, slope in enumerate(expected["grad_logits"]):
        same(slopes[2 * i], slope["w"])
        same(slopes[2 * i + 1], slope["l"])


def check_wpo_last_token(vector: Vector) -> None:
    leaves, target_ids, candidate_of = wpo_inputs(vector["inputs"]["pairs"])
    weight = weights_of(torch.cat(leaves), target_ids, candidate_of, "sampled")
    pair = wpo_pair_weight(weight, clamp="product")
    same(pair, vector["expected"]["weight_correct"])
    without_last = double(vector["expected"]["weight_buggy"])
    assert (pair[:2] - without_last[:2]).abs().min() > 1e-3  # in the third pair the clamp hides the difference


def check_wpo_unpaired(vector: Vector) -> None:
    inputs, expected = vector["inputs"], vector["expected"]
    weight = torch.cat([double(inputs["log_w_desirable"]), double(inputs["log_w_undesirable"])]).exp()
    desirable = torch.arange(6) < 3
    share = wpo_unpaired_weight(weight, desirable, desirable_sum=weight[:3].sum(), undesirable_sum=weight[3:].sum())
    same(share[:3], expected["weight_desirable"])
    same(share[3:], expected["weight_undesirable"])
    same(share[:3].sum(), 1.0)
    same(share[3:].sum(), 1.0)


def check_wpo_is_on_policy_dpo(vector: Vector) -> None:
    """With exact weights π(y) on every distinct pair, WPO's gradient is that of DPO on the policy's own pairs."""
    inputs, expected, beta = vector["inputs"], vector["expected"], vector["params"]["beta"]
    logits = double(inputs["logits"]).requires_grad_()
    reward = inputs["reward"]
    pairs = torch.tensor([(i, j) for i in range(5) for j in range(5) if reward[i] > reward[j]])
    logp = torch.log_softmax(logits, dim=0)
    losses = dpo_loss(logp[pairs], double(inputs["ref"]).log()[pairs], beta=beta)
    weight = wpo_pair_weight(logp.exp()[pairs].detach(), clamp="none")
    weighted, uniform = gradient((losses * weight).mean(), logits), gradient(losses.mean(), logits)
    on_policy = gradient((losses * 2 * weight).sum(), logits)  # (y1, y2) and (y2, y1) are labelled alike
    same(weighted, expected["grad_wpo_exact_weights"])
    same(uniform, expected["grad_offpolicy_dpo_uniform_pairs"])
    same(on_policy, expected["grad_onpolicy_dpo"])
    same(torch.cosine_similarity(weighted, on_policy, dim=0), expected["cos_wpo_onpolicy"])
    same(torch.cosine_similarity(uniform, on_policy, dim=0), expected["cos_off_onpolicy"])


# MPO


def check_mpo(vector: Vector) -> None:
    inputs, params, expected = vector["inputs"], vector["params"], vector["expected"]
    loss = partial(
        mpo_loss,
        tau=params["tau"],
        objective="prob",
        length=columns(inputs, "len") if params["length_normalised"] else None,
        ref_logp=columns(inputs, "ref") if params["use_reference"] else None,
    )
    check_pairs(vector, loss)
    policy_logp = columns(inputs, "lp").requires_grad_()
    log_sigmoid = -mpo_loss(policy_logp, **{**loss.keywords, "objective": "logprob"})
    weight = -loss(policy_logp).detach()
    same(weight, expected["is_weight"])
    same(-weight * log_sigmoid, expected["surrogate_per_sample"])
    surrogate = gradient((-weight * log_sigmoid).mean(), policy_logp)
    same(surrogate, gradient(loss(policy_logp).mean(), policy_logp))
    same(torch.logit(weight), expected["h"])


def check_mpo_full(vector: Vector) -> None:
    inputs, params, expected = vector["inputs"], vector["params"], vector["expected"]
    policy_logp = columns(inputs, "lp").requires_grad_()
    total = mpo_loss(policy_logp, tau=params["tau"], objective="prob").mean()
    streams = {}
    for name, data, weight in (("reference", "reference_data", "beta"), ("pretrain", "pretrain_data", "gamma")):
        logp = streams[name] = double(inputs[f"lp_{data}"]).requires_grad_()
        count = len(logp) if params["reg_reduction"] == "seq_sum" else sum(inputs[f"len_{data}"])
        total = total + params[weight] * sft_loss(logp).sum() / count
    same(total, expected["loss"])
    slope = gradient(total, policy_logp)
    same(slope[:, 0], expected["grad_lp_w"])
    same(slope[:, 1], expected["grad_lp_l"])
    for name, logp in streams.items():
        same(gradient(total, logp), expected[f"grad_lp_{name}"])


def check_mpo_fixed_point(vector: Vector) -> None:
    inputs, params, expected = vector["inputs"], vector["params"], vector["expected"]
    reference = double(inputs["pi_ref"])
    logits = double(expected["pi"]).log().requires_grad_()
    logp = torch.log_softmax(logits, dim=0)
    preference = mpo_loss(logp[torch.tensor(inputs["pairs_w_l"])], tau=params["tau"], objective="prob").mean()
    total = preference + params["beta"] * (reference * sft_loss(logp)).sum()
    torch.testing.assert_close(gradient(total, logits), double(expected["grad_at_fixed_point"]), rtol=0, atol=1e-10)
    same(exact_kl(reference.log()[None], logits[None])[0], expected["forward_kl_ref_pi"])


def check_optimal_margins(vector: Vector) -> None:
    """At the expected margin the gradient vanishes; without a finite optimum it points outwards however far out."""
    beta, eps, expected = vector["params"]["beta"], vector["params"]["eps"], vector["expected"]

    def slope(loss: Callable[[Tensor], Tensor], margin: float) -> float:
        policy_logp = double([[margin, 0.0]]).requires_grad_()
        return float(gradient(loss(policy_logp).sum(), policy_logp)[0, 0])

    zero, ones = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    targets = exo_pref_targets(eps)[None]
    finite = {
        "cdpo": lambda logp: dpo_loss(logp, zero, beta=beta, label_smoothing=eps),
        "exo_pref": lambda logp: exo_loss(logp, zero, targets, beta_pi=beta),
        "ipo_sum": lambda logp: ipo_loss(logp, zero, ones, tau=beta, normalize="sum"),
    }
    for name, loss in finite.items():
        optimum = expected[name]
        assert abs(slope(loss, optimum)) < 1e-12
        assert slope(loss, optimum - 1) < 0 < slope(loss, optimum + 1)
    endless = {
        "dpo": lambda logp: dpo_loss(logp, zero, beta=beta),
        "mpo_no_reg": lambda logp: mpo_loss(logp, tau=beta, objective="prob"),
    }
    for name, loss in endless.items():
        assert expected[name] == "inf"
        assert slope(loss, 300.0) < 0
    assert expected["slic_hinge"] == f">= 1/beta = {1 / beta:g}"
    assert slope(lambda logp: hinge_loss(logp, zero, beta=beta), 1 / beta - 1e-6) == -beta
    assert slope(lambda logp: hinge_loss(logp, zero, beta=beta), 1 / beta + 1e-6) == 0


# KL, PPO, RLOO, GRPO


def check_kl_estimators(vector: Vector) -> None:
    logp, ref_logp = double(vector["inputs"]["logp"]).requires_grad_(), double(vector["inputs"]["ref_logp"])
    for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3)):
        values = estimator(logp, ref_logp)
        same(values, vector["expected"][name])
        same(gradient(values.sum(), logp), vector["expected"][f"d{name}"])


def ragged(inputs: Vector, *names: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The mask [C, T], candidate_of [N], and each named padded array as [N]."""
    mask = double(inputs["mask"]).bool()
    return mask, mask.nonzero()[:, 0], [double(inputs[name])[mask] for name in names]


def padded(values: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values)


def check_gae(vector: Vector) -> None:
    inputs, params, expected = vector["inputs"], vector["params"], vector["expected"]
    mask, candidate_of, (logp, ref_logp, value) = ragged(inputs, "logp", "ref_logp", "values")
    reward = kl_shaped_reward(double(inputs["score"]), logp, ref_logp, candidate_of, kl_coef=params["kl_coef"])
    same(padded(reward, mask), expected["rewards"])
    advantage = gae(reward, value, candidate_of, gamma=params["gamma"], gae_lambda=params["lam"])
    same(padded(advantage, mask), expected["advantages"])
    same(padded(advantage + value, mask), expected["returns"])
    same(padded(whiten(advantage), mask), expected["whitened_unbiased_var"])
    same(padded(whiten(advantage, variance="population"), mask), expected["whitened_population_var"])


def reduced(per_token: Tensor, mask: Tensor) -> dict[str, Tensor]:
    values = padded(per_token, mask)
    return {
        "token_mean": masked_mean(values, mask),
        "seq_mean_token_mean": masked_mean(values, mask, dim=1).mean(),
        "seq_mean_token_sum": masked_sum(values, mask, dim=1).mean(),
        "dr_grpo": masked_sum(values, mask) / mask.numel(),
    }


def check_ppo(vector: Vector) -> None:
    inputs, params, expected = vector["inputs"], vector["params"], vector["expected"]
    mask, _, (new, old, advantage) = ragged(inputs, "new_logp", "old_logp", "advantages")
    new.requires_grad_()
    losses = ppo_policy_loss(new, old, advantage, clip=params["eps"])
    same((new - old).exp(), double(expected["ratio"])[mask])
    same(padded(losses, mask), expected["per_token"])
    for name, value in reduced(losses, mask).items():
        same(value, expected[f"loss_{name}"])
    same(padded(gradient(losses.mean(), new), mask), expected["grad_logp_token_mean"])
    dual = ppo_policy_loss(new, old, advantage, clip=params["eps"], dual_clip=params["dual_clip"])
    same(dual.mean(), expected["loss_token_mean_dual_clip_3"])


def check_value_loss(vector: Vector) -> None:
    mask, _, (value, old_value, returns) = ragged(vector["inputs"], "values_new", "values_old", "returns")
    value.requires_grad_()
    loss = ppo_value_loss(value, old_value, returns, clip=vector["params"]["cliprange_value"]).mean()
    same(loss, vector["expected"]["loss"])
    same(padded(gradient(loss, value), mask), vector["expected"]["grad_values"])


def check_group_advantages(vector: Vector) -> None:
    reward, expected = double(vector["inputs"]["rewards"]), vector["expected"]
    same(rloo_advantage(reward), expected["rloo"])
    same(rloo_advantage(reward), expected["rloo_identity_K_over_Km1"])
    same(grpo_advantage(reward, epsilon=1e-4), expected["grpo_std_eps_1e4"])
    same(grpo_advantage(reward, epsilon=1e-6), expected["grpo_std_eps_1e6"])
    same(grpo_advantage(reward, divide_by_std=False), expected["dr_grpo"])


def check_rloo(vector: Vector) -> None:
    inputs, params, expected = vector["inputs"], vector["params"], vector["expected"]
    logp, behavior_logp, ref_logp = (double(inputs[name]) for name in ("lp", "lp_old", "lp_ref"))
    logp.requires_grad_()
    reward = double(inputs["reward"]) - params["beta_kl"] * k1(behavior_logp, ref_logp)
    same(reward, expected["reward_with_kl"])
    advantage = rloo_advantage(reward[None])[0]
    same(advantage, expected["advantages"])
    same((logp - behavior_logp).exp(), expected["ratio"])
    clipped = ppo_policy_loss(logp, behavior_logp, advantage, clip=params["eps"]).mean()
    same(clipped, expected["loss"])
    same(gradient(clipped, logp), expected["grad_lp"])
    plain = reinforce_loss(logp, advantage).mean()
    same(plain, expected["reinforce_loss_no_ratio"])
    same(gradient(plain, logp), expected["reinforce_grad"])


def check_grpo(vector: Vector) -> None:
    inputs, params, expected = vector["inputs"], vector["params"], vector["expected"]
    mask, candidate_of, (new, old, ref) = ragged(inputs, "new_logp", "old_logp", "ref_logp")
    new.requires_grad_()
    advantage = double(inputs["advantages"])[candidate_of]
    losses = grpo_loss(new, old, ref, advantage, clip=params["eps"], kl_coef=params["beta_kl"])
    totals = reduced(losses, mask)
    for name, value in totals.items():
        same(value, expected[f"loss_{name}"])
    slope = gradient(totals["seq_mean_token_mean"], new)
    same(padded(slope, mask), expected["grad_logp_seq_mean_token_mean"])


def check_sft(vector: Vector) -> None:
    sequences = [sft_loss(double(values)) for values in vector["inputs"]["token_logps"]]
    same(torch.cat(sequences).mean(), vector["expected"]["loss_token_mean"])
    same(torch.stack([tokens.mean() for tokens in sequences]).mean(), vector["expected"]["loss_seq_mean_token_mean"])
    same(torch.stack([tokens.sum() for tokens in sequences]).mean(), vector["expected"]["loss_seq_sum"])


# Exact distributions


def check_best_of_n(vector: Vector) -> None:
    probability, reward = double(vector["inputs"]["pi"]), double(vector["inputs"]["reward"])
    n, expected = vector["params"]["n"], vector["expected"]
    best = best_of_n_distribution(probability, reward, n=n)
    same(best, expected["pi_bon"])
    same(probability @ reward, expected["expected_reward_base"])
    same(best @ reward, expected["expected_reward_bon"])
    same(exact_kl(best.log()[None], probability.log()[None])[0], expected["kl_exact"])
    same(kl_bound(n), expected["kl_bound"])


def regularised(vector: Vector) -> tuple[Tensor, Tensor, Tensor, float]:
    """Policy logits (a leaf), log reference, reward and the strength of the KL."""
    inputs, params = vector["inputs"], vector["params"]
    strength = params.get("beta", params.get("beta_r"))
    return double(inputs["logits"]).requires_grad_(), double(inputs["ref"]).log(), double(inputs["reward"]), strength


def check_optimum(vector: Vector) -> None:
    logits, log_ref, reward, beta = regularised(vector)
    expected = vector["expected"]
    tilted = log_ref + reward / beta
    log_z = torch.logsumexp(tilted, dim=0)
    to_optimum = exact_kl(logits[None], tilted[None])[0]
    same(tilted.softmax(0), expected["pi_star"])
    same(log_z, expected["logZ"])
    same(to_optimum, expected["reverse_kl_to_star"])
    same(exact_kl(tilted[None], logits[None])[0], expected["forward_kl_to_star"])
    objective = logits.softmax(0) @ reward - beta * exact_kl(logits[None], log_ref[None])[0]
    same(objective, expected["J"])
    same(objective, beta * log_z - beta * to_optimum)
    same(gradient(objective, logits), expected["grad_J_wrt_logits"])


def check_exo_limit(vector: Vector) -> None:
    """All outcomes as candidates, each once (log μ = 0): the population of infinitely many draws from the reference."""
    logits, log_ref, reward, beta_r = regularised(vector)
    expected = vector["expected"]
    logp = torch.log_softmax(logits, dim=0)[None]
    targets = exo_reward_targets(reward[None], beta_r)
    loss = exo_loss(logp, log_ref[None], targets, beta_pi=1.0, behavior_logp=torch.zeros(1, 5, dtype=torch.float64))
    same(gradient(loss.sum(), logits), expected["grad_exo_inf_wrt_logits"])
    same(gradient(loss.sum(), logits), expected["minus_grad_J_over_beta"])
    # DPO-rw knows no behavior policy: the reference's mass goes into its rewards and log-ratios by hand.
    zero = torch.zeros_like(log_ref)[None]
    forward = dpo_rw_loss(logp, zero, (reward + beta_r * log_ref)[None], beta_pi=1.0, beta_r=beta_r)
    same(gradient(forward.sum(), logits), expected["grad_forward_kl"])


CHECKS: dict[str, Callable[[Vector], None]] = {
    **dict.fromkeys(["V01", "V02", "V03"], check_dpo),
    "V04": check_dpo_stability,
    **dict.fromkeys(["V05", "V06"], check_ipo),
    **dict.fromkeys(["V07a", "V07b"], check_hinge),
    "V08": check_slic,
    **dict.fromkeys(["V09a", "V09b", "V09c"], check_simpo),
    "V10": check_orpo,
    "V11": check_kto,
    **dict.fromkeys(["V12a", "V12b", "V12c"], check_exo_pref),
    **dict.fromkeys(["V13a", "V13b"], check_exo_author_code),
    **dict.fromkeys(["V14a", "V14b", "V14c", "V15", "V16a", "V16b"], check_groups),
    "V17": check_pref_is_reward_at_two,
    "V18": check_gradient_profiles,
    **dict.fromkeys(["V19a", "V19b", "V19c", "V19d", "V20a", "V20b"], check_wpo),
    "V21": check_wpo_last_token,
    "V22": check_wpo_unpaired,
    **dict.fromkeys(["V23a", "V23b", "V23c", "V23d"], check_mpo),
    **dict.fromkeys(["V24a", "V24b"], check_mpo_full),
    "V25": check_kl_estimators,
    "V26": check_gae,
    "V27": check_ppo,
    "V28": check_value_loss,
    "V29": check_group_advantages,
    "V30": check_rloo,
    "V31": check_grpo,
    "V32": check_reward_model,
    "V33": check_sft,
    "V34": check_best_of_n,
    "V35": check_optimum,
    "V36": check_exo_limit,
    "V37": check_wpo_is_on_policy_dpo,
    "V38": check_mpo_fixed_point,
    "V39": check_optimal_margins,
    "V40": check_exo_behavior,
}


@pytest.mark.parametrize("vector_id", sorted(VECTORS))
def test_vector(vector_id: str) -> None:
    CHECKS[vector_id](VECTORS[vector_id])


def test_every_vector_has_a_check() -> None:
    assert len(VECTORS) == 57
    assert set(CHECKS) == set(VECTORS)
