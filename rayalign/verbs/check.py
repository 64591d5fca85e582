"""``rayalign check``: read data wholly, as a run would, and say what is in them before anything is trained on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from rayalign.config.data import TokenBudget
from rayalign.data.analysis import FileFindings, Seen, prompt_key
from rayalign.data.budget import Completed
from rayalign.data.chat import Chat
from rayalign.data.group import Group
from rayalign.data.records import BadRow, Row, append_quarantine
from rayalign.data.schema import Example
from rayalign.data.tokenize import Tokenized
from rayalign.data.tokenize_rows import (
    Shape,
    UndecidedRow,
    Unit,
    fit_to_method,
    named_columns,
    parse_unit_row,
    refuse_unread_variables,
    shape_group,
    tokenize_examples,
)
from rayalign.errors import UserError
from rayalign.report.formatting import filter_sentence, printable
from rayalign.verbs.findings_table import findings_table
from rayalign.verbs.show import LEGEND, row_lines

if TYPE_CHECKING:
    from rayalign.verbs.filter_preview import RowScores

Chunks = Callable[[], Iterator[tuple[Unit, list[Row]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One source, and what it is read for."""

    title: str
    """As tables call it."""
    path: str
    """A file or dataset, or a function, as messages call it."""
    chunks: Chunks
    """Its rows; raises UserError where they cannot be read."""
    shape: Shape | None = None
    """What the method learns from; None where no method is named."""
    needs: frozenset[str] = frozenset()
    """What every row must have."""
    columns: Mapping[str, str] = field(default_factory=dict)
    max_bad_fraction: float = 0.0
    completed: Completed = "no"
    """Whether fresh completions follow the prompts."""
    is_scored: bool = False
    """Whether ``filter`` chooses among its rows."""
    is_held_out: bool = False
    """Its rows are not trained on, so that they are compared with no other."""
    refuse: Callable[[Group], None] | None = None
    """Raises UserError for a row that one of the run's models cannot read; None where no run is checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checking:
    """How sources are checked, the same for all."""

    chat: Chat | None
    budget: TokenBudget
    show: int = 0
    held_out: Sequence[Checked] = ()
    """Sources of which only the prompts are read."""
    quarantine: Path | None = None
    """A new file of all bad rows; None: there is none."""
    scores: RowScores | None = None
    policy_logp_quantile: float | None = None
    as_json: bool = False


def check(sources: Sequence[Checked], how: Checking, console: Console) -> int:
    """Print what is in ``sources``.

    Returns:
        0; 1 where a run would refuse a source for its rows; 2 where a source cannot be read at all.
    """
    if how.quarantine is not None:
        how.quarantine.unlink(missing_ok=True)
    unreadable: list[str] = []
    seen = Seen(eval_prompts=frozenset(_prompts(how.held_out, unreadable)))
    if how.show and not how.as_json:
        console.print(Text(LEGEND, style="dim"), soft_wrap=True)
    findings: list[tuple[Checked, FileFindings]] = []
    for source in sources:
        found = FileFindings(source=source.title)
        try:
            _read(source, found, Seen() if source.is_held_out else seen, how, console)
        except UserError as error:
            unreadable.append(_located(source, str(error)))
        else:
            findings.append((source, found))
    _print([found for _, found in findings], unreadable, how, console)
    if unreadable:
        return 2
    return int(any(_is_refused(source, found) for source, found in findings))


def _located(source: Checked, message: str) -> str:
    """The message with the place of the source, which it may name already."""
    field = source.title.removesuffix(source.path)
    return f"{field}{message}" if source.path in message else f"{field}{source.path}: {message}"


def _is_refused(source: Checked, found: FileFindings) -> bool:
    """Whether a run would end at this source."""
    left = found.good - found.left_out - found.counts["dropped"]
    too_many = found.bad > source.max_bad_fraction * (found.good + found.bad)
    return too_many or bool(source.shape and left <= 0) or any(found.lacking.values())


def _read(source: Checked, found: FileFindings, seen: Seen, how: Checking, console: Console) -> None:
    """Count every row of a source into ``found``, and show the first ones."""
    left, named = how.show if how.chat and not how.as_json else 0, frozenset[str]()
    for unit, rows in source.chunks():
        named |= named_columns(rows, unit)
        if how.chat is not None:
            refuse_unread_variables(unit, how.chat)
        examples = [_fitted(row, unit, source.shape) for row in rows]
        for row, example in zip(rows[:left], examples[:left], strict=True):
            assert how.chat is not None
            for text in row_lines(row, example, how.chat, how.budget, completed=source.completed):
                console.print(text, soft_wrap=True)
        left = max(0, left - len(rows))
        bad = _count(examples, source, found, seen, how)
        if how.quarantine is not None:
            append_quarantine(how.quarantine, bad)
    absent = [theirs for theirs in source.columns.values() if theirs not in named]
    if absent:
        raise UserError(f"columns names {absent[0]}, and no row has it; check the spelling")


def _fitted(row: Row, unit: Unit, shape: Shape | None) -> Example | BadRow | UndecidedRow:
    example = parse_unit_row(row, unit)
    return example if shape is None else fit_to_method(example, shape)


def _count(
    examples: Sequence[Example | BadRow | UndecidedRow], source: Checked, found: FileFindings, seen: Seen, how: Checking
) -> list[BadRow]:
    """Count a chunk of rows; the bad ones."""
    needs = source.needs - {"label"} if source.shape == "labelled" else source.needs  # a pair's labels are its sides
    for example in examples:
        if isinstance(example, BadRow):
            found.add_bad(example)
        elif isinstance(example, UndecidedRow):
            found.add_left_out(example.example)
        else:
            found.add_text(example, seen)
            found.add_lacking(example, needs)
    bad = [example for example in examples if isinstance(example, BadRow)]
    if how.chat is None:
        return bad
    outcomes = tokenize_examples(examples, how.chat, how.budget, completed=source.completed)
    groups: list[Group] = []
    for example, outcome in zip(examples, outcomes, strict=True):
        if isinstance(example, Example) and not isinstance(outcome, UndecidedRow):
            found.add_tokens(example, outcome, how.chat)
            bad += [outcome] if isinstance(outcome, BadRow) else []
        if isinstance(outcome, Tokenized):
            if source.refuse is not None:
                source.refuse(outcome.group)
            made = shape_group(outcome.group, source.shape or "group", preference=outcome.example.preference)
            found.left_out += not made
            groups += made
    if how.scores is not None and source.is_scored:
        how.scores.add(groups)
    return bad


def _prompts(sources: Sequence[Checked], unreadable: list[str]) -> Iterator[bytes]:
    for source in sources:
        try:
            for unit, rows in source.chunks():
                found = (parse_unit_row(row, unit) for row in rows)
                yield from (prompt_key(example) for example in found if isinstance(example, Example))
        except UserError as error:
            unreadable.append(str(error))


def _print(findings: Sequence[FileFindings], unreadable: Sequence[str], how: Checking, console: Console) -> None:
    quantile = how.policy_logp_quantile
    filtering = how.scores.facts(quantile) if how.scores and quantile else None
    if how.as_json:
        report: dict[str, Any] = {"files": [found.as_json() for found in findings], "unreadable": unreadable}
        if how.scores:
            report["filter"] = filtering
        console.print_json(json.dumps(report))
        return
    for found in findings:
        console.print(Text(printable(found.source), style="italic"), soft_wrap=True)
        console.print(findings_table(found))
    if how.scores:
        said = filter_sentence(**filtering) if filtering else "no row has a completion to score"
        console.print(f"filter {quantile:g} by {how.scores.name}: {said}", highlight=False, soft_wrap=True)
    for message in unreadable:
        console.print(Text(printable(message), style="red"), soft_wrap=True)
