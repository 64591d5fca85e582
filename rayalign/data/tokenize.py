"""Examples → groups of token ids, in batches: masks, end tokens, and what is cut where the budget ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from rayalign.config.data import TokenBudget
from rayalign.data.budget import Completed, Truncation, UncutCandidate, fit
from rayalign.data.chat import Chat
from rayalign.data.formats import parse_row
from rayalign.data.group import Column, Group
from rayalign.data.records import BadRow, Row, excerpt_of
from rayalign.data.render import Rendered, WrittenCandidate
from rayalign.data.schema import MISSING, Example, RowProblem

__all__ = [
    "DroppedRow",
    "Outcome",
    "Tokenized",
    "Truncation",
    "rows_to_groups",
    "to_group",
    "to_groups",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    group: Group
    truncation: Truncation
    example: Example
    """What was tokenized, before anything was cut."""
    rules: frozenset[str] = frozenset()
    """Names in :data:`rayalign.data.render.RULES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedRow:
    """A good row that does not fit, and is left out."""

    source: str
    line: int
    truncation: Truncation


Outcome = Tokenized | DroppedRow | BadRow


def rows_to_groups(
    rows: Sequence[Row],
    chat: Chat,
    budget: TokenBudget,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """One outcome per row, in order: the whole way from what a reader yields to token ids."""
    outcomes: dict[int, Outcome] = {}
    examples: dict[int, Example] = {}
    for place, row in enumerate(rows):
        found = row if isinstance(row, BadRow) else parse_row(row, format=format, columns=columns)
        if isinstance(found, Example):
            examples[place] = found
        else:
            outcomes[place] = found
    outcomes |= zip(examples, to_groups(list(examples.values()), chat, budget), strict=True)
    return [outcomes[place] for place in range(len(rows))]


def to_group(example: Example, chat: Chat, budget: TokenBudget) -> Group | DroppedRow | BadRow:
    """The group of one example."""
    (outcome,) = to_groups([example], chat, budget)
    return outcome.group if isinstance(outcome, Tokenized) else outcome


def to_groups(
    examples: Sequence[Example], chat: Chat, budget: TokenBudget, *, completed: Completed = "no"
) -> list[Outcome]:
    """One outcome per example, in order. All texts are tokenized in one call, which uses every core."""
    rendered = [_render(example, chat, completed) for example in examples]
    texts = chain.from_iterable(_texts(item, chat) for item in rendered if isinstance(item, Rendered))
    ids = chat.encode(texts)
    outcomes: list[Outcome] = []
    for item in rendered:
        if isinstance(item, Rendered):
            outcomes.append(_outcome(item, ids, chat, budget, completed=completed))
        else:
            outcomes.append(item)
    return outcomes


def _render(example: Example, chat: Chat, completed: Completed) -> Rendered | BadRow:
    if completed == "alone":
        example = replace(example, candidates=(), columns={}, finished=None)
    try:
        return chat.render(example, completed=completed == "beside")
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
    for written in rendered.candidates:
        before = rendered.prompt
        for piece in written.pieces:
            yield piece.text
            if not chat.splits_cleanly:
                before += piece.text
                yield before


def _outcome(
    rendered: Rendered, ids: Mapping[str, list[int]], chat: Chat, budget: TokenBudget, *, completed: Completed
) -> Outcome:
    example = rendered.example
    try:
        answers = [_answer(rendered.prompt, written, ids, chat) for written in rendered.candidates]
        whole_prompt = _prompt(rendered, ids[rendered.prompt], chat)
        if not whole_prompt:
            whole_prompt, answers = _first_token(answers)
    except RowProblem as problem:
        return _bad(example, problem)
    fitted = fit(
        whole_prompt,
        answers,
        budget,
        completed=completed,
        bos=chat.tokenizer.bos_token_id,
        end_id=chat.end_id,
    )
    if isinstance(fitted, Truncation):
        return DroppedRow(source=example.source, line=example.line, truncation=fitted)
    group = Group(
        prompt_ids=np.array(fitted.prompt, dtype=np.int32),
        candidates=fitted.candidates,
        per_candidate=_columns(example, fitted.truncation),
        source=example.source,
        line=example.line,
    )
    return Tokenized(group=group, truncation=fitted.truncation, example=example, rules=rendered.rules)


def _answer(prompt: str, written: WrittenCandidate, ids: Mapping[str, list[int]], chat: Chat) -> UncutCandidate:
    """A candidate's tokens; the run's end token closes it where its text does not hold one."""
    tokens: list[int] = []
    mask: list[bool] = []
    ends: set[int] = set()
    before = prompt
    for piece in written.pieces:
        added = _continuation(before, piece.text, ids, chat)
        tokens += added
        mask += [piece.predicted] * len(added)
        before += piece.text
        if piece.ended:
            ends.add(len(tokens) - 1)
    if written.finished and not written.pieces[-1].ended:
        ends.add(len(tokens))
        tokens, mask = [*tokens, chat.end_id], [*mask, True]
    return UncutCandidate(tokens, mask, frozenset(ends))


def _continuation(before: str, text: str, ids: Mapping[str, list[int]], chat: Chat) -> list[int]:
    """Tokens of ``text`` where it stands, as long as that leaves the tokens before it alone."""
    if chat.splits_cleanly:
        return ids[text]
    head, whole = ids[before], ids[before + text]
    return whole[len(head) :] if whole[: len(head)] == head else chat.encode_after(text)


def _prompt(rendered: Rendered, ids: list[int], chat: Chat) -> list[int]:
    """The prompt's tokens with at most one beginning-of-sequence token in front."""
    lead = list(chat.lead_ids) if rendered.raw else []
    prompt = ids if ids[: len(lead)] == lead else lead + ids
    bos = chat.tokenizer.bos_token_id
    while bos is not None and prompt[:2] == [bos, bos]:
        prompt = prompt[1:]
    return prompt


def _first_token(answers: Sequence[UncutCandidate]) -> tuple[list[int], list[UncutCandidate]]:
    """A text without a prompt, and no beginning-of-sequence token to predict its first token from."""
    if len(answers) != 1 or len(answers[0].ids) < 2:
        raise RowProblem("prompt", "prompt has no token")
    (answer,) = answers
    return answer.ids[:1], [UncutCandidate(answer.ids[1:], answer.mask[1:], frozenset(end - 1 for end in answer.ends))]


def _columns(example: Example, truncation: Truncation) -> dict[str, Column]:
    """The row's numbers; a log-probability of a response that was cut is another response's, so it goes missing."""
    columns = {name: np.array(values, dtype=np.float32) for name, values in example.columns.items()}
    if "behavior_logp" in columns:
        columns["behavior_logp"][np.array(truncation.responses) > 0] = MISSING
    return columns
