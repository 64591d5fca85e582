"""From logits to token log-probabilities, and from tokens to candidates.

Everything is computed in float32 or wider whatever the model's dtype: in bfloat16 the statistics below are off by
tenths of a nat per token. The functions of logits are the plain definitions; a trainer may compute the same in chunks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def at_least_float32(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same values, in float32 unless they are wider already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def token_logp(
    logits: Float[Tensor, "N V"], target_ids: Int[Tensor, " N"], *, temperature: float = 1.0
) -> Float[Tensor, " N"]:
    """log softmax(logits / temperature) at the target of each token, in nats."""
    logp = torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)
    return logp.gather(-1, target_ids[:, None]).squeeze(-1)


def log_sum_p2(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """log Σ_v π(v)² at temperature 1, without gradient: the log of the probability that two draws coincide."""
    return torch.logsumexp(2 * torch.log_softmax(at_least_float32(logits.detach()), dim=-1), dim=-1)


def log_max_p(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """log max_v π(v) at temperature 1, without gradient."""
    return torch.log_softmax(at_least_float32(logits.detach()), dim=-1).amax(dim=-1)


def sum_per_candidate(
    values: Float[Tensor, " N"], candidate_of: Int[Tensor, " N"], *, num_groups: int, num_candidates: int
) -> Float[Tensor, "B K"]:
    """Sum of token values over each candidate, in float32 or wider; 0 for a candidate without tokens.

    ``candidate_of[n] = b * num_candidates + k``; gradient flows to every token of the candidate.
    """
    values = at_least_float32(values)
    total = values.new_zeros(num_groups * num_candidates).index_add(0, candidate_of, values)
    return total.view(num_groups, num_candidates)


def count_per_candidate(candidate_of: Int[Tensor, " N"], *, num_groups: int, num_candidates: int) -> Int[Tensor, "B K"]:
    """Number of tokens of each candidate."""
    counts = candidate_of.new_zeros(num_groups * num_candidates)
    return counts.scatter_add(0, candidate_of, torch.ones_like(candidate_of)).view(num_groups, num_candidates)


def last_token(candidate_of: Int[Tensor, " N"]) -> Int[Tensor, " C"]:
    """Positions, among the N tokens, of the last token of every candidate that has one; ``candidate_of`` ascends."""
    following = torch.cat([candidate_of[1:], candidate_of.new_full((1,), -1)])
    return torch.nonzero(candidate_of != following[: len(candidate_of)]).squeeze(1)


def last_per_candidate(
    values: Float[Tensor, " N"], candidate_of: Int[Tensor, " N"], *, num_groups: int, num_candidates: int
) -> Float[Tensor, "B K"]:
    """The value at each candidate's last token; 0 for a candidate without tokens."""
    tokens = torch.arange(len(values), device=values.device)
    none = tokens.new_full((num_groups * num_candidates,), -1)
    last = none.scatter_reduce(0, candidate_of, tokens, "amax")
    padded = torch.cat([values, values.new_zeros(1)])  # its last place, -1, is that of no token
    return padded[last].view(num_groups, num_candidates)
