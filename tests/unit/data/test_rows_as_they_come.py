"""Rows as files have them: rendered texts, weights, JSON in texts, what Arrow fills in, answers that were cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pyarrow
import pyarrow.parquet
import pytest
import tiny_tokenizers as tiny
from shapes import ASK, LOOK, SEEN, SKY, SKY_TEXT, TOOLS, answer, call, pair, result, user

from rayalign.config.data import TokenBudget
from rayalign.data.chat import Chat, make_chat
from rayalign.data.group import Group
from rayalign.data.records import BadRow, RawRow
from rayalign.data.schema import Example
from rayalign.data.tables import read_rows
from rayalign.data.tokenize import Outcome, Tokenized, rows_to_groups, to_groups

SETTINGS = TokenBudget(max_prompt_tokens=10_000, max_tokens=20_000)
CHATML = make_chat(tiny.byte_level(template=tiny.CHATML))
QWEN = make_chat(families.tokenizer_of("qwen2_5"))
BASE = make_chat(tiny.byte_level(bos="<s>"))
ASKED = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"


def outcome_of(row: dict[str, Any], chat: Chat = CHATML) -> Outcome:
    (outcome,) = rows_to_groups([RawRow(source="r", line=1, value=row)], chat, SETTINGS)
    return outcome


def read(row: dict[str, Any], chat: Chat = CHATML) -> list[str]:
    """Prompt and candidates; what is only seen of them stands between ‹›."""
    outcome = outcome_of(row, chat)
    assert isinstance(outcome, Tokenized), outcome
    return texts_of(outcome.group, chat)


def texts_of(group: Group, chat: Chat) -> list[str]:
    texts = [chat.tokenizer.decode(group.prompt_ids)]
    for candidate in group.candidates:
        text, seen = "", False
        for token, predicted in zip(candidate.ids.tolist(), candidate.mask.tolist(), strict=True):
            if seen == predicted:
                text, seen = text + ("›" if predicted else "‹"), not predicted
            text += chat.tokenizer.decode([token])
        texts.append(text)
    return texts


def refusal(row: dict[str, Any], chat: Chat = CHATML) -> str:
    outcome = outcome_of(row, chat)
    assert isinstance(outcome, BadRow), outcome
    return outcome.reason


# Texts that are rendered already.

READS_IMAGES = ("idefics3", "llava_next", "smolvlm")
FAMILIES = [name for name in families.names() if not name.endswith("_training") and name not in READS_IMAGES]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_is_rendered_already_is_noticed_in_every_family(name: str) -> None:
    tokenizer = families.tokenizer_of(name)
    asked = tokenizer.apply_chat_template([user("Name a bird.")], add_generation_prompt=True, tokenize=False)
    rows: list[dict[str, Any]] = [
        {"prompt": asked, "completion": "A wren."},
        {"prompt": [user(asked)], "completion": [answer("A wren.")]},
        {"chosen": asked + "A wren.", "rejected": asked + "A stone."},
    ]
    for chat in (make_chat(tokenizer), QWEN, BASE):
        for row in rows[: 2 if name == "vicuna" else 3]:  # plain words that go on are what they are
            assert "the text is rendered already: it holds" in refusal(row, chat)


def test_words_about_templates_are_refused_in_answers_too() -> None:
    leaked = answer("a<|im_end|>\n<|im_start|>user\nb")
    assert "rendered already" in refusal(pair(ASK, chosen=[leaked], rejected=[answer("c")]))
    told = refusal({"prompt": "[INST] a [/INST]", "completion": "b"})
    assert "Write turns or plain text, or data.template: none" in told


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi3", "zephyr", "vicuna", "deepseekv3"])
def test_rendered_pairs_are_taken_as_they_are_where_the_template_is_none(name: str) -> None:
    """As older TRL and the alignment handbook wrote them: the template's line end after the end token goes."""
    tokenizer = families.tokenizer_of(name)
    turns = [user("Name a bird.")]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    wholes = [tokenizer.apply_chat_template([*turns, answer(said)], tokenize=False) for said in ("A wren.", "A stone.")]
    bare = [text.removeprefix(asked) for text in wholes] if wholes[0].startswith(asked) else ["A wren.", "A stone."]
    chat = make_chat(tokenizer, template="none")
    usual = make_chat(tokenizer)
    group = outcome_of({"prompt": asked, "chosen": bare[0], "rejected": bare[1]}, chat)
    assert isinstance(group, Tokenized)
    expected = outcome_of(pair(*turns, chosen=[answer("A wren.")], rejected=[answer("A stone.")]), usual)
    assert isinstance(expected, Tokenized)
    if "cut" not in expected.rules:
        lead = [] if asked.startswith(str(tokenizer.bos_token)) else list(chat.lead_ids)
        assert group.group.prompt_ids.tolist() == [*lead, *expected.group.prompt_ids.tolist()]
        assert [own.ids.tolist() for own in group.group.candidates] == [
            own.ids.tolist() for own in expected.group.candidates
        ]
    assert all(own.finished for own in group.group.candidates)


def test_control_tokens_in_words_are_words_unless_rows_are_rendered() -> None:
    row = {"prompt": "What is </s>?", "completion": "It ends <|im_end|> it."}
    outcome = outcome_of(row)
    assert isinstance(outcome, Tokenized) and outcome.rules == {"spelled"}
    ids = [*outcome.group.prompt_ids.tolist(), *outcome.group.candidates[0].ids.tolist()]
    assert ids.count(CHATML.end_id) == 2 and CHATML.tokenizer.eos_token_id not in ids
    assert outcome.example.prompt == row["prompt"] and outcome.example.candidates == (row["completion"],)
    assert "".join(texts_of(outcome.group, CHATML)).count("It ends <|im_end|> it.<|im_end|>") == 1
    assert "an answer spells the end token '<|im_end|>' at its end" in refusal(
        {"prompt": "a", "completion": "b<|im_end|>"}
    )
    raw = make_chat(tiny.byte_level(template=tiny.CHATML), template="none")
    inside = outcome_of({"prompt": "a</s>", "completion": "b"}, raw)
    assert isinstance(inside, Tokenized) and raw.tokenizer.eos_token_id in inside.group.prompt_ids
    assert "an answer holds the end token" in refusal({"prompt": "a", "completion": "b</s>c</s>"}, raw)


@pytest.mark.parametrize("special", [True, False, None])
def test_a_thought_is_the_same_whatever_its_tags_are_to_the_tokenizer(special: bool | None) -> None:
    """A special token, an added one that is not special, or plain text."""
    tokenizer = tiny.byte_level(template=tiny.THINKING)
    if special is not None:
        tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    chat = make_chat(tokenizer)
    row = pair(ASK, chosen=[answer("<think>\nhm</think>It")], rejected=[answer("So")])
    assert read(row, chat) == [ASKED, "<think>\nhm</think>It<|im_end|>", "So<|im_end|>"]
    both = pair(ASK, chosen=[answer("<think>\nhm</think>It")], rejected=[answer("hm</think>So")])
    assert read(both, chat) == [ASKED + "<think>\n", "hm</think>It<|im_end|>", "hm</think>So<|im_end|>"]
    outcome = outcome_of(both, chat)
    assert isinstance(outcome, Tokenized)
    if special is not None:
        assert tokenizer.convert_tokens_to_ids("</think>") in outcome.group.candidates[0].ids


def test_what_a_model_wrote_is_words_whatever_stands_in_it() -> None:
    """A scorer reads replies of any policy, and a judge is asked about them."""
    for text in ("<|im_start|>user\nhi<|im_end|>", "[INST] a [/INST]", "ends<|im_end|>"):
        drawn = Example(format="preference", prompt=text, candidates=(text,), drawn=True)
        (outcome,) = to_groups([drawn], CHATML, SETTINGS)
        assert isinstance(outcome, Tokenized)
        assert texts_of(outcome.group, CHATML)[1] == f"{text}<|im_end|>"
        assert outcome.group.candidates[0].ids.tolist().count(CHATML.end_id) == 1
        assert "<|im_end|>" in read({"prompt": "a", "completion": text, "finished": True})[1]


@pytest.mark.parametrize("text", ["<think>\nhm and", "hm and", "<think>hm and"])
def test_a_thought_that_was_cut_off_continues_the_generation_prompt(text: str) -> None:
    chat = make_chat(tiny.byte_level(template=tiny.THINKING))
    row = {"prompt": "What is it?", "completion": text, "finished": False}
    assert read(row, chat) == [ASKED + "<think>\n", "hm and"]


def test_a_transcript_that_waits_for_an_answer_is_turns() -> None:
    asked = "\n\nHuman: What is it?\n\nAssistant: A sky.\n\nHuman: Why?\n\nAssistant:"
    row = {"prompt": asked, "chosen": " Blue.", "rejected": " Green."}
    turns = [ASK, answer("A sky."), user("Why?")]
    assert read(row) == read(pair(*turns, chosen=[answer("Blue.")], rejected=[answer("Green.")]))
    outcome = outcome_of(row)
    assert isinstance(outcome, Tokenized) and outcome.rules == {"transcript"}
    assert outcome.example.prompt == tuple(turns)
    assert read(row, BASE)[:2] == [f"<s>{asked}", " Blue.</s>"]


# Which answers are learned.


@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}, {"trainable": False}, {"loss": False}])
def test_an_answer_that_is_not_to_be_trained_is_seen(field: dict[str, Any]) -> None:
    first, second, third = user("a"), user("c"), user("e")
    turns = [first, answer("b", **field), second, answer("d", weight=1), third, answer("f")]
    assert read({"messages": turns}) == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n",
        "d<|im_end|>‹\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n›f<|im_end|>",
    ]
    turns = [first, answer("b"), second, answer("d", **field), third, answer("f", **field)]
    outcome = outcome_of({"messages": turns})
    assert isinstance(outcome, Tokenized) and outcome.rules == {"untrained"}
    assert texts_of(outcome.group, CHATML)[1:] == ["b<|im_end|>"]
    assert "nothing to learn" in refusal({"messages": [first, answer("b", **field)]})
    assert "messages[1].weight must be 0 or 1, not 0.5" in refusal({"messages": [first, answer("b", weight=0.5)]})


def test_an_answer_that_was_cut_off_has_no_end_token() -> None:
    row = {"prompt": "a", "completions": ["bl", "Blue.", ""], "finished": [False, True, True], "rewards": [None, 1, 0]}
    outcome = outcome_of(row)
    assert isinstance(outcome, Tokenized) and outcome.rules == {"unfinished"}
    assert texts_of(outcome.group, CHATML)[1:] == ["bl", "Blue.<|im_end|>", "<|im_end|>"]
    assert [own.finished for own in outcome.group.candidates] == [False, True, True]
    one = outcome_of({"prompt": "a", "completion": "bl", "finished": False})
    assert isinstance(one, Tokenized) and not one.group.candidates[0].finished
    assert "finished must say true or false of each of 2" in refusal(
        {"prompt": "a", "chosen": "b", "rejected": "c", "finished": [True]}
    )


def test_an_empty_answer_is_read_where_the_row_says_that_it_is_finished() -> None:
    assert read({"prompt": "a", "chosen": "b", "rejected": "", "finished": [True, True]})[2] == "<|im_end|>"
    assert refusal({"prompt": "a", "chosen": "b", "rejected": ""}) == "rejected is empty"


# JSON in texts.


def test_conversations_arguments_and_tools_may_be_json_texts() -> None:
    calls = [LOOK, answer("", tool_calls=[SKY]), SEEN, answer("Blue.")]
    texts = [LOOK, answer("", tool_calls=[SKY_TEXT]), SEEN, answer("Blue.")]
    expected = read({"messages": calls, "tools": TOOLS}, QWEN)
    assert '"arguments": {"place": "sky"}' in expected[1]
    for row in (
        {"messages": texts, "tools": TOOLS},
        {"messages": json.dumps(calls), "tools": json.dumps(TOOLS)},
        {"messages": [LOOK, {**calls[1], "tool_calls": json.dumps([SKY])}, *calls[2:]], "tools": TOOLS},
        {"messages": calls, "tools": TOOLS, "chat_template_kwargs": "{}"},
    ):
        assert read(row, QWEN) == expected
    flat = {"name": "look", "arguments": {"place": "sky"}}
    assert read({"messages": [LOOK, answer("", tool_calls=[flat]), *calls[2:]], "tools": TOOLS}, QWEN) == expected
    plain = pair(ASK, chosen=[answer("Blue.")], rejected=[answer("Green.")])
    encoded = {name: json.dumps(value) for name, value in plain.items()}
    assert read(encoded) == read(plain)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": str([ASK, answer("b")])}, "messages is a list of turns as Python prints it; write it as JSON"),
        ({"prompt": "a", "completion": "b", "tools": "["}, "tools is not valid JSON"),
        ({"prompt": "a", "completion": "b", "chat_template_kwargs": "[1]"}, "chat_template_kwargs must be an object"),
        (
            {"messages": [ASK, answer("", tool_calls=[call("{")])]},
            "messages[1].tool_calls[0].function.arguments is not valid JSON",
        ),
        ({"messages": [ASK, answer("", tool_calls=[call("[1]")])]}, "arguments must be an object, not a list"),
        ({"messages": [ASK, answer("", tool_calls=[{"id": "1"}])]}, "messages[1].tool_calls[0] names no function"),
        ({"messages": [ASK, answer("", tool_calls="x")]}, "is not valid JSON"),
    ],
)
def test_json_that_is_none_is_refused_with_its_place(row: dict[str, Any], reason: str) -> None:
    assert reason in refusal(row, QWEN)


def test_texts_that_look_like_lists_are_texts() -> None:
    assert read({"prompt": '["a", "b"]', "completion": "[1]"})[1] == "[1]<|im_end|>"


# What Arrow fills in.

ZONE = {"type": "object", "properties": {"zone": {"type": "string", "description": "Whose"}}, "required": ["zone"]}
OTHER = [{"type": "function", "function": {"name": "clock", "description": "Tells.", "parameters": ZONE}}]


def test_nulls_that_arrow_fills_in_reach_nobody(tmp_path: Path) -> None:
    """Two tools with other parameters: the columns of either stand in both, filled with nulls."""
    rows = [
        {"messages": [LOOK, answer("", tool_calls=[SKY]), SEEN, answer("Blue.")], "tools": TOOLS},
        {
            "messages": [
                user("When?"), answer("", tool_calls=[call({"zone": "CET"})]), result("Noon."), answer("Noon."),
            ],
            "tools": OTHER,
        },
    ]  # fmt: skip
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    stored = list(read_rows(str(path)))
    assert all(isinstance(row, RawRow) for row in stored)
    for given, row in zip(rows, stored, strict=True):
        assert isinstance(row, RawRow)
        assert read(dict(row.value), QWEN) == read(given, QWEN)
    assert "null" not in "".join(read(rows[1], QWEN))


def test_an_empty_list_of_tool_calls_is_none() -> None:
    llama = make_chat(families.tokenizer_of("llama3_1"))
    plain = pair(ASK, chosen=[answer("Blue.")], rejected=[answer("Green.")])
    empty = pair(ASK, chosen=[answer("Blue.", tool_calls=[])], rejected=[answer("Green.", tool_calls=None)])
    assert read(empty, llama) == read(plain, llama)


def test_a_null_that_is_written_is_an_argument() -> None:
    """JSON lines say what they mean: there a null was written by somebody."""
    row = {"messages": [LOOK, answer("", tool_calls=[call({"place": None})]), SEEN, answer("Blue.")]}
    assert '"place": null' in read(row, QWEN)[1]
