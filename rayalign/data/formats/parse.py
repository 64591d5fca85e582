"""A row as an example, with the columns that were not read; or why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from rayalign.data.formats.base import CONVERSATION, FINISHED, Body, Format, Texts, lone_scores
from rayalign.data.formats.detect import (
    FORMATS,
    detect_format,
    refuse_markers,
    refuse_uncertain_prompt,
    refuse_what_none_learns,
)
from rayalign.data.formats.names import is_metadata, is_said
from rayalign.data.formats.system import system_of, with_system
from rayalign.data.formats.tools import tools_of
from rayalign.data.nulls import from_arrow, was_in_a_table
from rayalign.data.records import BadRow, RawRow
from rayalign.data.schema import Example, Fields, RowProblem, bad_row, finished_flags
from rayalign.data.schema import template_kwargs as row_kwargs
from rayalign.errors import UserError

OPTIONAL = frozenset().union(*(form.verdicts for form in FORMATS.values()))
NEEDED = frozenset[str]().union(*chain.from_iterable(form.choices for form in FORMATS.values())) - OPTIONAL
"""Columns that no row of some format may lack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fielded:
    """A row under our names."""

    held: Mapping[str, Any]
    """Columns that hold something."""
    nulls: frozenset[str]
    """Columns that exist and hold nothing."""
    replaced: frozenset[str]
    """The file's columns whose name `columns` gives to another."""


def parse_row(
    row: RawRow,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Example | BadRow:
    """The row as an example, or the field and reason why not.

    Args:
        format: a name of :data:`FORMATS`, or ``auto`` to find it by the row's columns.
        columns: our column → the file's column, where the names differ.
        system: stands before conversations that have no system turn.
        template_kwargs: for the chat template, where the row does not say otherwise.

    Raises:
        UserError: ``format`` is not a format.
    """
    if format != "auto" and format not in FORMATS:
        raise UserError(f"data.format: {format!r} is not a format; take auto or one of {', '.join(FORMATS)}")
    try:
        return _example(row, format, columns or {}, system, template_kwargs or {})
    except RowProblem as problem:
        return bad_row(row, problem)


def _example(
    row: RawRow, format: str, columns: Mapping[str, str], system: str | None, defaults: Mapping[str, Any]
) -> Example:
    fields = rename_columns(from_arrow(row.value) if was_in_a_table(row.value) else row.value, columns)
    refuse_what_none_learns(fields.held)
    name = detect_format(fields.held, nulls=fields.nulls, named=columns) if format == "auto" else format
    form = FORMATS[name]
    _refuse_nulls(form, fields, is_found=format == "auto")
    body = form.read(fields.held)
    unread, metadata = not_read(form, fields, body)
    refuse_markers(row.value, _texts(body))
    if format == "auto" and "prompt" not in columns:
        refuse_uncertain_prompt(name, form, fields.held, unread, body)
    prompt, candidates = body.prompt, body.candidates
    if form.is_conversation and not body.continues:
        prompt, candidates = with_system(prompt, candidates, system_of(fields.held), default=system)
    return Example(
        format=name,
        prompt=prompt,
        candidates=candidates,
        columns=body.columns,
        continues=body.continues,
        preference=body.preference,
        finished=finished_flags(fields.held, len(candidates)) if FINISHED in form.may else None,
        tools=tools_of(fields.held, body.tools) if form.is_conversation else None,
        template_kwargs={**defaults, **row_kwargs(fields.held)} if form.is_conversation else {},
        unread=tuple(unread),
        metadata=tuple(metadata),
        source=row.source,
        line=row.line,
    )


def rename_columns(row: Fields, columns: Mapping[str, str]) -> Fielded:
    """The row under our names; raises RowProblem where a column that a format needs under its new name is not there."""
    for ours, theirs in columns.items():
        if ours in NEEDED and row.get(theirs) is None:
            what = "null" if theirs in row else "missing"
            raise RowProblem(theirs, f"{theirs} is {what}, which `columns` names as {ours}")
    moved = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    fields = {**kept, **moved}
    return Fielded(
        held={name: value for name, value in fields.items() if value is not None},
        nulls=frozenset(name for name, value in fields.items() if value is None),
        replaced=frozenset(kept.keys() & moved.keys()),
    )


def not_read(form: Format, fields: Fielded, body: Body) -> tuple[list[str], list[str]]:
    """(columns that hold something and were not read, those of them that only describe the row or repeat it)."""
    reads = form.read_of(fields.held) - lone_scores(fields.held) - ({*CONVERSATION} if body.continues else set())
    texts = _texts(body)
    unread: list[str] = [name for name in fields.replaced if not is_metadata(name)]
    told: list[str] = [name for name in fields.replaced if is_metadata(name)]
    for name, value in fields.held.items():
        if name in reads or value in ("", [], {}):
            continue
        quiet = name not in form.verdicts and (is_metadata(name) or name in form.leaves or is_said(value, texts))
        (told if quiet else unread).append(name)
    return unread, told


def _texts(body: Body) -> frozenset[str]:
    """What was read, turn by turn."""
    return frozenset(chain.from_iterable(map(_contents, (body.prompt, *body.candidates))))


def _contents(part: Texts) -> list[str]:
    return [part.strip()] if isinstance(part, str) else [turn["content"].strip() for turn in part]


def _refuse_nulls(form: Format, fields: Fielded, *, is_found: bool) -> None:
    for names in form.choices if fields.nulls else ():
        null = next((name for name in names if name in fields.nulls and name not in form.verdicts), None)
        if null is not None and not any(name in fields.held for name in names):
            raise RowProblem(null, f"{null} is null")
    if is_found and form.guesses_prompt and "prompt" in fields.nulls:
        raise RowProblem("prompt", "prompt is null")
