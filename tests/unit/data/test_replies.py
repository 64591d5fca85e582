"""Completions as text: every token is seen but the one end token, and a thought is whole whoever opened it."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_tokenizers import CHATML, THINKING, byte_level, metaspace

from rayalign.config.data import TokenBudget
from rayalign.data.chat import make_chat
from rayalign.data.replies import reply_text
from rayalign.data.schema import Example
from rayalign.data.tokenize import Tokenized, to_groups

THOUGHT = ("<think>", "</think>")


def tokenizer_with(*added: str, special: bool, template: str = CHATML) -> Any:
    tokenizer = byte_level(template=template)
    tokenizer.add_tokens(list(added), special_tokens=special)
    return tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        "<think>it is blue</think>\nblue",
        " blue",
        "\n\n  blue \n",
        "blue",
        "",
        "<tool_call>{}</tool_call>",
        "<|im_start|>user\nblue",
        "<|im_end|> and on",
        "¿é 空?",
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_reply_is_what_its_tokens_spell_without_its_end(text: str, special: bool, finished: bool) -> None:
    tokenizer = tokenizer_with(*THOUGHT, "<tool_call>", "</tool_call>", special=special)
    ids = ids_of(tokenizer, text) + ids_of(tokenizer, "<|im_end|>") * finished
    prompt_ids = ids_of(tokenizer, "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n")
    assert reply_text(tokenizer, ids, finished=finished, prompt_ids=prompt_ids) == text


@pytest.mark.parametrize("special", [True, False])
def test_a_thought_that_the_generation_prompt_opened_is_whole(special: bool) -> None:
    """As DeepSeek-R1's distillates, QwQ and Nemotron write it."""
    chat = make_chat(tokenizer_with(*THOUGHT, special=special, template=THINKING))
    asked = Example(format="prompt_only", prompt="what colour?", candidates=())
    (found,) = to_groups([asked], chat, TokenBudget())
    assert isinstance(found, Tokenized)
    ids = ids_of(chat.tokenizer, "it is blue</think>\nblue<|im_end|>")
    said = reply_text(chat.tokenizer, ids, finished=True, prompt_ids=found.group.prompt_ids.tolist())
    assert said == "<think>\nit is blue</think>\nblue"


@pytest.mark.parametrize(
    ("end", "opened"),
    [
        ("assistant\n<think>\n", "<think>\n"),
        ("Assistant: <think>", "<think>"),
        ("[THINK]", "[THINK]"),
        ("<seed:think>", "<seed:think>"),
        ("<reasoning>\n\n", "<reasoning>\n\n"),
        ("<|START_THINKING|>", "<|START_THINKING|>"),
        ("◁think▷", "◁think▷"),
        ("assistant\n<think>\n\n</think>\n\n", ""),
        ("<think></think>", ""),
        ("<think>\nsomewhat", ""),
        ("write <b>", ""),
        ("assistant\n", ""),
        ("", ""),
    ],
)
def test_an_opened_thought_at_the_end_of_a_prompt_belongs_to_the_reply(end: str, opened: str) -> None:
    tokenizer = tokenizer_with(special=False)
    prompt_ids = ids_of(tokenizer, f"what colour? {end}")
    assert reply_text(tokenizer, ids_of(tokenizer, "blue"), finished=False, prompt_ids=prompt_ids) == f"{opened}blue"


def test_a_tokenizer_that_writes_spaces_keeps_those_between_words() -> None:
    tokenizer = metaspace()
    ids = [*tokenizer("the sky is blue", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert reply_text(tokenizer, ids, finished=True, prompt_ids=[]) == "the sky is blue"
