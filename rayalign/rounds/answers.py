"""Candidates between being drawn or read and being kept: token ids, and what is known of the policy behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from rayalign.config.data import TokenBudget
from rayalign.data.chat import Chat
from rayalign.data.group import Candidate, Column, Group
from rayalign.data.replies import reply_text
from rayalign.data.schema import Example, assistant
from rayalign.data.tokenize import to_group
from rayalign.rollout.base import Completion
from rayalign.rounds.label import Labelled
from rayalign.rounds.stored import Drawn

UNCUT = TokenBudget(max_prompt_tokens=2**30, max_tokens=2**31)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A candidate with what is known of the policy that wrote it."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    finished: bool
    behavior: tuple[float, ...]
    """Per predicted token, nats; NaN for a stored candidate whose writer is not known."""
    behavior_total: float
    """Log-probability of the whole candidate, where only that is known."""


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
    rewards = [scores[k] for k in found.kept] if scores else [math.nan] * len(kept)
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
        per_token={"behavior_token_logp": column(list(chain.from_iterable(answer.behavior for answer in kept)))},
        source=name,
        line=int(line),
    )


def column(values: Sequence[float]) -> Column:
    return np.array(values, np.float32)


def written_back(group: Group, said: Mapping[str, Any], chat: Chat) -> tuple[list[str], list[bool]]:
    """(the completions as texts, whether each is read back to its tokens); with white space where that alone does."""
    whole = [
        reply_text(chat.tokenizer, own.ids.tolist(), finished=own.finished, prompt_ids=group.prompt_ids.tolist())
        for own in group.candidates
    ]
    stripped = [text.strip() for text in whole]
    plainly, exactly = (read_back(group, said, texts, chat) for texts in (stripped, whole))
    texts = list(stripped)
    for place, (plain, exact) in enumerate(zip(plainly, exactly, strict=True)):
        if exact and not plain:
            texts[place] = whole[place]
    return texts, [plain or exact for plain, exact in zip(plainly, exactly, strict=True)]


def read_back(group: Group, said: Mapping[str, Any], texts: Sequence[str], chat: Chat) -> list[bool]:
    """Whether each text, read as a row's completion after the row's prompt, is the tokens of the group."""
    prompt = said["prompt"]
    turns = prompt if isinstance(prompt, str) else tuple(prompt)
    example = Example(
        format="ranked",
        prompt=turns,
        candidates=tuple(texts) if isinstance(prompt, str) else tuple(assistant(text) for text in texts),
        finished=tuple(candidate.finished for candidate in group.candidates),
        tools=tuple(said["tools"]) if "tools" in said else None,
        template_kwargs=said.get("chat_template_kwargs", {}),
    )
    found = to_group(example, chat, UNCUT)
    if not isinstance(found, Group) or not np.array_equal(found.prompt_ids, group.prompt_ids):
        return [False] * len(texts)
    return [np.array_equal(own.ids, theirs.ids) for own, theirs in zip(found.candidates, group.candidates, strict=True)]
