"""Which format a row has. What is not certain is refused with the words to write."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Final

from rayalign.data.formats.advice import nothing_found
from rayalign.data.formats.base import Body, Format
from rayalign.data.formats.compared import COMPARED
from rayalign.data.formats.names import (
    MARKER,
    MARKER_ALONE,
    MEDIA,
    PROMPTS,
    QUARANTINE,
    first_known_name,
    may_be_prompt,
)
from rayalign.data.formats.pairs import PAIRS
from rayalign.data.formats.scored import SCORED
from rayalign.data.formats.single import SINGLE
from rayalign.data.schema import Fields, RowProblem

FORMATS: Final[Mapping[str, Format]] = MappingProxyType({**PAIRS, **COMPARED, **SCORED, **SINGLE})
"""Name → format, in the order in which a row is held against them."""


def detect_format(row: Fields, *, nulls: frozenset[str] = frozenset(), named: Collection[str] = ()) -> str:
    """The format of a row with these columns.

    Args:
        row: the columns that hold something.
        nulls: columns that exist and hold nothing.
        named: columns that ``columns`` names: only formats that read all of them count.

    Raises:
        RowProblem: no format is certain; the reason says what to write.
    """
    if not named:
        _refuse_half_a_pair(row, nulls)
    for name, form in FORMATS.items():
        if named and not {*named} <= form.reads:
            continue
        seen = {**row, **dict.fromkeys(nulls & {*form.verdicts})} if nulls and form.verdicts else row
        if not form.fits(seen):
            continue
        if form.is_found(seen):
            return name
        if form.ask:
            raise RowProblem("", form.ask)
    null = _null_that_is_needed(row, nulls)
    if null is not None and not named:
        raise RowProblem(null, f"{null} is null")
    raise RowProblem("", nothing_found(row, named))


def refuse_what_none_learns(row: Fields) -> None:
    """Raise RowProblem for a row of media, of judged steps, or of a quarantine, which is no data."""
    for name in row:
        if MEDIA.fullmatch(name) and row[name]:
            raise RowProblem(name, f"{name} is no text: rayalign trains on text alone; leave rows with {name} out")
    steps = next((name for name in ("completions", "steps") if isinstance(row.get(name), list)), None)
    if steps is not None and isinstance(row.get("labels"), list):
        raise RowProblem(
            "labels", f"labels beside {steps} judge the steps of one answer: no method here learns from steps"
        )
    if row.keys() == QUARANTINE:
        raise RowProblem("", "the row is of a quarantine, a list of bad rows, and no data; leave the file out")


def refuse_markers(columns: Collection[str], texts: Iterable[str]) -> None:
    """Raise RowProblem where a text shows a picture that the row does not hold, as by a line ``<image>``.

    Where ``columns`` has one of media, even an empty one, every such marker counts.
    """
    marker = MARKER if any(map(MEDIA.fullmatch, columns)) else MARKER_ALONE
    if found := next(filter(None, map(marker.search, texts)), None):
        shown = found[0].strip()
        raise RowProblem(
            "", f"{shown} stands for what is no text: rayalign trains on text alone; leave rows with {shown} out"
        )


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
        named = first_known_name(others, PROMPTS) or others[0]
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


def _null_that_is_needed(row: Fields, nulls: frozenset[str]) -> str | None:
    """The column without which a row is of no format, though it would be of one if it held something there."""
    fitting = [form for form in FORMATS.values() if form.fits({*row, *nulls}) and form.holds(row)]
    lacking = [names for form in fitting if (names := sorted(_nulls_of(form, row, nulls)))]
    return min(lacking, key=len)[0] if lacking else None


def _nulls_of(form: Format, row: Fields, nulls: frozenset[str]) -> frozenset[str]:
    """The needed columns that are null; of a choice, every one."""
    lacking = (choice for choice in form.choices if row.keys().isdisjoint(choice))
    return nulls.intersection(chain.from_iterable(lacking))
