"""DPO on scored groups: the forward KL from the rewards' softmax to the policy's, the counterpart of EXO.

Ji et al. 2024, arXiv:2402.00856 ("DPO-rw"). With two candidates and a label of certainty this is DPO.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from rayalign.functional.masked import masked_log_softmax
from rayalign.methods._fields import Positive
from rayalign.methods._groups import group_metrics, rewarded
from rayalign.methods._pairs import MetricSums
from rayalign.methods.method import Method, MethodConfig, Statistics, Term
from rayalign.types import Scored


class DPORewardConfig(MethodConfig):
    beta_pi: Positive = 0.5
    """Scale of log(π/π_ref)."""
    beta_r: Positive = 0.5
    """Divides the rewards."""


def dpo_rw_loss(
    policy_logp: Float[Tensor, "B K"],
    ref_logp: Float[Tensor, "B K"],
    reward: Float[Tensor, "B K"],
    *,
    beta_pi: float,
    beta_r: float,
    candidate_mask: Bool[Tensor, "B K"] | None = None,
) -> Float[Tensor, " B"]:
    """−Σ_k q_k log p_k, where p = softmax(β_π log(π/π_ref)) and q = softmax(r / β_r)."""
    log_p = masked_log_softmax(beta_pi * (policy_logp - ref_logp), candidate_mask)
    log_q = masked_log_softmax(reward / beta_r, candidate_mask)
    return -(log_q.exp() * log_p).sum(dim=1)


def loss(scored: Scored, config: DPORewardConfig, statistics: Statistics) -> tuple[Term, ...]:
    known = rewarded(scored)
    per_group = dpo_rw_loss(
        scored.scores.logp,
        scored.candidate("ref_logp"),
        scored.candidate("reward"),
        beta_pi=config.beta_pi,
        beta_r=config.beta_r,
        candidate_mask=known,
    )
    return (Term(name="dpo_rw", per_item=per_group, mask=known.any(dim=1), over="groups"),)


def metrics(scored: Scored, config: DPORewardConfig, statistics: Statistics) -> MetricSums:
    return group_metrics(scored)


METHOD = Method(
    name="dpo_rw",
    config=DPORewardConfig,
    loss=loss,
    needs=frozenset({"ref_logp", "reward"}),
    candidates="group",
    paper="Ji et al. 2024, arXiv:2402.00856",
    metrics=metrics,
)
