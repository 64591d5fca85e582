"""Candidates between being drawn or read and being kept: token ids, and what is known of the policy behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayalign.data.group import Candidate, Column, Group
from rayalign.rollout.base import Completion
from rayalign.sources.label import Labelled
from rayalign.sources.off_policy import Drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A candidate with what is known of the policy that wrote it."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    finished: bool
    behavior: tuple[float, ...]
    """Per predicted token, nats; NaN for a stored candidate whose writer is not known."""
    behavior_total: float
    """Of the whole candidate, where only that is known."""


def fresh_answer(completion: Completion) -> Answer:
    return Answer(
        ids=completion.token_ids,
        mask=(True,) * len(completion.token_ids),
        finished=completion.finish_reason == "stop",
        behavior=completion.behavior_token_logp,
        behavior_total=float(np.sum(completion.behavior_token_logp, dtype=np.float64)),
    )


def stored_candidates(drawn: Drawn) -> tuple[Answer, ...]:
    group = drawn.read()
    totals = group.per_candidate.get("behavior_logp", np.full(len(group.candidates), np.nan, np.float32))
    return tuple(
        Answer(
            ids=tuple(candidate.ids.tolist()),
            mask=tuple(candidate.mask.tolist()),
            finished=candidate.finished,
            behavior=(np.nan,) * candidate.num_predicted,
            behavior_total=float(total),
        )
        for candidate, total in zip(group.candidates, totals, strict=True)
    )


def make_group(drawn: Drawn, answers: Sequence[Answer], scores: Sequence[float], found: Labelled) -> Group:
    """The kept candidates in order, with their rewards, labels and behavior log-probabilities."""
    kept = [answers[k] for k in found.kept]
    rewards = [scores[k] if scores else np.nan for k in found.kept]
    name, _, line = drawn.name.rpartition(":")
    return Group(
        prompt_ids=drawn.read().prompt_ids,
        candidates=tuple(
            Candidate(ids=np.array(answer.ids, np.int32), mask=np.array(answer.mask), finished=answer.finished)
            for answer in kept
        ),
        per_candidate={
            "reward": column(rewards),
            "label": column([found.label] * len(kept)),
            "behavior_logp": column([answer.behavior_total for answer in kept]),
            **({"rank": column(found.rank)} if found.rank else {}),
        },
        per_token={"behavior_token_logp": column([value for answer in kept for value in answer.behavior])},
        source=name,
        line=int(line),
    )


def column(values: Sequence[float]) -> Column:
    return np.array(values, np.float32)
