"""From a unit of input to one shard of a token store: the pure work of one preparation task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from rayalign.config.data import TokenBudget
from rayalign.data.budget import Completed
from rayalign.data.chat import Chat
from rayalign.data.formats import ANSWERS, NUMBERS, first_known_name, parse_row
from rayalign.data.group import Group
from rayalign.data.lines import ByteRange, read_range
from rayalign.data.rank import rank_group
from rayalign.data.records import BadRow, RawRow, Row
from rayalign.data.schema import Example, Preference
from rayalign.data.shard import Said, ShardInfo, write_shard
from rayalign.data.tables import read_rows
from rayalign.data.texts import kept_answers, said_to_keep
from rayalign.data.tokenize import DroppedRow, Outcome, Tokenized, to_groups
from rayalign.data.unpair import unpair
from rayalign.errors import UserError

Shape = Literal["one", "pair", "ranking", "group", "labelled", "prompt"]
"""What a method learns from: one completion, two, two or more in an order, any number, one with a label; or a prompt
alone."""

CHUNK_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Something that one task reads from start to end, and how its rows are meant."""

    path: str
    byte_range: ByteRange | None = None
    """Part of a file of lines; None for the whole of a file."""
    first: int = 0
    """Rows before this one are not read."""
    last: int | None = None
    """Nor this one and those after it; None: up to the end."""
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UndecidedRow:
    """A good row that teaches this method nothing: it does not say which of its answers is better."""

    example: Example


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """What became of one chunk of rows: good + bad + dropped = rows.

    Dropped are good rows that the settings leave out, and comparisons in which nothing is preferred.
    """

    shard: ShardInfo | None
    """None when no row of the chunk is good."""
    rows: int
    bad: tuple[BadRow, ...]
    dropped: int
    undecided: int
    """Dropped rows in which no answer is preferred."""
    truncated_prompts: int
    truncated_responses: int
    rules: Mapping[str, int]
    """In how many rows each of :data:`rayalign.data.render.RULES` was applied."""
    formats: Counter[str]
    unread: Counter[str]
    """Columns that hold something and were not read, in how many rows."""
    metadata: Counter[str]
    """The same of columns that only describe their row."""
    named: frozenset[str]
    """The file's columns that ``columns`` names and some row has."""


def read_chunks(unit: Unit) -> Iterator[list[Row]]:
    """The unit's rows, :data:`CHUNK_ROWS` at a time."""
    if unit.byte_range is not None:
        rows = read_range(unit.byte_range)
    else:
        rows = read_rows(unit.path, numbers=frozenset(unit.columns.get(name, name) for name in NUMBERS))
    rows = islice(rows, unit.first, unit.last)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


def parse_unit_row(row: Row, unit: Unit) -> Example | BadRow:
    """The row as its unit says that it is meant."""
    if isinstance(row, BadRow):
        return row
    return parse_row(
        row, format=unit.format, columns=unit.columns, system=unit.system, template_kwargs=unit.template_kwargs
    )


def fit_to_method(found: Example | BadRow, shape: Shape) -> Example | BadRow | UndecidedRow:
    """The example, or why a method that learns from ``shape`` does not."""
    if isinstance(found, BadRow):
        return found
    if found.preference == "undecided" and shape in ("pair", "ranking", "labelled"):
        return UndecidedRow(found)
    problem = why_unfit(found, shape)
    return BadRow(source=found.source, line=found.line, reason=problem) if problem else found


def tokenize_examples(
    found: Sequence[Example | BadRow | UndecidedRow], chat: Chat, budget: TokenBudget, *, completed: Completed
) -> list[Outcome | UndecidedRow]:
    """One outcome per row, in order."""
    outcomes = iter(to_groups([item for item in found if isinstance(item, Example)], chat, budget, completed=completed))
    return [next(outcomes) if isinstance(item, Example) else item for item in found]


def prepare_chunk(
    rows: Sequence[Row],
    chat: Chat,
    budget: TokenBudget,
    *,
    completed: Completed = "no",
    unit: Unit,
    shape: Shape,
    directory: Path,
    name: str,
) -> ShardReport:
    """Parse, tokenize and write one chunk as shard ``name``.

    Raises:
        UserError: the unit sets a variable that the chat template does not read.
    """
    refuse_unread_variables(unit, chat)
    examples = [parse_unit_row(row, unit) for row in rows]
    outcomes = tokenize_examples(
        [fit_to_method(example, shape) for example in examples], chat, budget, completed=completed
    )
    groups: list[Group] = []
    prompts: list[Said] = []
    rules: Counter[str] = Counter()
    cut_prompts = cut_responses = undecided = dropped = 0
    for outcome in outcomes:
        if isinstance(outcome, Tokenized):
            cut_prompts += outcome.truncation.prompt > 0
            cut_responses += sum(cut > 0 for cut in outcome.truncation.responses)
            rules.update(outcome.rules)
            made = shape_group(outcome.group, shape, preference=outcome.example.preference)
            undecided += not made
            groups.extend(made)
            for group in made:
                answers = kept_answers(outcome.example, outcome.group, group)
                prompts.append(said_to_keep(outcome.example, chat.speaker.template.variables, answers))
        else:
            dropped += isinstance(outcome, DroppedRow)
            undecided += isinstance(outcome, UndecidedRow)
    good = [example for example in examples if isinstance(example, Example)]
    return ShardReport(
        shard=write_shard(directory, name, groups, prompts=prompts) if groups else None,
        rows=len(rows),
        bad=tuple(outcome for outcome in outcomes if isinstance(outcome, BadRow)),
        dropped=dropped + undecided,
        undecided=undecided,
        truncated_prompts=cut_prompts,
        truncated_responses=cut_responses,
        rules=dict(sorted(rules.items())),
        formats=Counter(example.format for example in good),
        unread=Counter(chain.from_iterable(example.unread for example in good)),
        metadata=Counter(chain.from_iterable(example.metadata for example in good)),
        named=named_columns(rows, unit),
    )


def refuse_unread_variables(unit: Unit, chat: Chat) -> None:
    """Raise UserError where the unit sets a variable of the chat template that it does not read."""
    template = chat.speaker.template
    unread = template.unread(list(unit.template_kwargs)) if template.exists else list(unit.template_kwargs)
    if unread:
        raise UserError(f"chat_template_kwargs: the chat template does not read {', '.join(unread)}; leave it out")


def named_columns(rows: Sequence[Row], unit: Unit) -> frozenset[str]:
    """The file's columns that ``columns`` names and some row has."""
    wanted = frozenset(unit.columns.values())
    return wanted.intersection(chain.from_iterable(row.value for row in rows if isinstance(row, RawRow)))


def why_unfit(example: Example, shape: Shape) -> str:
    """Why a method that learns from ``shape`` cannot use the row; empty when it can."""
    found = len(example.candidates)
    if shape == "prompt":
        return ""
    if found == 0:
        return f"this method learns from answers, and the row has a prompt alone{_unread(example, shape)}"
    if shape == "ranking" and example.preference == "unstated":
        return "a row of `completions` without `rewards` does not say which is preferred"
    if shape in ("pair", "labelled") and example.preference in ("unstated", "rewards", "ranks"):
        return (
            f"a row of the format {example.format} does not say which of two is preferred: write label: "
            "{relabel: true} with a scorer, or make pairs with rayalign score --pairs"
        )
    if shape == "pair" and found != 2:
        told = _unread(example, shape)
        return f"a pairwise method needs chosen and rejected, and this row has {found} completion(s){told}"
    if shape == "one" and found != 1:
        return f"this method needs one completion, and this row has {found}; use `columns: {{completion: chosen}}`"
    if shape == "one" and example.preference == "undecided":
        plain = "messages" if example.format == "labelled_messages" else "prompt_completion"
        return f"this method learns every completion, and this row's label is null: write format: {plain}"
    if shape == "one" and ("label" in example.columns or example.preference != "stored"):
        return (
            "this method learns every completion that it is given, and this row's has a label or a score: keep what "
            "is to be learned, in rows of prompt and completion alone"
        )
    if shape in ("group", "ranking") and found < 2:
        return f"this method compares completions of one prompt, and this row has {found}{_unread(example, shape)}"
    if shape == "labelled" and found != 2 and "label" not in example.columns:
        return "this method needs `completion` with `label`, or `chosen` and `rejected`"
    return ""


_WANTED: Mapping[Shape, str] = {
    "one": "completion: …",
    "pair": "chosen: …, rejected: …",
    "labelled": "completion: …, label: …",
    "group": "completions: …, rewards: …",
    "ranking": "chosen: …, rejected: …",
}


def _unread(example: Example, shape: Shape) -> str:
    """The columns that may be what is missing."""
    if not example.unread:
        return ""
    wanted, answer = _WANTED[shape], first_known_name(example.unread, ANSWERS)
    if shape == "one" and answer is not None:
        wanted = f"completion: {answer}"
    return f"; not read: {', '.join(example.unread)}. Name what is meant: columns: {{{wanted}}}"


def shape_group(group: Group, shape: Shape, *, preference: Preference = "stored") -> tuple[Group, ...]:
    """The group as the method takes it: pairs become two labelled examples for a method of labelled ones.

    None is left of a ranking in which nothing is preferred.
    """
    if shape == "ranking":
        return rank_group(group, by_reward=preference == "rewards")
    if shape == "labelled" and "label" not in group.per_candidate:
        return unpair(group)
    return (group,)
