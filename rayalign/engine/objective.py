"""A method on a stream: from one packed micro-batch to one number with a gradient. The only place that divides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rayalign.data.micro_batches import StepCounts
from rayalign.errors import UserError
from rayalign.methods.method import Method, MethodConfig, Statistics, Term
from rayalign.types import PackedBatch, Scored

MAIN_STREAM = "train"
"""The stream of the method under test; others are auxiliary."""

FORWARD_NEEDS = frozenset({"log_sum_p2", "log_max_p", "plain_token_logp", "entropy", "value", "score"})
"""Needs that the model's forward answers; every other need is a column of the data."""

REFERENCE_NEEDS = frozenset({"ref_logp", "ref_token_logp"})

OPTIONAL_COLUMNS = frozenset({"behavior_logp", "margin", "soft_label"})
"""Columns [B, K] that data may lack: a method reads NaN there and takes its default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """``weight`` · ``method`` with ``config`` on the groups of ``stream``."""

    stream: str
    method: Method
    config: MethodConfig
    weight: float = 1.0

    def score(self, policy: nn.Module, batch: PackedBatch) -> Scored:
        """One forward of the policy; its gradient is the caller's to switch off."""
        needs = frozenset(self.method.needed(self.config))
        scores = policy(batch, needs=needs & FORWARD_NEEDS, logit_temperature=self.config.logit_temperature)
        return Scored(batch=with_missing_columns(batch, needs), scores=scores, needs=needs)

    def loss(self, scored: Scored, statistics: Statistics, counts: StepCounts) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the step's loss (float64), and of each of its terms, by name."""
        shares: dict[str, Tensor] = {}
        terms = self.method.loss(scored, self.config, statistics)
        if not isinstance(terms, tuple | list) or not all(isinstance(term, Term) for term in terms):
            raise UserError(f"method {self.method.name!r}: its loss returned {type(terms).__name__}, no tuple of Term")
        for term in terms:
            share = self.weight * term.weight * masked_total(term) / denominator(term, counts)
            shares[term.name] = shares[term.name] + share if term.name in shares else share
        return torch.stack(list(shares.values())).sum(), {name: share.detach() for name, share in shares.items()}


def with_missing_columns(batch: PackedBatch, needs: frozenset[str]) -> PackedBatch:
    """The batch with NaN in every optional column that is needed and that no group carries."""
    absent = (needs & OPTIONAL_COLUMNS) - batch.per_candidate.keys()
    if not absent:
        return batch
    missing = torch.full(batch.candidate_mask.shape, torch.nan, device=batch.candidate_mask.device)
    return replace(batch, per_candidate={**batch.per_candidate, **dict.fromkeys(absent, missing)})


def masked_total(term: Term) -> Tensor:
    """Σ per_item over the mask; a masked value may be NaN and reaches neither the sum nor the gradient."""
    return torch.where(term.mask, term.per_item, torch.zeros_like(term.per_item)).double().sum()


def denominator(term: Term, counts: StepCounts) -> Tensor | float:
    """The step's global count that a term is divided by; at least 1, so that a step without such items adds 0."""
    if term.count is not None:
        return term.count.double().clamp(min=1)
    return 1.0 if term.over == "constant" else float(max(1, getattr(counts, term.over)))
