"""Which format a row has. What is not certain is refused with the words to write."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final

from rayalign.data.formats.base import Body, Format
from rayalign.data.formats.compared import COMPARED
from rayalign.data.formats.names import (
    ANSWERS,
    MEDIA,
    PROMPTS,
    QUARANTINE,
    best,
    may_be_prompt,
)
from rayalign.data.formats.pairs import PAIRS
from rayalign.data.formats.scored import SCORED
from rayalign.data.formats.single import SINGLE
from rayalign.data.schema import Fields, RowProblem

FORMATS: Final[Mapping[str, Format]] = MappingProxyType({**COMPARED, **SCORED, **PAIRS, **SINGLE})
"""Name → format, in the order in which a row is held against them."""


def detect_format(row: Fields, *, nulls: Collection[str] = (), named: Collection[str] = ()) -> str:
    """The format of a row with these columns.

    Args:
        row: the columns that hold something.
        nulls: columns that are there and hold nothing.
        named: columns that ``columns`` names: only formats that read all of them count.

    Raises:
        RowProblem: no format is certain; the reason says what to write.
    """
    if not named:
        _refuse_half_a_pair(row, nulls)
    for name, form in FORMATS.items():
        if not {*named} <= form.reads:
            continue
        seen = {**row, **{verdict: None for verdict in form.verdicts if verdict in nulls}}
        if not form.fits(seen):
            continue
        if form.is_found(seen):
            return name
        if form.ask:
            raise RowProblem("", form.ask)
    raise RowProblem("", _nothing_found(row, named))


def refuse_what_none_learns(row: Fields) -> None:
    """Raise RowProblem for a row of media, of judged steps, or of a quarantine, which is no data."""
    for name in MEDIA:
        if row.get(name):
            raise RowProblem(name, f"{name} is no text: rayalign trains on text alone; leave rows with {name} out")
    if "completions" in row and "labels" in row:
        raise RowProblem(
            "labels", "labels beside completions judge the steps of one answer: no method here learns from steps"
        )
    if row.keys() == QUARANTINE:
        raise RowProblem("", "the row is of a quarantine, a list of bad rows, and no data; leave the file out")


def refuse_uncertain_prompt(name: str, form: Format, row: Fields, unread: Collection[str], body: Body) -> None:
    """Raise RowProblem where the prompt was guessed and something else could be it."""
    if not form.guesses_prompt:
        return
    others = [column for column in unread if may_be_prompt(column, row.get(column), is_text=body.continues)]
    if body.continues and all(f"{speaker}:" in str(body.prompt) for speaker in ("Human", "Assistant")):
        raise RowProblem(
            "chosen",
            "chosen and rejected read like transcripts, but their turns do not begin with \\n\\nHuman: and "
            f"\\n\\nAssistant:; mend them, or write format: {name} to take them as they are, without turns",
        )
    if others:
        named = best(others, PROMPTS) or others[0]
        raise RowProblem(
            named,
            f"{named} could be the prompt, or a part of it: write columns: {{prompt: {named}}}, or format: {name} to "
            "leave it out",
        )


def _refuse_half_a_pair(row: Fields, nulls: Collection[str]) -> None:
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if side in row and other not in row:
            missing = "null" if other in nulls else f"missing; the row has {', '.join(sorted(row))}"
            raise RowProblem(other, f"{other} is {missing}")


def _nothing_found(row: Fields, named: Collection[str]) -> str:
    listed = ", ".join(sorted(row)) or "none"
    if named:
        return f"no format has these columns: {listed}, and reads {', '.join(sorted(named))}, as `columns` names them"
    prompt, answer = best(row, PROMPTS), best(row, ANSWERS)
    if prompt and answer:
        write = f"such as columns: {{prompt: {prompt}, completion: {answer}}}"
    elif prompt:
        write = f"such as columns: {{prompt: {prompt}}}"
    else:
        write = "columns: {prompt: …, completion: …} or columns: {prompt: …, chosen: …, rejected: …}"
    return f"no format has these columns: {listed}; name them, {write}"
