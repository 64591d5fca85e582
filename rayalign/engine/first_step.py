"""At the first step policy and reference are one model: whatever makes them differ shows here, not after hours."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayalign.engine.objective import MAIN_STREAM
from rayalign.engine.source import StreamWork
from rayalign.engine.step import Runner

LOGRATIO_LIMITS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.05, 0.5)}
"""Nats per token, on average and at most, by which rounding lets two scorings of one model differ."""


class PolicyMismatch(ValueError):
    """The policy's first log-probs are not the reference's: another template, dtype, layout or model."""


@torch.no_grad()
def check_initial_logratio(runner: Runner, work: Sequence[StreamWork]) -> None:
    """At step 0 policy and reference are one model: logratios beyond rounding are an error, not a start.

    Raises :class:`PolicyMismatch` on every worker, or on none.
    """
    mean_limit, token_limit = LOGRATIO_LIMITS[runner.compute_dtype]
    ratios = []
    for part in (part for part in work if part.stream == MAIN_STREAM):
        for batch in part.micro_batches:
            scored = runner.score(runner.objectives[MAIN_STREAM], batch)
            ratios.append((scored.scores.token_logp - scored.batch.per_token["ref_token_logp"]).abs().double())
    every = torch.cat(ratios)
    # A NaN, as of a missing reference log-prob, is above every limit.
    seen = torch.stack([every.sum(), (~(every <= token_limit)).sum(), every.new_tensor(len(every))])
    total, above, count = runner.strategy.all_sum(seen).tolist()
    if above or not total / count <= mean_limit:
        raise PolicyMismatch(
            f"before the first step |log π − log π_ref| per token is {total / count:.2e} on average (limit "
            f"{mean_limit:g}) and above {token_limit:g} for {above:.0f} of {count:.0f} tokens, but policy and "
            "reference are the same model. The reference log-probs were made with another template, dtype, attention "
            "or temperature: run again with --fresh reference."
        )
