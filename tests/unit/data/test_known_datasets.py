"""Rows as data sets have them: what each means, also with columns in another order, added, missing or null."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from known_rows import KNOWN, Known, reply, said

from rayalign.data.formats import FORMATS, parse_row
from rayalign.data.records import BadRow, RawRow
from rayalign.data.schema import Example
from rayalign.data.tables import read_rows
from rayalign.data.tokenize_rows import Shape, UndecidedRow, fit_to_method

CASES = pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN.keys())
FOUND = {name: known for name, known in KNOWN.items() if not known.is_named and not known.renamed}
OUTCOMES = ("format", "prompt", "candidates", "columns", "preference", "tools", "unread", "metadata")


def parse(row: Any, known: Known, **options: Any) -> Example | BadRow:
    given = {"format": known.format if known.is_named else "auto", "columns": known.renamed, **options}
    return parse_row(RawRow(source="f", line=1, value=row), **given)


def frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def meaning(example: Example | BadRow) -> dict[str, Any]:
    assert isinstance(example, Example), example
    return {name: getattr(example, name) for name in OUTCOMES}


def expected(known: Known, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    found = {name: getattr(known, name) for name in OUTCOMES}
    kept = {name: tuple(own for own in found[name] if own not in without) for name in ("unread", "metadata")}
    return found | {
        "prompt": frozen(known.prompt),
        "candidates": tuple(map(frozen, known.candidates)),
        **kept,
    }


@CASES
def test_means_what_it_says(known: Known) -> None:
    assert meaning(parse(known.row, known)) == expected(known)


@CASES
def test_by_name(known: Known) -> None:
    assert meaning(parse(known.row, known, format=known.format)) == expected(known)


@CASES
def test_in_another_order(known: Known) -> None:
    found = meaning(parse(dict(reversed(known.row.items())), known))
    assert {name: found[name] for name in OUTCOMES[:6]} == {name: expected(known)[name] for name in OUTCOMES[:6]}
    assert {*found["unread"]} == {*known.unread}


@CASES
def test_with_further_columns(known: Known) -> None:
    """One that describes the row is told quietly, another loudly; neither changes what the row means."""
    further = {"uuid": "1", "loudness": 3, "empty": [], "nothing": None}
    found = parse({**further, **known.row}, known)
    told = {"unread": ("loudness", *known.unread), "metadata": ("uuid", *known.metadata)}
    assert meaning(found) == expected(known) | told


@CASES
def test_without_optional_columns(known: Known) -> None:
    row = {name: value for name, value in known.row.items() if name not in known.optional}
    assert meaning(parse(row, known)) == expected(known, without=known.optional)


@CASES
def test_from_a_table_whose_other_rows_have_other_columns(known: Known, tmp_path: Path) -> None:
    """Arrow fills what a row lacks with null."""
    other = {"zzz": "another shape", "margin": 1.0, "behavior_logps": [1.0], "soft_label": 0.5, "extra_id": 1}
    kept = {name: value for name, value in other.items() if name not in known.row}
    path = str(tmp_path / "rows.parquet")
    nulls = dict.fromkeys([*known.row, *kept])
    pq.write_table(pa.Table.from_pylist([nulls | known.row, nulls | kept]), path)
    row = next(iter(read_rows(path)))
    assert isinstance(row, RawRow) and row.value["zzz"] is None
    found = meaning(parse(row.value, known))
    assert {name: found[name] for name in ("format", "columns", "preference")} == {
        name: expected(known)[name] for name in ("format", "columns", "preference")
    }
    assert found["prompt"] == expected(known)["prompt"] and len(found["candidates"]) == len(known.candidates)


@pytest.mark.parametrize("known", [known for known in KNOWN.values() if known.is_named], ids=lambda known: known.format)
def test_what_is_not_certain_is_refused_with_the_words_to_write(known: Known) -> None:
    bad = parse(known.row, known, format="auto")
    assert isinstance(bad, BadRow) and f"write format: {known.format}" in bad.reason


def test_every_format_has_a_known_row_or_a_documented_one() -> None:
    plain = {"hh", "prompt_completion", "text", "prompt_only"}
    assert {*FORMATS} == {known.format for known in KNOWN.values()} | plain


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_reads_what_it_declares_and_nothing_else(name: str) -> None:
    """Held against the columns that its function really asks a row for."""
    form = FORMATS[name]
    for known in (own for own in KNOWN.values() if own.format == name):
        row = {ours: known.row[theirs] for ours, theirs in known.renamed.items()} | known.row
        asked = Asked({key: value for key, value in row.items() if value is not None})
        form.read(asked)
        assert asked.names <= form.reads, name


class Asked(dict[str, Any]):
    """A row that remembers which columns were looked at."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)


def test_a_conversation_as_json_text_is_one_also_with_other_names() -> None:
    row = {"conversations": json.dumps([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}])}
    example = parse_row(RawRow(source="f", line=1, value=row))
    assert isinstance(example, Example) and (example.prompt, *example.candidates) == (
        tuple(said("Q")),
        tuple(reply("A")),
    )


def test_the_score_of_one_side_alone_is_told_where_others_wrote_the_columns() -> None:
    """As in the Intel pairs; in columns of our own names it is a slip."""
    row = {"input": "Q", "chosen": "A", "rejected": "B", "chosen_score": 3}
    example = parse_row(RawRow(source="f", line=1, value=row))
    assert isinstance(example, Example) and (dict(example.columns), example.unread) == ({}, ("chosen_score",))
    bad = parse_row(RawRow(source="f", line=1, value={**row, "prompt": "Q"}))
    assert isinstance(bad, BadRow) and bad.reason.startswith("rejected_score is missing")


ODD: list[Any] = [
    None, "", "x", 0, 1, -1, 2.5, True, [], {}, ["a"], [None], [{}], [[]], [["a", "b"]], {"a": 1}, math.nan, 10**400,
    '[{"role": "user", "content": "x"}]', said("a"), reply("a"), {"role": "assistant", "content": []},
    [{"from": "gpt", "value": None}], [{"role": 3, "content": "x"}], [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "tool_result"}]}], [{"answer": "a", "rank": None}, {"answer": "b"}],
    [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}], [{"text": "a"}, {"text": None}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": [], "function": None}]}],
    [{"response": "a", "overall_score": "x"}],
]  # fmt: skip
FURTHER = ("system", "tools", "functions", "finished", "margin", "label", "messages", "images", "prompt", "chosen")


def changed(value: Any, draw: random.Random, depth: int = 0) -> Any:
    """The value with something odd in its place, or somewhere in it."""
    if value and depth < 3 and isinstance(value, dict | list) and draw.random() < 0.6:
        places = list(value) if isinstance(value, dict) else range(len(value))
        place, copy = draw.choice(places), value.copy()
        copy[place] = changed(value[place], draw, depth + 1)
        return copy
    return draw.choice(ODD)


def test_no_row_is_so_odd_that_it_ends_a_run() -> None:
    """It is an example or a bad row, under any format and for any method."""
    draw = random.Random(0)
    shapes: tuple[Shape, ...] = ("one", "pair", "ranking", "group", "labelled", "prompt")
    outcomes = set()
    for _ in range(4_000):
        known = draw.choice(list(KNOWN.values()))
        row = dict(known.row)
        for column in (draw.choice([*row]), draw.choice([*row, *FURTHER])):
            row[column] = changed(row.get(column), draw)
        format = draw.choice(["auto", known.format, draw.choice(list(FORMATS))])
        found = parse_row(RawRow(source="f", line=1, value=row), format=format, system=draw.choice([None, "S"]))
        outcomes |= {type(fit_to_method(found, shape)) for shape in shapes}
    assert outcomes == {Example, BadRow, UndecidedRow}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two preferences": (
        {"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 0, "safer_response_id": 1},
        "write columns: {preferred: better_response_id} for the more helpful answer, or columns: {preferred: "
        "safer_response_id}",
    ),
    "an unsigned preference": (
        {"prompt": "Q", "response_1": "A", "response_2": "B", "preference": 1},
        "write format: helpsteer_preference if negative",
    ),
    "a question and an answer": ({"question": "Q", "answer": "A"}, "write format: question_answer"),
    "a null prompt before texts": ({"prompt": None, "chosen": "The A", "rejected": "The B"}, "prompt is null"),
    "a null prompt before turns": (
        {"prompt": None, "chosen": said("Q", "A"), "rejected": said("Q", "B")}, "prompt is null",
    ),
    "a null prompt beside a question": (
        {"prompt": None, "question": "Q", "chosen": "A", "rejected": "B"}, "prompt is null",
    ),
    "a null prompt before a completion": ({"prompt": None, "completion": "A"}, "prompt is null"),
    "an unknown column before texts": (
        {"riddle": "Q", "chosen": "The A", "rejected": "The B"},
        "riddle could be the prompt, or a part of it: write columns: {prompt: riddle}",
    ),
    "a context beside a question": (
        {"context": "C", "question": "Q", "chosen": "A", "rejected": "B"},
        "context could be the prompt, or a part of it",
    ),
    "a system prompt before texts": (
        {"system": "S", "chosen": "The A", "rejected": "The B"}, "system could be the prompt",
    ),
    "a question that the turns do not hold": (
        {"question": "R", "chosen": said("Q", "A"), "rejected": said("Q", "B")}, "question could be the prompt",
    ),
    "two questions": (
        {"question": "Q", "input": "R", "chosen": "A", "rejected": "B"}, "question and input could both be meant",
    ),
    "steps": ({"prompt": "Q", "completions": ["a", "b"], "labels": [True, False]}, "no method here learns from steps"),
    "steps in their own column": (
        {"question": "Q", "steps": ["a", "b"], "labels": [1, 0]}, "labels beside steps judge the steps of one answer",
    ),
    "a path of an image": ({"image_path": "a.png", "prompt": "Q", "completion": "A"}, "image_path is no text"),
    "a context beside an instruction": (
        {"instruction": "Q", "context": "C", "response": "A"},
        "columns: {prompt: instruction, completion: response} (which leaves out context: put what belongs together",
    ),
    "sides by other names": (
        {"instruction": "Q", "chosen_rating": 5, "chosen_response": "A", "rejected_response": "B"},
        "columns: {prompt: instruction, chosen: chosen_response, rejected: rejected_response}",
    ),
    "a title beside a text": ({"title": "T", "text": "X"}, "or write format: text to learn that text alone"),
    "a refusal": (
        {"messages": [*said("Q"), {"role": "assistant", "content": None, "refusal": "No."}]},
        "messages[1] has a refusal in place of content",
    ),
    "images": ({"images": ["a.png"], "prompt": "<image> What?", "chosen": "A", "rejected": "B"}, "images is no text"),
    "an image among the parts": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}, *reply("A")]},
        "messages[0].content[0] is image_url, which is no text",
    ),
    "a tool's result of images": (
        {"messages": [
            {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]}, *reply("A")]},
        "is image, which is no text",
    ),
    "redacted thoughts": (
        {"messages": [*said("Q"), {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]},
        "redacted_thinking, which is no text",
    ),
    "words behind a use of a tool": (
        {"messages": [*said("Q"), {"role": "assistant", "content": [
            {"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "A"}]}]},
        "in the order tool_use, text: split the turn",
    ),
    "an unknown role": (
        {"messages": [*said("Q"), {"role": "narrator", "content": "A"}]}, "'narrator' is no role that is known",
    ),
    "a label beside a text": ({"text": "T", "label": 1}, "no format has these columns: label, text"),
    "nothing known": ({"problem": "P", "solution": "S"}, "such as columns: {prompt: problem, completion: solution}"),
    "a quarantine": (
        {"file": "f", "line": 1, "reason": "r", "field": "", "excerpt": "e"}, "a list of bad rows, and no data",
    ),
    "half a pair": ({"prompt": "Q", "chosen": "A"}, "rejected is missing; the row has chosen, prompt"),
    "two system prompts": (
        {"system": "S", "messages": [{"role": "system", "content": "T"}, *said("Q", "A")]}, "another system turn",
    ),
    "a transcript of another kind": (
        {"chosen": "Human: Hi Assistant: A", "rejected": "Human: Hi Assistant: B"}, "read like transcripts",
    ),
    "a conversation that is answered before its answers": (
        {"conversations": said("Q", "A"), "chosen": "C", "rejected": "D"}, "ends in a turn of the assistant, but",
    ),
    "a tl;dr of an article": (
        {"info": {"article": "x", "post": None}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
        "the texts post, title and subreddit",
    ),
    "a choice of three": (
        {"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": 2}, "labels must be 0 or 1, not 2",
    ),
    "two kinds of scores": (
        {"prompt": "Q", "chosen": "A", "rejected": "B", "chosen_score": 2, "rejected_score": 1, "score_chosen": 1,
         "score_rejected": 2},
        "score_chosen and chosen_score differ",
    ),
    "no score": (
        {"instruction": "Q", "completions": [{"response": "A", "overall_score": None}]},
        "completions[0] has no overall_score",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_the_reason(row: dict[str, Any], reason: str) -> None:
    bad = parse_row(RawRow(source="f", line=1, value=row))
    assert isinstance(bad, BadRow), bad
    assert reason in bad.reason


@pytest.mark.parametrize(
    ("row", "options", "prompt", "candidates"),
    [
        ({"question": "Q", "answer": "A"}, {"columns": {"prompt": "question", "completion": "answer"}}, "Q", ("A",)),
        ({"question": "Q", "answer": "A"}, {"columns": {"prompt": "question"}}, "Q", ()),
        ({"problem": "P", "solution": "S"}, {"columns": {"prompt": "problem", "completion": "solution"}}, "P", ("S",)),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, {"columns": {"completion": "chosen"}}, "Q", ("A",)),
        (
            {"riddle": "Q", "chosen": "The A", "rejected": "The B"},
            {"columns": {"prompt": "riddle"}}, "Q", ("The A", "The B"),
        ),
        (
            {"riddle": "Q", "chosen": "The A", "rejected": "The B"},
            {"format": "implicit_preference"}, "The", (" A", " B"),
        ),
        (
            {"prompt": None, "chosen": said("Q", "A"), "rejected": said("Q", "B")},
            {"format": "implicit_preference"}, tuple(said("Q")), (tuple(reply("A")), tuple(reply("B"))),
        ),
        (
            {"prompt": "Q", "response_1": "A", "response_2": "B", "preference": 1},
            {"format": "helpsteer_preference"}, "Q", ("B", "A"),
        ),
    ],
)  # fmt: skip
def test_what_a_refusal_advises_works(
    row: dict[str, Any], options: dict[str, Any], prompt: object, candidates: object
) -> None:
    example = parse_row(RawRow(source="f", line=1, value=row), **options)
    assert isinstance(example, Example), example
    assert (example.prompt, example.candidates) == (prompt, candidates)


def test_a_column_that_columns_replaces_is_told() -> None:
    row = {"prompt": "another meaning", "question": "Q", "completion": "A"}
    example = parse_row(RawRow(source="f", line=1, value=row), columns={"prompt": "question"})
    assert isinstance(example, Example) and (example.prompt, example.unread) == ("Q", ("prompt",))


@pytest.mark.parametrize("value", [None, "", [], "missing"])
def test_an_optional_column_under_another_name_may_be_null(value: object) -> None:
    row = {"messages": said("Q", "A"), "functions_of_ours": value}
    if value == "missing":
        del row["functions_of_ours"]
    example = parse_row(RawRow(source="f", line=1, value=row), columns={"tools": "functions_of_ours"})
    assert isinstance(example, Example) and example.tools is None


def test_a_system_prompt_of_the_configuration_stands_where_none_is() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Q", "completion": "A"},
        {"prompt": [{"role": "system", "content": "Own."}, *said("Q")], "completion": "A"},
        {"prompt": "Q", "completion": "A", "system": "Column."},
        {"text": "A text."},
    ]
    found = [parse_row(RawRow(source="f", line=1, value=row), system="Given.") for row in rows]
    begun = [example.prompt[0] if isinstance(example, Example) and example.prompt else "" for example in found]
    assert begun == [{"role": "system", "content": text} for text in ("Given.", "Own.", "Column.")] + [""]


def test_variables_of_the_template_are_the_rows_own_first() -> None:
    row = {"prompt": "Q", "chat_template_kwargs": {"enable_thinking": True}}
    example = parse_row(
        RawRow(source="f", line=1, value=row), template_kwargs={"enable_thinking": False, "date_string": "1 May"}
    )
    assert isinstance(example, Example)
    assert example.template_kwargs == {"enable_thinking": True, "date_string": "1 May"}


def test_json_lines_and_parquet_mean_the_same(tmp_path: Path) -> None:
    for number, known in enumerate(FOUND.values()):
        lines, table = tmp_path / f"{number}.jsonl", tmp_path / f"{number}.parquet"
        lines.write_text(json.dumps(known.row))
        pq.write_table(pa.Table.from_pylist([known.row]), table)
        one, other = (next(iter(read_rows(str(path)))) for path in (lines, table))
        assert isinstance(one, RawRow) and isinstance(other, RawRow)
        assert meaning(parse(one.value, known)) == meaning(parse(other.value, known))
