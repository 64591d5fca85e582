"""From a unit of input to one shard of a token store: the pure work of one preparation task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rayalign.data.chat import Chat
from rayalign.data.group import Group
from rayalign.data.lines import ByteRange, read_range
from rayalign.data.rank import ranked
from rayalign.data.records import BadRow, RawRow, Row
from rayalign.data.schema import Example
from rayalign.data.shard import Said, ShardInfo, write_shard
from rayalign.data.tables import LINE_SUFFIXES, read_rows
from rayalign.data.texts import kept_answers, said
from rayalign.data.tokenize import DroppedRow, Tokenized, TokenizeSettings, rows_to_groups
from rayalign.data.unpair import unpair

Shape = Literal["one", "pair", "ranking", "group", "labelled", "prompt"]
"""What a method learns from: one completion, two, two or more in an order, any number, one with a label; or a prompt
alone."""

CHUNK_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Something that one task reads from start to end."""

    path: str
    byte_range: ByteRange | None = None
    """Part of a file of lines; None for a table or a dataset."""
    split: str = "train"
    revision: str | None = None
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """What became of one chunk of rows: good + bad + dropped = rows.

    Dropped are good rows that the settings leave out, and rankings in which every answer ties.
    """

    shard: ShardInfo | None
    """None when no row of the chunk is good."""
    rows: int
    bad: tuple[BadRow, ...]
    dropped: int
    truncated_prompts: int
    truncated_responses: int
    rules: Mapping[str, int]
    """Of :data:`rayalign.data.render.RULES`: in how many rows each."""


def read_chunks(unit: Unit) -> Iterator[list[Row]]:
    """The unit's rows, :data:`CHUNK_ROWS` at a time."""
    if unit.path.endswith(LINE_SUFFIXES):
        rows = read_range(unit.byte_range or ByteRange(source=unit.path))
    else:
        rows = read_rows(unit.path, split=unit.split, revision=unit.revision)
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def prepare_chunk(
    rows: Sequence[Row],
    chat: Chat,
    settings: TokenizeSettings,
    *,
    unit: Unit,
    shape: Shape,
    directory: Path,
    name: str,
) -> ShardReport:
    """Parse, tokenize and write one chunk as shard ``name``."""
    outcomes = rows_to_groups(rows, chat, settings, format=unit.format, columns=unit.columns)
    groups: list[Group] = []
    prompts: list[Said] = []
    bad: list[BadRow] = []
    cut_prompts = cut_responses = dropped = 0
    rules: Counter[str] = Counter()
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, BadRow):
            bad.append(outcome)
        elif isinstance(outcome, DroppedRow):
            dropped += 1
        elif (problem := misfit(outcome.example, shape)) and isinstance(row, RawRow):
            bad.append(BadRow(source=row.source, line=row.line, reason=problem))
        else:
            assert isinstance(outcome, Tokenized)
            cut_prompts += outcome.truncation.prompt > 0
            cut_responses += sum(cut > 0 for cut in outcome.truncation.responses)
            rules.update(outcome.rules)
            made = shaped(outcome.group, shape, format=outcome.example.format)
            dropped += not made
            groups.extend(made)
            for group in made:
                answers = kept_answers(outcome.example, outcome.group, group)
                prompts.append(said(outcome.example, chat.speaker.template.variables, answers))
    return ShardReport(
        shard=write_shard(directory, name, groups, prompts=prompts) if groups else None,
        rows=len(rows),
        bad=tuple(bad),
        dropped=dropped,
        truncated_prompts=cut_prompts,
        truncated_responses=cut_responses,
        rules=dict(sorted(rules.items())),
    )


def misfit(example: Example, shape: Shape) -> str:
    """Why a method that learns from ``shape`` cannot use the row; empty when it can."""
    found = len(example.candidates)
    if shape == "ranking" and example.format == "ranked" and "reward" not in example.columns:
        return "a row of `completions` without `rewards` does not say which is preferred"
    if shape in ("pair", "labelled") and example.format == "ranked":
        return (
            "a row of `completions` does not say which is preferred: write label: {relabel: true} with a scorer, or "
            "make pairs with rayalign score --pairs"
        )
    if shape == "pair" and found != 2:
        return f"a pairwise method needs chosen and rejected, and this row has {found} completion(s)"
    if shape == "one" and found != 1:
        return f"this method needs one completion, and this row has {found}; use `columns: {{completion: chosen}}`"
    if shape in ("group", "ranking") and found < 2:
        return f"this method compares completions of one prompt, and this row has {found}"
    if shape == "labelled" and found != 2 and "label" not in example.columns:
        return "this method needs `completion` with `label`, or `chosen` and `rejected`"
    return ""


def shaped(group: Group, shape: Shape, *, format: str = "preference") -> tuple[Group, ...]:
    """The group as the method takes it: pairs become two labelled examples for a method of labelled ones.

    None is left of a ranking in which nothing is preferred.
    """
    if shape == "ranking":
        return ranked(group, by_reward=format == "ranked")
    if shape == "labelled" and "label" not in group.per_candidate:
        return unpair(group)
    return (group,)
