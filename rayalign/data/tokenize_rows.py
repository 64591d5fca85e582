"""From a unit of input to shards of a token store: the pure work of one preparation task."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
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
from rayalign.data.records import BadRow, RawRow, Row, append_quarantine
from rayalign.data.schema import Example, Preference
from rayalign.data.shard import SHARD_BYTES, Said, ShardInfo, ShardWriter
from rayalign.data.tables import read_rows
from rayalign.data.texts import kept_answers, said_to_keep
from rayalign.data.tokenize import DroppedRow, Outcome, Tokenized, to_groups
from rayalign.data.unpair import unpair
from rayalign.errors import UserError

Shape = Literal["one", "pair", "ranking", "group", "labelled", "prompt"]
"""What a method learns from: one completion, two, two or more in an order, any number, one with a label; or a prompt
alone."""

CHUNK_ROWS = 512
SHOWN_BAD_ROWS = 5
BAD_ROWS = "bad.jsonl"
"""Ending of a unit's file of bad rows. Its name begins with a dot, since it goes when the store is committed."""


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
class UnitReport:
    """What became of the rows of one unit: good + bad + dropped = rows.

    Dropped are good rows that the settings leave out, and comparisons in which nothing is preferred.
    """

    shards: tuple[ShardInfo, ...]
    """None where no row is good."""
    rows: int
    bad: int
    bad_rows: tuple[BadRow, ...]
    """The first of them."""
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

    def to_json(self) -> str:
        plain = {own.name: getattr(self, own.name) for own in fields(self)} | {"named": sorted(self.named)}
        plain |= {"shards": list(map(asdict, self.shards)), "bad_rows": list(map(asdict, self.bad_rows))}
        return json.dumps(plain, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> UnitReport:
        known = json.loads(text)
        known |= {name: Counter(known[name]) for name in ("formats", "unread", "metadata")}
        known["shards"] = tuple(map(ShardInfo.from_json, known["shards"]))
        known["bad_rows"] = tuple(BadRow(**row) for row in known["bad_rows"])
        return cls(**known | {"named": frozenset(known["named"])})


def read_chunks(unit: Unit) -> Iterator[list[Row]]:
    """The unit's rows, :data:`CHUNK_ROWS` at a time."""
    if unit.byte_range is not None:
        rows = read_range(unit.byte_range)
    else:
        numbers = frozenset(unit.columns.get(name, name) for name in NUMBERS)
        rows = read_rows(unit.path, numbers=numbers, first=unit.first, last=unit.last)
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
    examples = {place: item for place, item in enumerate(found) if isinstance(item, Example)}
    outcomes: dict[int, Outcome | UndecidedRow] = {
        place: item for place, item in enumerate(found) if not isinstance(item, Example)
    }
    outcomes |= zip(examples, to_groups(list(examples.values()), chat, budget, completed=completed), strict=True)
    return [outcomes[place] for place in range(len(found))]


@dataclass(slots=True)
class Counted:
    """Numbers of a unit's rows while they are read."""

    rows: int = 0
    bad: int = 0
    dropped: int = 0
    undecided: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    rules: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    metadata: Counter[str] = field(default_factory=Counter)
    named: set[str] = field(default_factory=set)

    def count(self, rows: Sequence[Row], unit: Unit, examples: Sequence[Example | BadRow]) -> None:
        good = [example for example in examples if isinstance(example, Example)]
        self.rows += len(rows)
        self.formats.update(example.format for example in good)
        self.unread.update(chain.from_iterable(example.unread for example in good))
        self.metadata.update(chain.from_iterable(example.metadata for example in good))
        self.named |= named_columns(rows, unit)

    def refuse(self, bad: Sequence[BadRow]) -> None:
        self.bad += len(bad)
        self.bad_rows += bad[: SHOWN_BAD_ROWS - len(self.bad_rows)]

    def report(self, shards: tuple[ShardInfo, ...]) -> UnitReport:
        return UnitReport(
            shards=shards,
            rows=self.rows,
            bad=self.bad,
            bad_rows=tuple(self.bad_rows),
            dropped=self.dropped + self.undecided,
            undecided=self.undecided,
            truncated_prompts=self.truncated_prompts,
            truncated_responses=self.truncated_responses,
            rules=dict(sorted(self.rules.items())),
            formats=self.formats,
            unread=self.unread,
            metadata=self.metadata,
            named=frozenset(self.named),
        )


class UnitWriter:
    """Parses, tokenizes and writes the rows of a unit, chunk by chunk, as shards whose names begin with ``name``.

    Bad rows are written to ``.<name>.bad.jsonl``. Memory is bounded by one chunk and the index of a shard.

    Raises:
        UserError: the unit sets a variable that the chat template does not read.
    """

    def __init__(
        self,
        unit: Unit,
        chat: Chat,
        budget: TokenBudget,
        *,
        completed: Completed,
        shape: Shape,
        directory: Path,
        name: str,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        refuse_unread_variables(unit, chat)
        self.unit = unit
        self.chat = chat
        self.budget = budget
        self.completed: Completed = completed
        self.shape: Shape = shape
        self.shards = ShardWriter(directory, name, shard_bytes=shard_bytes)
        self.quarantine = directory / f".{name}.{BAD_ROWS}"
        self.quarantine.unlink(missing_ok=True)
        self.counted = Counted()

    def add(self, rows: Sequence[Row]) -> None:
        examples = [parse_unit_row(row, self.unit) for row in rows]
        outcomes = tokenize_examples(
            [fit_to_method(example, self.shape) for example in examples],
            self.chat,
            self.budget,
            completed=self.completed,
        )
        groups, said = made_of(outcomes, self.shape, self.chat, self.counted)
        if groups:
            self.shards.append(groups, said)
        bad = [outcome for outcome in outcomes if isinstance(outcome, BadRow)]
        self.counted.count(rows, self.unit, examples)
        self.counted.refuse(bad)
        append_quarantine(self.quarantine, bad)

    def close(self) -> UnitReport:
        return self.counted.report(self.shards.close())


def prepare_rows(
    chunks: Iterable[Sequence[Row]],
    chat: Chat,
    budget: TokenBudget,
    *,
    completed: Completed = "no",
    unit: Unit,
    shape: Shape,
    directory: Path,
    name: str,
) -> UnitReport:
    """Write all ``chunks`` of a unit: see :class:`UnitWriter`."""
    writer = UnitWriter(unit, chat, budget, completed=completed, shape=shape, directory=directory, name=name)
    for rows in chunks:
        writer.add(rows)
    return writer.close()


def made_of(
    outcomes: Sequence[Outcome | UndecidedRow], shape: Shape, chat: Chat, counted: Counted
) -> tuple[list[Group], list[Said]]:
    """The groups of good rows, shaped for the method, and what their rows say; the others are counted."""
    groups: list[Group] = []
    prompts: list[Said] = []
    for outcome in outcomes:
        if not isinstance(outcome, Tokenized):
            counted.dropped += isinstance(outcome, DroppedRow)
            counted.undecided += isinstance(outcome, UndecidedRow)
            continue
        counted.truncated_prompts += outcome.truncation.prompt > 0
        counted.truncated_responses += sum(cut > 0 for cut in outcome.truncation.responses)
        counted.rules.update(outcome.rules)
        made = shape_group(outcome.group, shape, preference=outcome.example.preference)
        counted.undecided += not made
        groups.extend(made)
        for group in made:
            answers = kept_answers(outcome.example, outcome.group, group)
            prompts.append(said_to_keep(outcome.example, chat.speaker.template.variables, answers))
    return groups, prompts


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
