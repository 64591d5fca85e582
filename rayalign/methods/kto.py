"""KTO: unpaired examples, each desirable or undesirable, against a common estimate of the KL to the reference.

Ethayarajh et al. 2024, arXiv:2402.01306. Candidate 0 is the example; candidate 1 is another prompt's completion, on
which the KL is estimated. The mismatched completions are the examples' own, desirable and undesirable, joined to other
prompts (:mod:`rayalign.data.unpair`). The estimate is taken over the whole step: micro-batches and workers do not
change it. An example without a label counts nowhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rayalign.functional.masked import masked_sum
from rayalign.methods._fields import NonNegative, Positive
from rayalign.methods._pairs import MetricSums, mean_over
from rayalign.methods.method import Method, MethodConfig, Statistics, Term
from rayalign.types import Scored


class KTOConfig(MethodConfig):
    beta: Positive = 0.1
    """Scale of the implicit reward β · log(π/π_ref)."""
    desirable_weight: NonNegative = 1.0
    """λ_D"""
    undesirable_weight: NonNegative = 1.0
    """λ_U"""


def kto_loss(
    policy_logp: Float[Tensor, " M"],
    ref_logp: Float[Tensor, " M"],
    desirable: Bool[Tensor, " M"],
    kl: Float[Tensor, ""],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Float[Tensor, " M"]:
    """λ_D σ(β (z₀ − Δ)) for a desirable example, λ_U σ(β (Δ − z₀)) for an undesirable one.

    Δ = log(π/π_ref) and z₀ = ``kl`` ≥ 0, a constant. The paper's λ · (1 − σ(u)) is λ σ(−u).
    """
    surplus = beta * (policy_logp - ref_logp - kl.detach())
    return torch.where(
        desirable, desirable_weight * torch.sigmoid(-surplus), undesirable_weight * torch.sigmoid(surplus)
    )


def is_desirable(scored: Scored) -> Bool[Tensor, " B"]:
    """Whether each group's example is desirable; False where there is none, or it has no label."""
    return example_mask(scored) & (scored.candidate("label")[:, 0] > 0.5)


def example_mask(scored: Scored) -> Bool[Tensor, " B"]:
    """True where the example itself is real and has a label."""
    return scored.batch.candidate_mask[:, 0] & ~scored.candidate("label")[:, 0].isnan()


def step_prepare(scored: Scored, config: KTOConfig, statistics: Statistics) -> dict[str, Tensor]:
    log_ratio = scored.scores.logp.detach() - scored.candidate("ref_logp")
    examples = example_mask(scored)
    mismatched = (scored.batch.candidate_mask & examples[:, None])[:, 1:]
    return {
        "kto/examples": examples.sum(),
        "kto/log_ratio": masked_sum(log_ratio[:, 1:], mismatched),
        "kto/mismatched": mismatched.sum(),
    }


def estimated_kl(statistics: Statistics) -> Float[Tensor, ""]:
    """z₀: the mean of log(π/π_ref) over the step's mismatched completions, at least 0."""
    return (statistics.sums["kto/log_ratio"] / statistics.sums["kto/mismatched"].clamp(min=1)).clamp(min=0)


def loss(scored: Scored, config: KTOConfig, statistics: Statistics) -> tuple[Term, ...]:
    mask = example_mask(scored)
    policy_logp = torch.where(mask, scored.scores.logp[:, 0], 0)
    per_example = kto_loss(
        policy_logp,
        torch.where(mask, scored.candidate("ref_logp")[:, 0], 0),
        is_desirable(scored),
        estimated_kl(statistics).to(policy_logp),
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    labelled = statistics.sums["kto/examples"]
    return (Term(name="kto", per_item=per_example, mask=mask, over="groups", count=labelled),)


def metrics(scored: Scored, config: KTOConfig, statistics: Statistics) -> MetricSums:
    logp, desirable = scored.scores.logp[:, 0], is_desirable(scored)
    reward = config.beta * (logp - scored.candidate("ref_logp")[:, 0])
    undesirable = example_mask(scored) & ~desirable
    kl = estimated_kl(statistics)
    return {
        "rewards/chosen": mean_over(reward, desirable),
        "rewards/rejected": mean_over(reward, undesirable),
        "logps/chosen": mean_over(logp, desirable),
        "logps/rejected": mean_over(logp, undesirable),
        "kl": (kl, torch.ones_like(kl)),
    }


METHOD = Method(
    name="kto",
    config=KTOConfig,
    loss=loss,
    needs=frozenset({"ref_logp", "label", "mismatched"}),
    candidates="one",
    paper="Ethayarajh et al. 2024, arXiv:2402.01306",
    step_prepare=step_prepare,
    metrics=metrics,
)
