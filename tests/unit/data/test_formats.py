from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import BAD_INPUTS, BadInput

from rayalign.data.formats import parse_row
from rayalign.data.lines import read_lines
from rayalign.data.records import BadRow, RawRow
from rayalign.data.schema import Example
from rayalign.data.shared_prompt import split_texts, transcript, transcript_turns
from rayalign.errors import UserError


def said(*contents: str) -> list[dict[str, str]]:
    """Turns of user and assistant in alternation."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


def answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def parse(fields: dict[str, Any], **options: Any) -> Example:
    example = parse_row(RawRow(source="f.jsonl", line=3, value=fields), **options)
    assert isinstance(example, Example), example
    assert (example.source, example.line) == ("f.jsonl", 3)
    return example


def refused(fields: dict[str, Any], **options: Any) -> BadRow:
    bad = parse_row(RawRow(source="f.jsonl", line=3, value=fields), **options)
    assert isinstance(bad, BadRow), bad
    return bad


@pytest.mark.parametrize("case", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_rows_say_why_and_good_rows_stay(case: BadInput, tmp_path: Path) -> None:
    path = tmp_path / f"rows{case.suffix}"
    path.write_bytes(case.content)
    rows = [parse_row(row) if isinstance(row, RawRow) else row for row in read_lines(str(path))]
    assert [row.line for row in rows if isinstance(row, Example)] == list(case.good)
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [(row.line, row.field) for row in bad] == [(number, field) for number, field, _ in case.bad]
    for row, (_, _, reason) in zip(bad, case.bad, strict=True):
        assert reason in row.reason


@pytest.mark.parametrize(
    ("fields", "name", "prompt", "candidates"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference", "Q", ("A", "B")),
        (
            {"prompt": said("Q"), "chosen": answer("A"), "rejected": answer("B")},
            "preference", tuple(said("Q")), (tuple(answer("A")), tuple(answer("B"))),
        ),
        (
            {"prompt": "Q", "chosen": answer("A"), "rejected": answer("B")},
            "preference", tuple(said("Q")), (tuple(answer("A")), tuple(answer("B"))),
        ),
        (
            {"prompt": said("Q"), "chosen": said("Q", "A"), "rejected": "B"},
            "preference", tuple(said("Q")), (tuple(answer("A")), tuple(answer("B"))),
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            "implicit_preference", "The sky is", (" blue.", " green."),
        ),
        (
            {"chosen": said("Q", "A"), "rejected": said("Q", "B")},
            "implicit_preference", tuple(said("Q")), (tuple(answer("A")), tuple(answer("B"))),
        ),
        (
            {"prompt": "Q", "prompt_id": "x", "messages": said("Q", "A"),
             "chosen": said("Q", "A"), "rejected": said("Q", "B"), "score_chosen": 8.5, "score_rejected": 3.0},
            "ultrafeedback", tuple(said("Q")), (tuple(answer("A")), tuple(answer("B"))),
        ),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
            "hh", tuple(said("Q")), (tuple(answer("A")), tuple(answer("B"))),
        ),
        ({"prompt": "Q", "completions": ["A", "B", "C"], "rewards": [1, 2, 3]}, "ranked", "Q", ("A", "B", "C")),
        ({"prompt": "Q", "completion": "A", "label": True}, "unpaired_preference", "Q", ("A",)),
        ({"prompt": "Q", "completion": "A"}, "prompt_completion", "Q", ("A",)),
        ({"prompt": said("Q"), "completion": "A"}, "prompt_completion", tuple(said("Q")), (tuple(answer("A")),)),
        ({"messages": said("Q", "A", "R", "B")}, "messages", tuple(said("Q")), (tuple(said("Q", "A", "R", "B")[1:]),)),
        ({"text": "The sky."}, "text", "", ("The sky.",)),
        ({"prompt": said("Q")}, "prompt_only", tuple(said("Q")), ()),
    ],
)  # fmt: skip
def test_formats_are_found_and_named(fields: dict[str, Any], name: str, prompt: object, candidates: object) -> None:
    example = parse(fields)
    assert (example.format, example.prompt, example.candidates) == (name, prompt, candidates)
    assert example.continues == (name in ("text", "implicit_preference") and isinstance(example.prompt, str))
    assert parse(fields, format=name) == example


def test_turns_that_both_answers_of_a_pair_share_belong_to_the_prompt() -> None:
    example = parse({"prompt": said("Q"), "chosen": said("Q", "A", "R", "B"), "rejected": said("Q", "A", "R", "C")[1:]})
    assert example.prompt == tuple(said("Q", "A", "R"))
    assert example.candidates == (tuple(answer("B")), tuple(answer("C")))


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"prompt": "Q", "completions": ["A", "B"], "rewards": [1, 2.5]}, {"reward": (1.0, 2.5)}),
        (
            {"prompt": "Q", "completions": ["A", "B"], "rewards": [1, 2], "behavior_logps": [-3.5, -1]},
            {"reward": (1.0, 2.0), "behavior_logp": (-3.5, -1.0)},
        ),
        ({"prompt": "Q", "completion": "A", "label": False}, {"label": (0.0,)}),
        ({"prompt": "Q", "completion": "A", "label": 1}, {"label": (1.0,)}),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "chosen_score": 8, "rejected_score": -2}, {"reward": (8, -2)}),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": 8, "score_rejected": 2}, {"reward": (8, 2)}),
    ],
)
def test_columns(fields: dict[str, Any], columns: dict[str, tuple[float, ...]]) -> None:
    assert parse(fields).columns == columns


def test_columns_of_the_pair_stand_with_the_chosen_answer() -> None:
    columns = parse({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 2, "soft_label": 0.75}).columns
    assert columns["margin"][0] == 2 and columns["soft_label"][0] == 0.75
    assert math.isnan(columns["margin"][1]) and math.isnan(columns["soft_label"][1])


def test_columns_are_renamed() -> None:
    fields = {"instruction": "Q", "good": "A", "bad": "B", "prompt": "another meaning"}
    names = {"prompt": "instruction", "chosen": "good", "rejected": "bad"}
    assert parse(fields, columns=names).prompt == "Q"
    bad = refused({"instruction": "Q", "good": "A"}, columns=names)
    assert (bad.field, bad.reason) == ("bad", "bad is missing, which `columns` names as rejected")


def test_a_fixed_format_is_not_guessed() -> None:
    bad = refused({"prompt": "Q", "completion": "A"}, format="preference")
    assert (bad.field, bad.line, bad.excerpt) == ("chosen", 3, '{"prompt": "Q", "completion": "A"}')
    with pytest.raises(UserError, match="data.format: 'dpo' is not a format; take auto or one of openai_preference, "):
        parse_row(RawRow(source="", line=1, value={}), format="dpo")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answers"),
    [
        (said("Q", "A", "R", "B"), said("Q", "A", "R", "C"), said("Q", "A", "R"), ("B", "C")),
        (said("Q", "A", "R", "B"), said("Q", "X", "R", "C"), said("Q"), ("A R B", "X R C")),
        (said("Q", "A", "R", "B"), said("Q", "A", "S", "B"), said("Q"), ("A R B", "A S B")),
        (said("Q", "A"), said("Q", "A", "R", "B"), said("Q"), ("A", "A R B")),
        (said("Q", "A"), said("Q", "A"), said("Q"), ("A", "A")),
    ],
)
def test_prompt_ends_at_the_first_answer_that_differs(
    chosen: list[Any], rejected: list[Any], prompt: list[Any], answers: tuple[str, str]
) -> None:
    example = parse({"chosen": chosen, "rejected": rejected})
    assert example.prompt == tuple(prompt)
    assert tuple(" ".join(turn["content"] for turn in turns) for turns in example.candidates) == answers  # type: ignore[index]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is black", "The sky is"),
        ("The sky is", "The sky is blue", "The sky"),
        ("Is it?\n\nYes", "Is it?\n\nNo", "Is it?\n\n"),
        ("same words here", "same words here", "same words"),
    ],
)
def test_shared_text_ends_between_words(chosen: str, rejected: str, prompt: str) -> None:
    shared, first, second = split_texts(chosen, rejected)
    assert (shared, shared + first, shared + second) == (prompt, chosen, rejected)


def test_transcript_turns() -> None:
    text = "\n\nHuman: Hi\n\nthere \n\nAssistant:  Yes?\n\nAssistant: Well?\n\nHuman:Bye\n\nAssistant: "
    turns = transcript_turns(text, "chosen")
    assert list(turns) == said("Hi\n\nthere", "Yes?\n\nWell?", "Bye", "")
    assert transcript(turns[:3], generation_prompt=True) == (
        "\n\nHuman: Hi\n\nthere\n\nAssistant: Yes?\n\nWell?\n\nHuman: Bye\n\nAssistant:"
    )


@pytest.mark.parametrize("chosen", ["\n\nHuman: Hi", "\n\nAssistant: Hi", "Hello\n\nHuman: Hi\n\nAssistant: Yes"])
def test_broken_transcripts(chosen: str) -> None:
    bad = refused({"chosen": chosen, "rejected": "\n\nHuman: Hi\n\nAssistant: A"}, format="hh")
    assert bad.field in ("chosen", "rejected")


def test_tools_and_template_arguments() -> None:
    fields: dict[str, Any] = {
        "prompt": said("Q"),
        "completion": "A",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    tool = {"type": "function", "function": {"name": "weather"}}
    assert parse({**fields, "tools": [tool]}).tools == (tool,)
    example = parse({**fields, "tools": '[{"type": "function", "function": {"name": "weather"}}]'})
    assert example.tools == (tool,) and example.template_kwargs == {"enable_thinking": False}
    assert refused({**fields, "tools": ["weather"]}).field == "tools"
    assert refused({**fields, "tools": "weather("}).field == "tools"
    assert refused({**fields, "chat_template_kwargs": 1}).field == "chat_template_kwargs"


def test_turns_lose_nulls_and_join_text_parts() -> None:
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    example = parse({"messages": [{"role": "user", "content": parts, "tool_calls": None}, call]})
    assert example.prompt == ({"role": "user", "content": "What now?"},)
    wrapped = [{"type": "function", "function": {"name": "f"}}]
    assert example.candidates == (({"role": "assistant", "content": "", "tool_calls": wrapped},),)
    bad = refused({"messages": [{"role": "user", "content": [{"type": "image"}]}]})
    assert bad.reason.startswith("messages[0].content[0] is image, which is no text")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [(said("Q"), "nothing to learn"), (answer("A"), "no prompt"), ([], "messages is empty"), (3, "a list of turns")],
)
def test_messages_that_teach_nothing(messages: object, reason: str) -> None:
    assert reason in refused({"messages": messages}).reason


def test_real_transcripts_all_parse(test_data: Path) -> None:
    rows = list(read_lines(str(test_data / "hh_harmless_test.jsonl.gz")))
    examples = [parse_row(row) for row in rows if isinstance(row, RawRow)]
    assert len(rows) == len(examples) == 2312
    assert {example.format for example in examples if isinstance(example, Example)} == {"hh"}
    for row, example in zip(rows, examples, strict=True):
        assert isinstance(row, RawRow) and isinstance(example, Example) and not isinstance(example.prompt, str)
        roles = [turn["role"] for turn in (*example.prompt, *example.candidates[0])]  # type: ignore[misc]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        for name, answer in zip(("chosen", "rejected"), example.candidates, strict=True):
            assert not isinstance(answer, str)
            assert words(transcript((*example.prompt, *answer), generation_prompt=False)) == words(row.value[name])


def words(text: str) -> list[str]:
    return [word for word in text.split() if word not in ("Human:", "Assistant:")]
