"""Examples → groups of token ids, in batches: masks, end tokens, and what is cut where the budget ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rayalign.data.chat import Chat, Piece, Rendered
from rayalign.data.formats import parse_row
from rayalign.data.group import Candidate, Column, Group
from rayalign.data.records import BadRow, Row, excerpt_of
from rayalign.data.schema import MISSING, Example, RowProblem
from rayalign.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeSettings:
    """Budgets in tokens, and what happens to a response that is longer."""

    max_prompt_tokens: int = 512
    max_tokens: int = 1024
    """Prompt and response together."""
    truncated: Literal["keep", "drop", "close"] = "keep"
    """keep: without an end token. drop: the whole group goes. close: the end token replaces the last one kept."""

    def __post_init__(self) -> None:
        if not 0 < self.max_prompt_tokens < self.max_tokens:
            raise UserError(
                f"data.max_prompt_tokens is {self.max_prompt_tokens} and data.max_tokens {self.max_tokens}: "
                "the prompt needs at least one token, and max_tokens must leave room for a response"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Numbers of tokens that did not fit."""

    prompt: int = 0
    """Cut from the prompt's left; a beginning-of-sequence token stays."""
    responses: tuple[int, ...] = ()
    """Cut from every candidate's right."""

    def __bool__(self) -> bool:
        return self.prompt > 0 or any(self.responses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    group: Group
    truncation: Truncation
    example: Example
    """What was tokenized, before anything was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedRow:
    """A good row that ``truncated: drop`` leaves out."""

    source: str
    line: int
    truncation: Truncation


Outcome = Tokenized | DroppedRow | BadRow


class _Answer(NamedTuple):
    """A candidate before it is cut."""

    ids: list[int]
    mask: list[bool]


def rows_to_groups(
    rows: Sequence[Row],
    chat: Chat,
    settings: TokenizeSettings,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """One outcome per row, in order: the whole way from what a reader yields to token ids."""
    parsed = [row if isinstance(row, BadRow) else parse_row(row, format=format, columns=columns) for row in rows]
    outcomes = iter(to_groups([item for item in parsed if isinstance(item, Example)], chat, settings))
    return [item if isinstance(item, BadRow) else next(outcomes) for item in parsed]


def to_group(example: Example, chat: Chat, settings: TokenizeSettings) -> Group | DroppedRow | BadRow:
    """The group of one example."""
    (outcome,) = to_groups([example], chat, settings)
    return outcome.group if isinstance(outcome, Tokenized) else outcome


def to_groups(examples: Sequence[Example], chat: Chat, settings: TokenizeSettings) -> list[Outcome]:
    """One outcome per example, in order. All texts are tokenized in one call, which uses every core."""
    rendered = [_render(example, chat) for example in examples]
    texts = (text for item in rendered if isinstance(item, Rendered) for text in _texts(item, chat))
    ids = chat.encode(texts)
    return [
        item if isinstance(item, BadRow) else _outcome(example, item, ids, chat, settings)
        for example, item in zip(examples, rendered, strict=True)
    ]


def _render(example: Example, chat: Chat) -> Rendered | BadRow:
    try:
        return chat.render(example)
    except RowProblem as problem:
        return _bad(example, problem)


def _bad(example: Example, problem: RowProblem) -> BadRow:
    return BadRow(
        source=example.source,
        line=example.line,
        reason=problem.reason,
        field=problem.field,
        excerpt=excerpt_of(example.prompt),
    )


def _texts(rendered: Rendered, chat: Chat) -> Iterator[str]:
    """Everything that has to be tokenized for one example."""
    yield rendered.prompt
    for pieces in rendered.candidates:
        before = rendered.prompt
        for piece in pieces:
            yield piece.text
            if not chat.splits_cleanly:
                before += piece.text
                yield before


def _outcome(
    example: Example, rendered: Rendered, ids: Mapping[str, list[int]], chat: Chat, settings: TokenizeSettings
) -> Outcome:
    try:
        answers = [_answer(rendered.prompt, pieces, ids, chat) for pieces in rendered.candidates]
        whole_prompt = _prompt(rendered, ids[rendered.prompt], chat)
        if not whole_prompt:
            whole_prompt, answers = _first_token(answers)
    except RowProblem as problem:
        return _bad(example, problem)
    prompt = _cut_left(whole_prompt, settings.max_prompt_tokens, chat.tokenizer.bos_token_id)
    room = settings.max_tokens - len(prompt)
    cut = [_cut_right(answer, room, chat.end_id, close=settings.truncated == "close") for answer in answers]
    truncation = Truncation(
        prompt=len(whole_prompt) - len(prompt), responses=tuple(num_tokens for _, num_tokens in cut)
    )
    if settings.truncated == "drop" and any(truncation.responses):
        return DroppedRow(source=example.source, line=example.line, truncation=truncation)
    group = Group(
        prompt_ids=np.array(prompt, dtype=np.int32),
        candidates=tuple(candidate for candidate, _ in cut),
        per_candidate=_columns(example, truncation),
        source=example.source,
        line=example.line,
    )
    return Tokenized(group=group, truncation=truncation, example=example)


def _answer(prompt: str, pieces: Sequence[Piece], ids: Mapping[str, list[int]], chat: Chat) -> _Answer:
    """A candidate's tokens, every answer in it closed by one end token."""
    tokens: list[int] = []
    mask: list[bool] = []
    before = prompt
    for piece in pieces:
        added = _continuation(before, piece.text, ids, chat)
        if piece.predicted:
            added = _closed(added, chat)
        tokens += added
        mask += [piece.predicted] * len(added)
        before += piece.text
    return _Answer(tokens, mask)


def _continuation(before: str, text: str, ids: Mapping[str, list[int]], chat: Chat) -> list[int]:
    """Tokens of ``text`` where it stands, as long as that leaves the tokens before it alone."""
    if chat.splits_cleanly:
        return ids[text]
    head, whole = ids[before], ids[before + text]
    return whole[len(head) :] if whole[: len(head)] == head else ids[text]


def _closed(ids: list[int], chat: Chat) -> list[int]:
    num_ends = ids.count(chat.end_id)
    if num_ends == 0:
        return [*ids, chat.end_id]
    if num_ends == 1 and ids[-1] == chat.end_id:
        return ids
    raise RowProblem("", f"an answer holds the end token {chat.end_text!r} in its text")


def _prompt(rendered: Rendered, ids: list[int], chat: Chat) -> list[int]:
    """The prompt's tokens with at most one beginning-of-sequence token in front."""
    lead = list(chat.lead_ids) if rendered.raw else []
    prompt = ids if ids[: len(lead)] == lead else lead + ids
    bos = chat.tokenizer.bos_token_id
    while bos is not None and prompt[:2] == [bos, bos]:
        prompt = prompt[1:]
    return prompt


def _first_token(answers: Sequence[_Answer]) -> tuple[list[int], list[_Answer]]:
    """A text without a prompt, and no beginning-of-sequence token to predict its first token from."""
    if len(answers) != 1 or len(answers[0].ids) < 2:
        raise RowProblem("prompt", "prompt has no token")
    (answer,) = answers
    return answer.ids[:1], [_Answer(answer.ids[1:], answer.mask[1:])]


def _cut_left(ids: list[int], limit: int, bos: int | None) -> list[int]:
    if len(ids) <= limit:
        return ids
    if bos is not None and ids[0] == bos:
        return [bos, *ids[len(ids) - limit + 1 :]]
    return ids[len(ids) - limit :]


def _cut_right(answer: _Answer, room: int, end_id: int, *, close: bool) -> tuple[Candidate, int]:
    """The candidate that fits, and the number of tokens cut. What is left ends in a token that is predicted."""
    kept = _last_predicted(answer.mask, room)
    ended = answer.ids[kept - 1] == end_id
    if close and not ended:
        kept = _last_predicted(answer.mask, room - 1)
        ended = kept > 0 and answer.ids[kept - 1] == end_id
    ids, mask = answer.ids[:kept], answer.mask[:kept]
    if close and not ended:
        ids, mask = [*ids, end_id], [*mask, True]
    candidate = Candidate(
        ids=np.array(ids, dtype=np.int32), mask=np.array(mask, dtype=np.bool_), finished=ended or close
    )
    return candidate, len(answer.ids) - kept


def _last_predicted(mask: Sequence[bool], room: int) -> int:
    """Length of the longest beginning within ``room`` that ends in a predicted token."""
    kept = min(room, len(mask))
    while kept > 0 and not mask[kept - 1]:
        kept -= 1
    return kept


def _columns(example: Example, truncation: Truncation) -> dict[str, Column]:
    """The row's numbers; a log-probability of a response that was cut is another response's, so it goes missing."""
    columns = {name: np.array(values, dtype=np.float32) for name, values in example.columns.items()}
    if "behavior_logp" in columns:
        columns["behavior_logp"][np.array(truncation.responses) > 0] = MISSING
    return columns
