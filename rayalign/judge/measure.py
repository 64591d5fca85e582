"""One policy on a set of prompts: samples, scores, and its divergence from the reference on its own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayalign.config.scoring import ScorerConfig
from rayalign.data.group import Candidate, Column, Group
from rayalign.data.replies import reply_text
from rayalign.data.schema import Turns
from rayalign.data.shared_prompt import prompt_text
from rayalign.engine.canary import TOLERANCE
from rayalign.engine.divergence import divergences
from rayalign.engine.frozen import FrozenModel
from rayalign.errors import UserError
from rayalign.judge import scorer_of
from rayalign.judge.base import Asked, Judge, NoVerdict, Scorer, Tally
from rayalign.remarks import remarks_of
from rayalign.rollout.base import Completion, RolloutEngine, SamplingParams

Table = NDArray[np.float64]
"""[P prompts, S samples]; NaN = missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as the model reads it and as scorers and readers do."""

    ids: tuple[int, ...]
    prompt: str | Turns

    @property
    def text(self) -> str:
        return prompt_text(self.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One policy's samples, all of prompt 0, all of prompt 1, …: as token ids and as scorers and readers see them."""

    completions: tuple[Completion, ...]
    replies: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a scorer or judge said of all samples of a policy, and what that took."""

    values: Table
    asked: Asked | None
    """None: nothing that is counted was asked, as of a function."""
    problem: str
    """Why the first missing value is missing."""
    remarks: tuple[str, ...] = ()
    """What there was to tell besides, and was not told before."""

    @property
    def missing(self) -> int:
        return int(np.isnan(self.values).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one policy does on P prompts, S samples each."""

    scored: Mapping[str, Answered]
    judged: Answered | None
    """How much better each sample is than the baseline's with the same prompt and number, 1, ½ or 0; None: no judge."""
    k1: Table
    """Σ_t log π(y_t) − log π_ref(y_t) of each sample, nats: the k1 estimate of KL(π‖π_ref)."""
    kl_rb: Table
    """Σ_t KL(π(·|y_<t)‖π_ref(·|y_<t)) of each sample, nats, each term exact over the vocabulary: the Rao–Blackwellised
    estimate of the same, of smaller variance (Amini et al., 2504.10637). NaN where vocabularies differ."""
    length: Table
    """Tokens of each reply, its end token included."""
    finished: Table
    """1 where the reply ended by itself, 0 where it was cut at the limit."""
    replies: tuple[tuple[str, ...], ...]

    @property
    def scores(self) -> dict[str, Table]:
        return {label: answered.values for label, answered in self.scored.items()}


def make_scorers(configs: Iterable[ScorerConfig]) -> dict[str, Scorer]:
    """Every scorer by what tables call it."""
    return {config.label: scorer_of(config) for config in configs}


def sample_replies(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    tokenizer: Any,
    keys: Sequence[int] | None = None,
) -> Sampled:
    """``params.num_samples`` replies to every prompt.

    The draws depend on ``params.seed`` and the prompt's key, by default its place, so that two policies answer with the
    same noise.

    Raises:
        ValueError: the samples are tempered or truncated, so that they are not the policy's own and KL would be biased.
    """
    if params.truncates or params.temperature != 1.0:
        raise ValueError(f"KL is measured on the policy's own samples, at temperature 1 and untruncated, not {params}")
    completions = engine.generate([prompt.ids for prompt in prompts], params, keys=keys)
    replies = (
        reply_text(
            tokenizer,
            completion.token_ids,
            finished=completion.finish_reason == "stop",
            prompt_ids=prompts[completion.prompt_index].ids,
        )
        for completion in completions
    )
    return Sampled(completions=tuple(completions), replies=tuple(replies))


def measure_samples(
    policy: FrozenModel,
    reference: FrozenModel,
    prompts: Sequence[Prompt],
    drawn: Sampled,
    scorers: Mapping[str, Scorer],
    *,
    judge: Judge | None = None,
    opponents: Sequence[str] | None = None,
) -> Measured:
    """Measure what was drawn from ``policy``, equally many replies to every prompt.

    The judge compares them with ``opponents``, one by one; None is the policy itself, and all verdicts tie.

    Raises:
        UserError: the engine sampled from other weights than those of ``policy``.
    """
    completions, replies = drawn.completions, drawn.replies
    asked = [prompts[completion.prompt_index].prompt for completion in completions]
    shape = (len(prompts), len(completions) // len(prompts))

    def table(values: Sequence[float]) -> Table:
        return np.asarray(values, dtype=np.float64).reshape(shape)

    kl_rb, k1 = kl_estimates(policy, reference, prompts, completions)
    return Measured(
        scored={
            label: ask_and_count(scorer, partial(scorer.score, asked, replies), shape)
            for label, scorer in scorers.items()
        },
        judged=judge_replies(judge, asked, replies, opponents, shape) if judge else None,
        k1=k1.reshape(shape),
        kl_rb=kl_rb.reshape(shape),
        length=table([len(completion.token_ids) for completion in completions]),
        finished=table([completion.finish_reason == "stop" for completion in completions]),
        replies=tuple(tuple(row) for row in np.array(replies, dtype=object).reshape(shape)),
    )


def joined_rows(parts: Sequence[Measured]) -> Measured:
    """One policy on all prompts of its parts, in their order."""
    judged = [part.judged for part in parts if part.judged is not None]
    scored: dict[str, Answered] = {}
    for label in parts[0].scored:
        scored[label] = joined_answers([part.scored[label] for part in parts])
    return Measured(
        scored=scored,
        judged=joined_answers(judged) if judged else None,
        k1=np.concatenate([part.k1 for part in parts]),
        kl_rb=np.concatenate([part.kl_rb for part in parts]),
        length=np.concatenate([part.length for part in parts]),
        finished=np.concatenate([part.finished for part in parts]),
        replies=tuple(chain.from_iterable(part.replies for part in parts)),
    )


def joined_answers(parts: Sequence[Answered]) -> Answered:
    """What was said of all parts, and what that took."""
    asked = [part.asked for part in parts if part.asked is not None]
    return Answered(
        values=np.concatenate([part.values for part in parts]),
        asked=sum(asked[1:], asked[0]) if asked else None,
        problem=next((part.problem for part in parts if part.problem), ""),
        remarks=tuple(dict.fromkeys(chain.from_iterable(part.remarks for part in parts))),
    )


def judge_replies(
    judge: Judge,
    prompts: Sequence[str | Turns],
    replies: Sequence[str],
    opponents: Sequence[str] | None,
    shape: tuple[int, int],
) -> Answered:
    """Verdicts on replies against their opponents in order; without opponents, what they are by definition."""
    if opponents is None:
        return Answered(values=np.full(shape, 0.5), asked=None, problem="")
    return ask_and_count(judge, partial(judge.compare, prompts, replies, opponents), shape)


def ask_and_count(whom: Scorer | Judge, ask: Callable[[], Sequence[float]], shape: tuple[int, int]) -> Answered:
    """What ``ask`` says, NaN where ``whom`` has no answer, and by how much it moved their count."""
    tally: Tally | None = getattr(whom, "tally", None)
    before = tally.asked if tally else Asked()
    problem = ""
    try:
        values = ask()
    except NoVerdict as found:
        values, problem = found.values, str(found)
    table = np.asarray(values, dtype=np.float64).reshape(shape)
    asked = tally.asked - before if tally else None
    return Answered(values=table, asked=asked, problem=problem, remarks=remarks_of(whom))


def kl_estimates(
    policy: FrozenModel, reference: FrozenModel, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> tuple[Table, Table]:
    """(kl_rb, k1) of every completion, drawn from ``policy`` at temperature 1: nats, summed over its tokens in float64.

    Both models go through the training forward.
    """
    by_prompt: dict[int, list[Completion]] = {}
    for completion in completions:
        by_prompt.setdefault(completion.prompt_index, []).append(completion)
    groups = [sampled_group(prompts[index], drawn) for index, drawn in by_prompt.items()]
    measured = divergences(policy, reference, groups)
    refuse_other_policy(policy, [found.logp for found in measured], completions)
    kl_rb, k1 = [], []
    for group, found in zip(groups, measured, strict=True):
        ends = np.cumsum([len(candidate.ids) for candidate in group.candidates])[:-1]
        kl_rb += [part.sum(dtype=np.float64) for part in np.split(found.kl, ends)]
        k1 += [part.sum(dtype=np.float64) for part in np.split(found.log_ratio, ends)]
    return np.array(kl_rb), np.array(k1)


def refuse_other_policy(policy: FrozenModel, logps: Sequence[Column], completions: Sequence[Completion]) -> None:
    """Raise UserError where the engine that drew the completions held other weights than ``policy``."""
    told = np.array(list(chain.from_iterable(completion.sampler_logp for completion in completions)))
    error = np.abs(told - np.concatenate(logps))
    known = np.isfinite(told)
    limit = TOLERANCE[policy.dtype]
    if known.any() and error[known].mean() > limit:
        raise UserError(
            f"evaluation: the engine gave its samples other log-probabilities than {policy.spec.model.name} has: they "
            f"differ by {error[known].mean():.2g} nats per token on average, more than {limit:g}. It samples from "
            "other weights, or computes this family otherwise: write evaluate.sampling.engine: hf"
        )


def sampled_group(prompt: Prompt, completions: Sequence[Completion]) -> Group:
    """A prompt and its samples, every token predicted."""
    candidates = tuple(
        Candidate(
            ids=np.array(completion.token_ids, np.int32),
            mask=np.ones(len(completion.token_ids), np.bool_),
            finished=completion.finish_reason == "stop",
        )
        for completion in completions
    )
    return Group(prompt_ids=np.array(prompt.ids, np.int32), candidates=candidates, source="samples")
