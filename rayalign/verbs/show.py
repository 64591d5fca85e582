"""Rows as their tokens read, each stretch marked with what happens to it: readable without colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.text import Text

from rayalign.config.data import TokenBudget
from rayalign.data.budget import Completed
from rayalign.data.chat import Chat
from rayalign.data.records import BadRow, Row
from rayalign.data.schema import Example
from rayalign.data.tokenize import Tokenized, to_groups
from rayalign.data.tokenize_rows import UndecidedRow
from rayalign.report.formatting import printable

STYLES = {"prompt": "cyan", "trained": "green", "seen": "yellow", "cut": "red", "end": "bold magenta"}
"""Role of a token → its colour, where there are colours; the mark ``[role]`` stands always."""
LEGEND = (
    "[prompt] read, [trained] learned, [end] the end token, learned, [seen] read inside an answer, [cut] does not fit; "
    "⏎ is a line end"
)
MOST_CHARACTERS = 240
UNLIMITED = 1 << 30
Marked = tuple[str, str]
"""(role, text)."""


def row_lines(
    row: Row, found: Example | BadRow | UndecidedRow, chat: Chat, budget: TokenBudget, *, completed: Completed
) -> Iterator[Text]:
    """The lines of one row."""
    if isinstance(found, Example):
        whole = budget.model_copy(update={"max_prompt_tokens": UNLIMITED, "max_tokens": 2 * UNLIMITED})
        kept = budget.model_copy(update={"truncated": "keep"})
        (full,) = to_groups([found], chat, whole, completed=completed)
        (cut,) = to_groups([found], chat, kept, completed=completed)
        if isinstance(full, Tokenized) and isinstance(cut, Tokenized):
            yield Text(printable(f"{row.source}:{row.line} ({found.format})"), style="bold")
            yield from _lines(full, cut, chat)
            return
        reason = full.reason if isinstance(full, BadRow) else "cannot be cut to the budget"
    else:
        reason = found.reason if isinstance(found, BadRow) else ""
    told = f"bad: {reason}" if reason else "left out: no answer is preferred"
    yield Text(printable(f"{row.source}:{row.line} {told}"), style="red")


def _lines(full: Tokenized, cut: Tokenized, chat: Chat) -> Iterator[Text]:
    for turn in _prompt(full, cut, chat):
        yield _line("  ", turn)
    names = _names(full.example)
    for name, answer, num_cut in zip(names, full.group.candidates, cut.truncation.responses, strict=True):
        yield Text(f"  {name}")
        ids, kept = answer.ids.tolist(), len(answer.ids) - num_cut
        roles = _roles(ids, answer.mask.tolist(), kept=kept, special=special_ids(chat))
        for turn in _turns(_runs(ids, roles, chat)):
            yield _line("    ", turn)


def special_ids(chat: Chat) -> frozenset[int]:
    """Tokens that are no words."""
    return frozenset({chat.end_id, *chat.tokenizer.all_special_ids, *chat.tokenizer.added_tokens_decoder})


def _roles(ids: Sequence[int], mask: Sequence[bool], *, kept: int, special: frozenset[int]) -> list[str]:
    """What becomes of every token of an answer; a token that is no word ends a stretch that is learned."""
    following = [*mask[1:], False]
    ends = [own and not after and token in special for token, own, after in zip(ids, mask, following, strict=True)]
    learned = [_role(own, end) for own, end in zip(mask, ends, strict=True)]
    return [*learned[:kept], *("cut" for _ in learned[kept:])]


def _role(is_learned: bool, is_end: bool) -> str:
    if is_end:
        return "end"
    return "trained" if is_learned else "seen"


def _names(example: Example) -> list[str]:
    """What every answer is called."""
    count = len(example.candidates)
    rewards, labels = example.columns.get("reward"), example.columns.get("label")
    if labels and count == 1:
        return ["desirable" if labels[0] else "undesirable"]
    names = [f"answer {place + 1}" for place in range(count)] if count > 1 else ["answer"] * count
    if count == 2 and example.preference == "stored":
        names = ["chosen", "rejected"]
    if not rewards:
        return names
    return [f"{name} (reward {reward:g})" for name, reward in zip(names, rewards, strict=True)]


def _prompt(full: Tokenized, cut: Tokenized, chat: Chat) -> Iterator[list[Marked]]:
    """The prompt's turns, as far as an end token tells them apart."""
    ids = full.group.prompt_ids.tolist()
    first = int(bool(ids) and ids[0] == chat.tokenizer.bos_token_id)
    gone = range(first, first + cut.truncation.prompt)
    roles = ["prompt"] * len(ids)
    for place in gone:
        roles[place] = "cut"
    begin = 0
    for end in [*_turn_ends(ids, chat), len(ids)]:
        if begin < end:
            yield list(_runs(ids[begin:end], roles[begin:end], chat))
        begin = end


def _turn_ends(ids: Sequence[int], chat: Chat) -> Iterator[int]:
    """Places behind an end token and the space that follows it."""
    for place, token in enumerate(ids):
        if token == chat.end_id:
            end = place + 1
            while end < len(ids) and not chat.tokenizer.decode([ids[end]]).strip():
                end += 1
            yield end


def _runs(ids: Sequence[int], roles: Sequence[str], chat: Chat) -> Iterator[Marked]:
    """Neighbouring tokens of one role as one text."""
    for role, run in groupby(zip(roles, ids, strict=True), key=lambda own: own[0]):
        yield role, chat.tokenizer.decode([token for _, token in run])


def _turns(marked: Iterator[Marked]) -> Iterator[list[Marked]]:
    """An answer and its end token are in one line."""
    line: list[Marked] = []
    for role, text in marked:
        if line and role != "end":
            yield line
            line = []
        line.append((role, text))
    if line:
        yield line


def _line(indent: str, marked: Sequence[Marked]) -> Text:
    line = Text(indent)
    for role, text in marked:
        line.append(f"[{role}] ", style="dim")
        line.append(f"{_elided(printable(visible_whitespace(text)))} ", style=STYLES[role])
    line.rstrip()
    return line


def visible_whitespace(text: str) -> str:
    """Line ends and tabs as signs, so that a turn is one line."""
    return text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")


def _elided(text: str) -> str:
    left = len(text) - MOST_CHARACTERS
    return f"{text[:MOST_CHARACTERS]}… (+{left:,} characters)" if left > 0 else text
