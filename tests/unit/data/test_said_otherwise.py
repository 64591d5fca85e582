"""What files say in ways that nobody named: read as meant, or refused with what to write; never learned as text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import families
import pytest
import tiny_tokenizers as tiny
from pydantic import ValidationError
from shapes import ASK, TOOLS, answer, call, pair, result, user

from rayalign.config.data import DataConfig, DataSource, TokenBudget
from rayalign.data.chat import Chat, make_chat
from rayalign.data.formats import parse_row
from rayalign.data.records import BadRow, RawRow
from rayalign.data.schema import Example
from rayalign.data.tables import read_rows
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.errors import UserError

SETTINGS = TokenBudget(max_prompt_tokens=10_000, max_tokens=20_000)
CHATML = make_chat(tiny.byte_level(template=tiny.CHATML))
QWEN = make_chat(families.tokenizer_of("qwen2_5"))
BASE = make_chat(tiny.byte_level(bos="<s>"))


def learned(row: dict[str, Any], chat: Chat = CHATML) -> list[str]:
    """Of every candidate the text that is predicted."""
    (outcome,) = rows_to_groups([RawRow(source="r", line=1, value=row)], chat, SETTINGS)
    assert isinstance(outcome, Tokenized), outcome
    return [chat.tokenizer.decode(own.ids[own.mask]) for own in outcome.group.candidates]


def refusal(row: dict[str, Any], chat: Chat = CHATML) -> str:
    (outcome,) = rows_to_groups([RawRow(source="r", line=1, value=row)], chat, SETTINGS)
    assert isinstance(outcome, BadRow), outcome
    return outcome.reason


# Texts that hold a conversation.


def test_one_turn_as_json_text_is_the_turn() -> None:
    plain = pair(ASK, chosen=[answer("Blue.")], rejected=[answer("Green.")])
    encoded = {name: json.dumps(turns[0]) for name, turns in plain.items()}
    assert learned(encoded) == learned(plain) == ["Blue.<|im_end|>", "Green.<|im_end|>"]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (str(ASK), "as Python prints it"),
        (str((ASK,)), "as Python prints it"),
        (f"array([{ASK}], dtype=object)", "as Python prints it"),
        (json.dumps(json.dumps([ASK])), "JSON text of a conversation that is JSON text already"),
        (json.dumps({"messages": [ASK]}), "JSON text of an object with a conversation in it"),
        (json.dumps([["user", "What?"]]), "JSON text of pairs of a speaker and words"),
    ],
)
def test_a_conversation_in_another_text_is_refused(prompt: str, reason: str) -> None:
    assert reason in refusal({"prompt": prompt, "completion": "b"})


@pytest.mark.parametrize("said", ['{"role": "admin"}', '[{"from": "Oslo", "to": "Rome"}]', '"a"', "(a)", '{"a": 1}'])
def test_an_answer_may_be_json_of_its_own(said: str) -> None:
    assert learned({"prompt": "a", "completion": said}) == [f"{said}<|im_end|>"]


# Tool calls.


@pytest.mark.parametrize("name", ["arguments", "parameters", "input", "args", "kwargs"])
@pytest.mark.parametrize("is_wrapped", [True, False])
def test_arguments_have_several_names(name: str, is_wrapped: bool) -> None:
    own = {"name": "look", name: {"place": "sky"}}
    given = {"function": own} if is_wrapped else own
    row = {"tools": TOOLS, "messages": [ASK, answer("", tool_calls=[given]), result("It is."), answer("Blue.")]}
    usual = {"tools": TOOLS, "messages": [ASK, answer("", tool_calls=[call({"place": "sky"})]), *row["messages"][2:]]}
    assert learned(row, QWEN) == learned(usual, QWEN)
    assert '"arguments": {"place": "sky"}' in learned(row, QWEN)[0]


def test_two_sets_of_arguments_are_refused() -> None:
    own = {"name": "look", "arguments": {"place": "sky"}, "input": {"place": "sea"}}
    assert "arguments and input" in refusal({"messages": [ASK, answer("", tool_calls=[own])]}, QWEN)


def test_an_old_call_keeps_its_arguments_and_its_weight() -> None:
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps({"name": "f", "parameters": {"x": 1}}), "weight": 0},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "b"},
    ]
    example = parse_row(RawRow(source="r", line=1, value={"conversations": turns}))
    assert isinstance(example, Example) and not isinstance(example.candidates[0], str)
    assert example.candidates[0][0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert learned({"conversations": turns}, QWEN) == ["b<|im_end|>"]


# Turns that are not to be learned.


@pytest.mark.parametrize("name", ["training", "loss_weight", "loss_mask", "learn", "do_train", "is_trainable"])
def test_a_turn_may_be_left_out_under_several_names(name: str) -> None:
    turns = [user("1"), answer("first", **{name: 0}), user("2"), answer("second", **{name: 1})]
    assert learned({"messages": turns}) == ["second<|im_end|>"]


@pytest.mark.parametrize("name", ["masked", "mask", "ignore", "train_detail", "skip_loss", "trainOn"])
def test_what_may_say_that_a_turn_is_left_out_is_asked_for(name: str) -> None:
    turns = [user("1"), answer("first", **{name: True})]
    assert f"messages[1].{name} may say that the answer is not to be learned" in refusal({"messages": turns})


# Nulls of a table in a file of JSON.


def test_a_table_that_was_written_as_json_has_the_rows_of_the_table(tmp_path: Path) -> None:
    def row(key: str, value: str) -> dict[str, Any]:
        own = {"type": "object", "properties": {key: {"type": "string", "description": "d"}}}
        tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": own}}
        asked = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {key: value}}}
        return {"tools": [tool], "messages": [user("a"), answer("", tool_calls=[asked]), result("r"), answer("b")]}

    rows = [row("city", "Oslo"), row("zone", "CET")]
    path = tmp_path / "rows.jsonl"
    datasets.Dataset.from_list(rows).to_json(str(path))
    assert ":null" in path.read_text()
    outcomes = rows_to_groups(list(read_rows(str(path))), QWEN, SETTINGS)
    expected = rows_to_groups([RawRow(source="r", line=1, value=own) for own in rows], QWEN, SETTINGS)
    for own, usual in zip(outcomes, expected, strict=True):
        assert isinstance(own, Tokenized) and isinstance(usual, Tokenized)
        assert own.group.prompt_ids.tolist() == usual.group.prompt_ids.tolist()
        assert own.group.candidates[0].ids.tolist() == usual.group.candidates[0].ids.tolist()


def test_a_null_that_somebody_wrote_stays() -> None:
    asked = call({"place": "sky", "unit": None})
    row = {"tools": TOOLS, "messages": [ASK, answer("", tool_calls=[asked]), result("r"), answer("b")]}
    assert '"unit": null' in learned(row, QWEN)[0]


@pytest.mark.parametrize("said", ["false", "True", " null"])
def test_a_truth_value_in_quotes_is_no_variable_of_a_template(said: str) -> None:
    row = {"prompt": "a", "completion": "b", "chat_template_kwargs": {"enable_thinking": said}}
    told = f"enable_thinking is the text {said!r}, which a template takes for true"
    assert told in refusal(row, make_chat(families.tokenizer_of("qwen3")))
    with pytest.raises(ValidationError, match=re.escape(told)):
        DataConfig.model_validate({"train": ["a.jsonl"], "chat_template_kwargs": {"enable_thinking": said}})
    with pytest.raises(ValidationError, match=re.escape(told)):
        DataSource.model_validate({"path": "a.jsonl", "chat_template_kwargs": {"enable_thinking": said}})


# Prompts of families that are not here, and pictures.

ASKED = {
    "kimi": "<|im_user|>user<|im_middle|>Name a bird.<|im_end|><|im_assistant|>assistant<|im_middle|>",
    "redpajama": "<human>: Name a bird.\n<bot>:",
    "minicpm": "<用户>Name a bird.<AI>",
    "ling": "<role>HUMAN</role>Name a bird.<role>ASSISTANT</role>",
    "hunyuan": "<｜hy_User｜>Name a bird.<｜hy_Assistant｜>",
    "seed": "<seed:bos>user\nName a bird.<seed:eos><seed:bos>assistant\n",
    "apertus": "<s><|user_start|>Name a bird.<|user_end|><|assistant_start|>",
    "nemotron": "<SPECIAL_11>User\nName a bird.\n<SPECIAL_11>Assistant\n",
    "hermes": "<|im_start|>human\nName a bird.<|im_end|>\n<|im_start|>gpt\n",
    "minimax": "]~b]user\nName a bird.[e~[\n]~b]ai\n",
}
IN_WORDS = {
    "openchat": "GPT4 Correct User: Name a bird.<|end_of_turn|>GPT4 Correct Assistant:",
    "phi2": "Instruct: Name a bird.\nOutput:",
    "plain": "User: Name a bird.\nAssistant:",
    "koala": "BEGINNING OF CONVERSATION: USER: Name a bird. GPT:",
    "chatglm2": "[Round 1]\n\n问：Name a bird.\n\n答：",
}


@pytest.mark.parametrize("text", [*ASKED.values(), *IN_WORDS.values()], ids=[*ASKED, *IN_WORDS])
def test_a_rendered_prompt_of_any_family_is_noticed(text: str) -> None:
    assert "the text is rendered already" in refusal({"prompt": text, "completion": "A wren."})


@pytest.mark.parametrize("text", IN_WORDS.values(), ids=IN_WORDS)
def test_a_transcript_in_plain_words_is_what_a_model_without_a_template_reads(text: str) -> None:
    assert learned({"prompt": text, "completion": " A wren."}, BASE) == [" A wren.</s>"]
    assert learned({"prompt": [user(text)], "completion": [answer("A wren.")]}) == ["A wren.<|im_end|>"]


@pytest.mark.parametrize(
    "text", ["Who is the user: you?", "<b>human</b> or <i>ai</i>?", "User: a\nWhat did the assistant: say?", "AI:"]
)
def test_words_of_speakers_are_words(text: str) -> None:
    assert learned({"prompt": text, "completion": "b"}) == ["b<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "<image>\nWhat is it?", "completion": "b"},
        {"prompt": [user("What is it?\n<image>")], "completion": [answer("b")]},
        {"prompt": "What is <image>?", "completion": "b", "images": []},
        {"prompt": "What is <video>?", "completion": "b", "video": None},
    ],
)
def test_a_picture_that_is_not_there_is_no_text(row: dict[str, Any]) -> None:
    assert "stands for what is no text" in refusal(row)
    assert learned({"prompt": "What is <image> in HTML?", "completion": "b"}) == ["b<|im_end|>"]


# Columns.


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"trajectory": [{"from": "user", "value": "q"}], "chosen": "Step 1: a", "rejected": "Step 1: b"},
            "trajectory could be the prompt",
        ),
        ({"text": "a", "role": "prompter", "parent_id": "1"}, "no format has these columns"),
        ({"text": "a", "code": "b"}, "no format has these columns"),
    ],
)
def test_what_may_be_a_prompt_is_never_left_out(row: dict[str, Any], reason: str) -> None:
    assert reason in refusal(row)


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_the_index_of_a_table_only_describes(name: str) -> None:
    example = parse_row(RawRow(source="r", line=1, value={name: "0", "prompt": "a", "completion": "b"}))
    assert isinstance(example, Example) and (example.unread, example.metadata) == ((), (name,))


# Templates that do something to certain words, which marks in their place do not show.

CALLS = "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
SHORTENED = {
    "thought": "{% if m.reasoning_content %}<think>{{ m.reasoning_content[:12] }}</think>{% endif %}{{ m.content }}",
    "argument": "{{ m.content }}" + CALLS.replace("call.function | tojson", "(call.function | tojson)[:70]"),
}


@pytest.mark.parametrize(
    ("kind", "words"),
    [("thought", "a long thought of many words"), ("argument", " ".join(f"far{place}" for place in range(30)))],
)
def test_a_template_that_shortens_long_words_is_noticed(kind: str, words: str) -> None:
    body = SHORTENED[kind]
    source = tiny.CHATML.replace("{{ message.content }}", "{% set m = message %}" + body)
    assert source != tiny.CHATML
    chat = make_chat(tiny.byte_level(template=source))
    said = {"reasoning_content": words} if kind == "thought" else {"tool_calls": [call({"place": words})]}
    assert f"writes turn 2 (assistant) otherwise: {words.strip()[:60]!r} is not in it" in refusal(
        {"messages": [ASK, answer("b", **said)]}, chat
    )
    short = {"reasoning_content": "hm"} if kind == "thought" else {"tool_calls": [call({"place": "sky"})]}
    assert len(learned({"messages": [ASK, answer("b", **short)]}, chat)) == 1


# Tools, in all their details.

TYPED = {
    "type": "object",
    "title": "Ztitle",
    "properties": {
        "zplace": {"type": "string", "description": "Zwhere", "enum": ["zsky", "zsea"], "default": "zsky"},
        "zmany": {"type": "array", "items": {"type": "object", "properties": {"zdeep": {"type": "number"}}}},
    },
    "required": ["zplace"],
}
TYPED_TOOL = {"type": "function", "function": {"name": "zlook", "description": "Zlooks.", "parameters": TYPED}}


@pytest.mark.parametrize(
    ("family", "rules"), [("qwen2_5", set()), ("llama3_1", set()), ("gptoss", {"names"}), ("gemma4_v5", {"names"})]
)
def test_details_of_tools_that_a_template_leaves_out_are_told(family: str, rules: set[str]) -> None:
    """Every keyword is in the prompt, or a rule says that one is not."""
    chat = make_chat(families.tokenizer_of(family))
    row = {"tools": [TYPED_TOOL], "prompt": [ASK], "completion": [answer("b")]}
    (outcome,) = rows_to_groups([RawRow(source="r", line=1, value=row)], chat, SETTINGS)
    assert isinstance(outcome, Tokenized) and outcome.rules == rules
    prompt = chat.tokenizer.decode(outcome.group.prompt_ids)
    names = ("zlook", "Zlooks.", "zplace", "Zwhere", "zsky", "zsea", "zmany", "zdeep")
    assert all(word in prompt for word in names) and ("Ztitle" in prompt) == (rules == set())


@pytest.mark.parametrize(
    ("written", "lost"),
    [("{{ name }} {{ own.description }}", "zsky"), ("{{ name }} {{ own.description }} {{ own.enum }}", "zdeep")],
)
def test_parameters_that_a_template_leaves_out_are_missed(written: str, lost: str) -> None:
    source = (
        "{% for tool in tools or [] %}{{ tool.function.name }} {{ tool.function.description }}"
        "{% for name, own in tool.function.parameters.properties.items() %} " + written + "{% endfor %}{% endfor %}"
    )
    chat = make_chat(tiny.byte_level(template=source + tiny.CHATML))
    row = {"tools": [TYPED_TOOL], "prompt": [ASK], "completion": [answer("b")]}
    assert f"leaves out '{lost}' of the tools" in refusal(row, chat)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ({"rag": tiny.CHATML}, "the tokenizer has chat templates by name (rag), and no default"),
        (
            "{{ range(10 ** 9) | length }}" + tiny.CHATML,
            "the chat template refuses one user turn and one assistant turn",
        ),
        ("{{ 1 // (messages | length - 2) }}" + tiny.CHATML, "the chat template refuses one user turn"),
    ],
)
def test_a_template_that_cannot_be_used_is_a_sentence(template: Any, reason: str) -> None:
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=re.escape(reason)):
        make_chat(tokenizer)
