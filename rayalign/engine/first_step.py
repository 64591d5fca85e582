"""At the first step policy and reference are one model: whatever makes them differ shows here, not after hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rayalign.engine.batches import StreamWork
from rayalign.engine.objective import MAIN_STREAM
from rayalign.engine.step import Runner

LOGRATIO_LIMITS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.05, 0.5)}
"""Nats per token, on average and at most, by which rounding lets two scorings of one model differ."""


class PolicyMismatch(ValueError):
    """The policy's first log-probs are not the reference's, and why, as far as it can be known."""


@torch.no_grad()
def check_initial_logratio(
    runner: Runner,
    work: Sequence[StreamWork],
    *,
    made: Mapping[str, str] | None = None,
    now: Mapping[str, str] | None = None,
) -> None:
    """At step 0 policy and reference are one model: logratios beyond rounding are an error, not a start.

    ``made`` says with what stored reference log-probs were computed, and ``now`` the same of this run; None where the
    run's own rollout actors computed them.

    Raises :class:`PolicyMismatch` on every worker, or on none.
    """
    mean_limit, token_limit = LOGRATIO_LIMITS[runner.compute_dtype]
    policy, reference = scored_twice(runner, work)
    ratios = (policy - reference).abs()
    # A NaN, as of a missing reference log-prob, is above every limit.
    above = ~(ratios <= token_limit)
    facts = [ratios.sum(), above.sum(), ~policy.isfinite(), ~reference.isfinite()]
    seen = torch.stack([*(fact.double().sum() for fact in facts), ratios.new_tensor(len(ratios))])
    total, num_above, bad_policy, bad_reference, count = runner.strategy.all_sum(seen).tolist()
    if not num_above and total / count <= mean_limit:
        return
    told = (
        f"before the first step |log π − log π_ref| per token is {total / count:.2e} on average (limit {mean_limit:g}) "
        f"and above {token_limit:g} for {num_above:.0f} of {count:.0f} tokens, but policy and reference are the same "
        "model. "
    )
    raise PolicyMismatch(
        told + mismatch_cause(runner, work, policy, bad_policy, bad_reference, made=made, now=now or {})
    )


def scored_twice(runner: Runner, work: Sequence[StreamWork]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of this worker's tokens of the main stream, by the policy now and as the data have the reference's."""
    pairs = []
    for part in (part for part in work if part.stream == MAIN_STREAM):
        for batch in part.micro_batches:
            scored = runner.score(runner.objectives[MAIN_STREAM], batch)
            pairs.append((scored.scores.token_logp.double(), scored.batch.per_token["ref_token_logp"].double()))
    policy, reference = zip(*pairs, strict=True)
    return torch.cat(policy), torch.cat(reference)


def mismatch_cause(
    runner: Runner,
    work: Sequence[StreamWork],
    policy: torch.Tensor,
    bad_policy: float,
    bad_reference: float,
    *,
    made: Mapping[str, str] | None,
    now: Mapping[str, str],
) -> str:
    """What made them differ, and what helps; all workers call this alike."""
    if bad_policy:
        return (
            f"The policy's own log-probs of {bad_policy:.0f} tokens are no finite numbers: its weights overflow in "
            f"{str(runner.compute_dtype).removeprefix('torch.')}; look at the checkpoint, or at model.dtype"
        )
    if bad_reference:
        return f"{bad_reference:.0f} reference log-probs are missing or no finite numbers: {remedy_of(made)}"
    again, _ = scored_twice(runner, work)
    moved = (again - policy).abs().max() > LOGRATIO_LIMITS[runner.compute_dtype][1]
    if runner.strategy.all_sum(moved.double()[None]).item():
        return (
            "The policy scores the same tokens otherwise every time: something in the model is drawn at random, such "
            "as a router's noise, and no setting of rayalign turns it off"
        )
    changed = [f"{name}: {made[name]} then, {now[name]} now" for name in now if made and made.get(name) != now[name]]
    if changed:
        return f"The reference log-probs were computed with something else ({'; '.join(changed)}): {remedy_of(made)}"
    if made is not None:
        return (
            "Model, data, template, temperature and precision are those that the stored reference log-probs were "
            "computed with, so that only the machine or its libraries can differ: run again with --fresh reference. If "
            "it says the same then, this family computes otherwise in training than in scoring; please report it"
        )
    return (
        "The run's own rollout actors computed the reference log-probs: their devices or libraries are others than the "
        "training workers', or this family computes otherwise in training than in scoring; please report it"
    )


def remedy_of(made: Mapping[str, str] | None) -> str:
    """How reference log-probs are computed again."""
    if made is None:
        return "the rollout actors that computed them failed; remove the run's rounds, and run again"
    return "run again with --fresh reference"
