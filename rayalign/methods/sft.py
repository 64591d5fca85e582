"""Supervised fine-tuning: the likelihood of the responses. As an auxiliary stream it is a forward-KL regulariser:
on samples of a distribution q, E_q[−log π] is KL(q‖π) up to a constant.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from rayalign.methods.method import Method, MethodConfig, Statistics, Term
from rayalign.types import Scored


class SFTConfig(MethodConfig):
    reduction: Literal["token", "sequence"] = "token"
    """``token``: mean over all response tokens of the step. ``sequence``: mean over sequences of the summed NLL."""


def sft_loss(token_logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """−log π, per token or per sequence, in nats."""
    return -token_logp


def loss(scored: Scored, config: SFTConfig, statistics: Statistics) -> tuple[Term, ...]:
    real = scored.batch.candidate_mask.flatten()
    if config.reduction == "sequence":
        per_sequence = sft_loss(scored.scores.logp.flatten())
        return (Term(name="sft", per_item=per_sequence, mask=real, over="sequences"),)
    per_token = sft_loss(scored.scores.token_logp)
    return (Term(name="sft", per_item=per_token, mask=real[scored.batch.candidate_of], over="tokens"),)


METHOD = Method(
    name="sft",
    config=SFTConfig,
    loss=loss,
    candidates="one",
    paper="Ouyang et al. 2022, arXiv:2203.02155",
)
