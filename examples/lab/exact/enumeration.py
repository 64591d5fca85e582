"""Exact quantities of policies whose completions can be listed, and the list of all sequences of a few tokens.

A policy is a table of log π(y|x), [X, Y] in float64: X prompts, Y completions, the same list for every prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rayalign.functional.best_of_n import best_of_n_distribution
from rayalign.functional.kl import exact_kl
from rayalign.functional.logprobs import log_max_p, log_sum_p2
from rayalign.methods import wpo_weight

Alignment = Literal["none", "greedy", "sampled"]
LARGEST_BETA, SMALLEST_BETA = 1e9, 1e-3


def kl(logp: Tensor, ref_logp: Tensor) -> float:
    """KL(π‖π_ref), nats per completion, mean over prompts."""
    return float(exact_kl(logp.detach(), ref_logp).mean())


def expected(logp: Tensor, reward: Tensor) -> float:
    """E_π[r], mean over prompts."""
    return float((logp.detach().exp() * reward).sum(dim=-1).mean())


def optimum(ref_logp: Tensor, reward: Tensor, beta: float | Tensor) -> Tensor:
    """log π*_β, where π*_β ∝ π_ref exp(r/β) maximises E[r] − β KL(π‖π_ref)."""
    return torch.log_softmax(ref_logp + reward / beta, dim=-1)


def frontier(ref_logp: Tensor, reward: Tensor, levels: Sequence[float]) -> list[float]:
    """The largest E[r] of any policy whose mean KL is at most each of ``levels``.

    It is that of π*_β with one β for all prompts, such that its mean KL is the level: bisection of log β.
    """
    level = torch.tensor(levels, dtype=torch.float64)
    low = torch.full_like(level, math.log(SMALLEST_BETA))
    high = torch.full_like(level, math.log(LARGEST_BETA))

    def best(log_beta: Tensor) -> tuple[Tensor, Tensor]:
        logp = optimum(ref_logp, reward, log_beta.exp()[:, None, None])
        probability = logp.exp()
        distance = (probability * (logp - ref_logp)).sum(dim=-1).mean(dim=-1)
        return distance, (probability * reward).sum(dim=-1).mean(dim=-1)

    for _ in range(100):
        middle = (low + high) / 2
        near = best(middle)[0] < level
        low, high = torch.where(near, low, middle), torch.where(near, middle, high)
    return best(high)[1].tolist()


def best_of_n(ref_logp: Tensor, reward: Tensor, n: int) -> Tensor:
    """log of the distribution of the best of n draws from the reference, prompt by prompt."""
    rows = [best_of_n_distribution(p, r, n=n) for p, r in zip(ref_logp.exp(), reward, strict=True)]
    return torch.stack(rows).clamp(min=torch.finfo(torch.float64).tiny).log()


class Sequences:
    """Every sequence of ``length`` tokens, in lexicographic order, and what each token is predicted from.

    A policy over them is a table of next-token logits, [X, P, V]: P prefixes, the empty one first, then those of one
    token, and so on.
    """

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length
        symbols = torch.arange(vocabulary)
        self.tokens = torch.cartesian_prod(*[symbols] * length).view(-1, length)
        offsets = [sum(vocabulary**s for s in range(t)) for t in range(length)]
        self.num_prefixes = sum(vocabulary**t for t in range(length))
        columns, number = [], torch.zeros(len(self.tokens), dtype=torch.long)
        for t, offset in enumerate(offsets):
            columns.append(number + offset)
            number = number * vocabulary + self.tokens[:, t]
        self.prefix = torch.stack(columns, dim=1)
        """[Y, T]: row of the table."""

    def __len__(self) -> int:
        return len(self.tokens)

    def prefix_tokens(self) -> Tensor:
        """[P, T−1]: the tokens before each prediction, −1 where there is none."""
        found = torch.full((self.num_prefixes, self.length - 1), -1)
        for t in range(1, self.length):
            found[self.prefix[:, t], :t] = self.tokens[:, :t]
        return found

    def token_logp(self, logits: Tensor) -> Tensor:
        """[X, P, V] → log π of every token of every sequence, [X, Y, T]."""
        return torch.log_softmax(logits, dim=-1)[:, self.prefix, self.tokens]

    def logp(self, logits: Tensor) -> Tensor:
        """[X, P, V] → log π(y|x), [X, Y]."""
        return self.token_logp(logits).sum(dim=-1)

    def logp_of(self, logits: Tensor, prompt: Tensor, sequence: Tensor) -> Tensor:
        """log π of some sequences [N, …] of prompts [N], the rest being left out."""
        prompt = prompt.view(-1, *[1] * sequence.dim())
        return torch.log_softmax(logits, dim=-1)[prompt, self.prefix[sequence], self.tokens[sequence]].sum(dim=-1)

    def weight(self, logits: Tensor, prompt: Tensor, sequence: Tensor, alignment: Alignment) -> Tensor:
        """WPO's weight of sequences [N] of prompts [N] under the policy of ``logits``."""
        rows = logits.detach()[prompt[:, None], self.prefix[sequence]].flatten(0, 1)
        tokens = self.tokens[sequence].flatten()
        return wpo_weight(
            torch.log_softmax(rows, dim=-1).gather(1, tokens[:, None]).squeeze(1),
            torch.arange(len(sequence)).repeat_interleave(self.length),
            num_candidates=len(sequence),
            alignment=alignment,
            log_sum_p2=log_sum_p2(rows) if alignment == "sampled" else None,
            log_max_p=log_max_p(rows) if alignment == "greedy" else None,
        )
