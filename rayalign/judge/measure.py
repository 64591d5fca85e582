"""One policy on a set of prompts: samples, scores, and its divergence from the reference on its own samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rayalign.data.group import Candidate, Group
from rayalign.data.schema import Turns
from rayalign.data.split import prompt_text
from rayalign.engine.frozen import FrozenModel
from rayalign.judge import make_scorer
from rayalign.judge.base import Scorer
from rayalign.rollout.base import Completion, SamplingParams
from rayalign.rollout.hf import HfEngine

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
class ScorerSpec:
    """A scorer by name and parameters, so that it travels between processes."""

    label: str
    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one policy does on P prompts, S samples each."""

    scores: Mapping[str, Table]
    k1: Table
    """Σ_t log π(y_t) − log π_ref(y_t) of each sample, nats: the k1 estimate of KL(π‖π_ref)."""
    length: Table
    """Tokens of each reply, its end token included."""
    finished: Table
    """1 where the reply ended by itself, 0 where it was cut at the limit."""
    replies: tuple[tuple[str, ...], ...]


def make_scorers(specs: Sequence[ScorerSpec]) -> dict[str, Scorer]:
    return {spec.label: make_scorer(spec.name, **spec.parameters) for spec in specs}


def measure(
    policy: FrozenModel,
    reference: FrozenModel,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    scorers: Mapping[str, Scorer],
    *,
    tokenizer: Any,
) -> Measured:
    """Sample ``params.num_samples`` replies to every prompt and measure them.

    The draws depend on ``params.seed`` and the prompt's place, so that two policies answer with the same noise.

    Raises:
        ValueError: the samples are tempered or truncated, so that they are not the policy's own and k1 would be biased.
    """
    if params.truncates or params.temperature != 1.0:
        raise ValueError(f"KL is measured on the policy's own samples, at temperature 1 and untruncated, not {params}")
    completions = HfEngine(policy.policy.model).generate([prompt.ids for prompt in prompts], params)
    replies = [tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip() for completion in completions]
    asked = [prompts[completion.prompt_index].prompt for completion in completions]
    shape = (len(prompts), params.num_samples)

    def table(values: Sequence[float]) -> Table:
        return np.asarray(values, dtype=np.float64).reshape(shape)

    return Measured(
        scores={label: table(scorer.score(asked, replies)) for label, scorer in scorers.items()},
        k1=log_ratios(policy, reference, prompts, completions).reshape(shape),
        length=table([len(completion.token_ids) for completion in completions]),
        finished=table([completion.finish_reason == "stop" for completion in completions]),
        replies=tuple(tuple(row) for row in np.array(replies, dtype=object).reshape(shape)),
    )


@torch.no_grad()
def log_ratios(
    policy: FrozenModel, reference: FrozenModel, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Table:
    """log π(y) − log π_ref(y) of every completion, both through the training forward, nats."""
    by_prompt: dict[int, list[Completion]] = {}
    for completion in completions:
        by_prompt.setdefault(completion.prompt_index, []).append(completion)
    groups = [sampled_group(prompts[index], drawn) for index, drawn in by_prompt.items()]
    ratios = []
    for group, own, theirs in zip(groups, policy.token_logps(groups), reference.token_logps(groups), strict=True):
        ends = np.cumsum([len(candidate.ids) for candidate in group.candidates])
        ratios += [part.sum(dtype=np.float64) for part in np.split(own - theirs, ends[:-1])]
    return np.array(ratios)


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
