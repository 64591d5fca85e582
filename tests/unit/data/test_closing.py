"""Templates of saved models: what they write is what was trained on, for every family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_tokenizers as tiny
from shapes import SHAPES, answer, pair, system, user

from rayalign.config.data import TokenBudget
from rayalign.data.chat import make_chat
from rayalign.data.closing import closing_template, policy_template
from rayalign.data.records import BadRow, RawRow
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.errors import UserError

SETTINGS = TokenBudget(max_prompt_tokens=10_000, max_tokens=20_000)
FAMILIES = [name for name in families.names() if not name.endswith("_training")]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_models_template_writes_the_trained_tokens(name: str) -> None:
    tokenizer = families.tokenizer_of(name)
    try:
        chat = make_chat(tokenizer)
    except UserError:
        pytest.skip("the template refuses texts as contents")
    saved = copy.deepcopy(tokenizer)
    saved.chat_template = closing_template(chat)
    again = make_chat(saved)
    assert (again.end_id, closing_template(again)) == (chat.end_id, saved.chat_template)
    for shape, row in SHAPES.items():
        (outcome,) = rows_to_groups([RawRow(source=shape, line=1, value=row)], chat, SETTINGS)
        if isinstance(outcome, BadRow):
            continue
        conversations = [row["messages"]] if "messages" in row else [row["chosen"], row["rejected"]]
        for own, turns in zip(outcome.group.candidates, conversations, strict=True):
            given = [chat.speaker.template.forms.adapt(turn) for turn in [*row.get("prompt", []), *turns]]
            written = saved.apply_chat_template(given, tools=row.get("tools"), return_dict=False)
            assert saved.decode(written) == saved.decode([*outcome.group.prompt_ids, *own.ids]), shape


def test_a_reward_models_template_keeps_a_system_prompt_that_the_own_one_drops() -> None:
    """Mistral 7B v0.3 shows the system's words before an answer, and drops them once it follows."""
    tokenizer = tiny.byte_level(template=tiny.MISTRAL, bos="<s>")
    chat = make_chat(tokenizer)
    turns = [system("Be it."), user("What?"), answer("It")]
    saved = copy.deepcopy(tokenizer)
    saved.chat_template = closing_template(chat)
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<s>[INST] What? [/INST] It</s>"
    assert saved.apply_chat_template(turns, tokenize=False) == "<s>[INST] Be it.\n\nWhat? [/INST] It</s>"
    assert saved.apply_chat_template(turns[1:], tokenize=False) == "<s>[INST] What? [/INST] It</s>"


VARIABLES = {"enable_thinking": False}


def test_the_variables_of_a_run_are_the_defaults_of_what_it_saves() -> None:
    tokenizer = families.tokenizer_of("qwen3")
    chat = make_chat(tokenizer, template_kwargs=VARIABLES)
    row = pair(user("What?"), chosen=[answer("It")], rejected=[answer("So")])
    (outcome,) = rows_to_groups([RawRow(source="r", line=1, value=row)], chat, SETTINGS)
    assert isinstance(outcome, Tokenized)
    asked = tokenizer.apply_chat_template([user("What?")], add_generation_prompt=True, tokenize=False, **VARIABLES)
    assert asked.endswith("<think>\n\n</think>\n\n") and tokenizer.decode(outcome.group.prompt_ids) == asked
    for make in (policy_template, closing_template):
        saved = copy.deepcopy(tokenizer)
        saved.chat_template = make(chat)
        assert saved.apply_chat_template([user("What?")], add_generation_prompt=True, tokenize=False) == asked
        thinking: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": True}
        changed = saved.apply_chat_template([user("What?")], **thinking)
        assert changed == tokenizer.apply_chat_template([user("What?")], **thinking)


def test_the_date_of_a_reward_model_is_that_of_its_training_and_a_policys_is_todays() -> None:
    tokenizer = families.tokenizer_of("llama3_2")
    chat = make_chat(tokenizer)
    turns = [user("What?"), answer("It")]
    saved = copy.deepcopy(tokenizer)
    saved.chat_template = closing_template(chat)
    assert "Today Date: 26 Jul 2024" in saved.apply_chat_template(turns, tokenize=False)
    assert policy_template(chat) is None


def test_a_policy_saves_the_template_of_its_run(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(tiny.ZEPHYR)
    chat = make_chat(tiny.byte_level(template=tiny.CHATML), template=str(path))
    assert policy_template(chat) == tiny.ZEPHYR
    assert policy_template(make_chat(tiny.byte_level(template=tiny.CHATML))) is None
    assert policy_template(make_chat(tiny.byte_level(template=tiny.CHATML), template="none")) is None
