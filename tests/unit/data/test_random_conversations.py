"""Random conversations in every family: what is trained on is what the oracle says, or there is a cause for refusal."""

from __future__ import annotations

from typing import Any

import families
import pytest
import tiny_tokenizers as tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_conversations import rows
from rendering_oracle import check, check_refusal
from shapes import answer, user

from rayalign.config.data import TokenBudget
from rayalign.data.chat import Chat, make_chat
from rayalign.data.group import Group
from rayalign.data.records import BadRow, RawRow
from rayalign.data.tokenize import Tokenized, rows_to_groups

UNLIMITED = TokenBudget(max_prompt_tokens=100_000, max_tokens=200_000)
READS_IMAGES = ("idefics3", "llava_next", "smolvlm")
FAMILIES = [name for name in families.names() if name.removesuffix("_training") not in READS_IMAGES]
SOME = ["qwen3", "qwen3_5_nothink", "deepseek_r1_distill", "gptoss", "gemma4_v5", "glm4moe", "llama3_1", "mistral_v3"]
SOME += ["nemotron_3_nano", "vicuna", "lfm2_2_5_v2", "muse_glimmer"]
CHATS: dict[str, Chat] = {}


def chat_of(name: str) -> Chat:
    if name not in CHATS:
        CHATS[name] = make_chat(families.tokenizer_of(name))
    return CHATS[name]


def is_as_the_oracle_says(name: str, row: dict[str, Any]) -> None:
    chat = chat_of(name)
    (outcome,) = rows_to_groups([RawRow(source="f", line=1, value=row)], chat, UNLIMITED)
    if isinstance(outcome, BadRow):
        check_refusal(outcome.reason, chat.tokenizer, row)
    else:
        assert isinstance(outcome, Tokenized)
        check(outcome, chat.tokenizer, row, end=chat.end_text)


@given(row=rows(), name=st.sampled_from(SOME))
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
def test_some_conversations(row: dict[str, Any], name: str) -> None:
    is_as_the_oracle_says(name, row)


@pytest.mark.slow
@given(row=rows(), name=st.sampled_from(FAMILIES))
@settings(max_examples=8_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_conversations(row: dict[str, Any], name: str) -> None:
    is_as_the_oracle_says(name, row)


SPELLED = st.sampled_from(["<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<|eot_id|>", "<pad>", "<|call|>"])
WORDS = st.lists(st.sampled_from(["blue", " sky", "\n", " is", "<b>", "|"]), min_size=1, max_size=4).map("".join)
TEXT = st.tuples(WORDS, SPELLED, WORDS).map("".join).map("w{}w".format)
SPELLING = {
    **{name: chat_of(name) for name in ("qwen2_5", "llama3", "glm4moe", "gptoss", "mistral_v3")},
    "texts": make_chat(tiny.byte_level(bos="<s>")),
    "texts of words": make_chat(tiny.metaspace()),
}


@given(question=TEXT, said=TEXT, name=st.sampled_from(sorted(SPELLING)))
@settings(max_examples=200, deadline=None)
def test_control_tokens_that_somebody_spells_are_text(question: str, said: str, name: str) -> None:
    """No control token comes from a row's words: there are as many as where something else is spelled."""
    chat = SPELLING[name]
    group, plain = group_of(chat, question, said), group_of(chat, "w", "w")
    assert controls(group, chat) == controls(plain, chat)
    decoded = chat.tokenizer.decode([*group.prompt_ids, *group.candidates[0].ids])
    assert name == "texts of words" or (question in decoded and said in decoded)


def group_of(chat: Chat, question: str, said: str) -> Group:
    row: dict[str, Any] = {"prompt": question, "completion": said}
    if chat.has_template:
        row = {"messages": [user(question), answer(said)]}
    (outcome,) = rows_to_groups([RawRow(source="f", line=1, value=row)], chat, UNLIMITED)
    assert isinstance(outcome, Tokenized), outcome
    return outcome.group


def controls(group: Group, chat: Chat) -> list[int]:
    special = {id for id, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    special -= {chat.tokenizer.convert_tokens_to_ids("<unk>")}
    return [id for id in [*group.prompt_ids.tolist(), *group.candidates[0].ids.tolist()] if id in special]
