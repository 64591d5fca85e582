"""What of a group's tokens is kept where they do not fit: one rule for prompts and responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rayalign.config.data import TokenBudget
from rayalign.data.group import Candidate

Completed = Literal["no", "alone", "beside"]
"""Whether fresh completions will follow the prompts: alone, without the rows' own answers, or beside these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Numbers of tokens that did not fit."""

    prompt: int = 0
    """Cut from the prompt's left; a beginning-of-sequence token stays."""
    responses: tuple[int, ...] = ()
    """Cut from every candidate's right."""

    def __bool__(self) -> bool:
        return self.prompt > 0 or any(self.responses)


class UncutCandidate(NamedTuple):
    """A candidate before it is cut."""

    ids: list[int]
    mask: list[bool]
    ends: frozenset[int]
    """Places of the tokens that end an answer."""


class Fitted(NamedTuple):
    """A group that fits."""

    prompt: list[int]
    candidates: tuple[Candidate, ...]
    truncation: Truncation


def fit(
    prompt: list[int],
    answers: Sequence[UncutCandidate],
    budget: TokenBudget,
    *,
    completed: Completed,
    bos: int | None,
    end_id: int,
) -> Fitted | Truncation:
    """The group within its budget; or what would have to be cut, where it is left out.

    Nothing is cut of a prompt whose responses fit beside it. Else its beginning goes, as far as the longest response
    needs, but never below ``max_prompt_tokens``; then the ends of the responses go. A prompt that is completed keeps
    ``max_prompt_tokens`` at most. A response of which no predicted token fits makes the group go.
    """
    kept = _kept_of_prompt(len(prompt), answers, budget, completed)
    cut_prompt = _cut_left(prompt, kept, bos)
    room = budget.max_tokens - len(cut_prompt)
    close = budget.truncated == "close"
    cut = [_cut_right(answer, room, end_id, close=close) for answer in answers]
    truncation = Truncation(prompt=len(prompt) - len(cut_prompt), responses=tuple(tokens for _, tokens in cut))
    dropped = (budget.truncated == "drop" and truncation) or (budget.long_prompts == "drop" and truncation.prompt)
    candidates = tuple(candidate for candidate, _ in cut if candidate is not None)
    if dropped or len(candidates) < len(answers):
        return truncation
    return Fitted(cut_prompt, candidates, truncation)


def _kept_of_prompt(length: int, answers: Sequence[UncutCandidate], budget: TokenBudget, completed: Completed) -> int:
    if completed != "no" or not answers:
        return min(length, budget.max_prompt_tokens)
    longest = max(len(answer.ids) for answer in answers)
    return min(length, max(budget.max_prompt_tokens, budget.max_tokens - longest))


def _cut_left(ids: list[int], limit: int, bos: int | None) -> list[int]:
    if len(ids) <= limit:
        return ids
    if bos is not None and ids[0] == bos:
        return [bos, *ids[len(ids) - limit + 1 :]]
    return ids[len(ids) - limit :]


def _cut_right(answer: UncutCandidate, room: int, end_id: int, *, close: bool) -> tuple[Candidate | None, int]:
    """The candidate that fits, and the number of tokens cut. What is left ends in a token that is predicted.

    None: no predicted token fits.
    """
    kept = _last_predicted(answer.mask, room)
    if close and kept - 1 not in answer.ends and kept < len(answer.ids):
        kept = _last_predicted(answer.mask, room - 1)
    ids, mask, ended = answer.ids[:kept], answer.mask[:kept], kept - 1 in answer.ends
    if close and not ended and kept < len(answer.ids):
        ids, mask, ended = [*ids, end_id], [*mask, True], True
    return _candidate(ids, mask, finished=ended) if ids else None, len(answer.ids) - kept


def _candidate(ids: list[int], mask: list[bool], *, finished: bool) -> Candidate:
    return Candidate(ids=np.array(ids, dtype=np.int32), mask=np.array(mask, dtype=np.bool_), finished=finished)


def _last_predicted(mask: Sequence[bool], room: int) -> int:
    """Length of the longest beginning within ``room`` that ends in a predicted token."""
    kept = min(room, len(mask))
    while kept > 0 and not mask[kept - 1]:
        kept -= 1
    return kept
