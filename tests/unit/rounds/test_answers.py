"""Completions as texts, and those texts read back as rows: the same tokens, or it is known that they are not."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
import tiny_tokenizers as tiny

from rayalign.config.data import TokenBudget
from rayalign.data.chat import Chat, make_chat
from rayalign.data.group import Candidate, Group
from rayalign.data.records import RawRow
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.rounds.answers import written_back

SETTINGS = TokenBudget(max_prompt_tokens=1_000, max_tokens=2_000)


def drawn(chat: Chat, prompt: Any, *completions: tuple[str, bool]) -> tuple[Group, list[int]]:
    """A group of fresh completions, (text, finished), as a rollout engine returns them, and the prompt's ids."""
    (outcome,) = rows_to_groups([RawRow(source="p", line=1, value={"prompt": prompt})], chat, SETTINGS)
    assert isinstance(outcome, Tokenized)
    candidates = []
    for text, finished in completions:
        ids = [*chat.encode([text])[text], *([chat.end_id] if finished else [])]
        candidates.append(Candidate(ids=np.array(ids, np.int32), mask=np.ones(len(ids), np.bool_), finished=finished))
    return Group(prompt_ids=outcome.group.prompt_ids, candidates=tuple(candidates)), outcome.group.prompt_ids.tolist()


@pytest.mark.parametrize(
    ("family", "completions"),
    [
        ("qwen2_5", [("Blue.", True), ("The sky is bl", False), ("", True), ("\n\n Blue. \n", True)]),
        ("llama3", [("Blue.", True), ("The sky is bl", False)]),
        ("qwen3", [("<think>\nhm\n</think>\n\nBlue.", True), ("<think>\nhm and then", False)]),
        ("deepseek_r1_distill", [("hm\n</think>\n\nBlue.", True), ("hm and then", False)]),
        ("glm4moe", [("\n<think></think>\nBlue.", True)]),
    ],
)
def test_what_generate_writes_is_read_back_to_the_drawn_tokens(
    family: str, completions: list[tuple[str, bool]]
) -> None:
    chat = make_chat(families.tokenizer_of(family))
    group, prompt_ids = drawn(chat, [{"role": "user", "content": "What is it?"}], *completions)
    said = {"prompt": [{"role": "user", "content": "What is it?"}]}
    texts, same = written_back(group, said, chat)
    assert all(same), texts
    row = {**said, "completions": texts, "finished": [done for _, done in completions], "rewards": [None] * len(texts)}
    (outcome,) = rows_to_groups([RawRow(source="g", line=1, value=row)], chat, SETTINGS)
    assert isinstance(outcome, Tokenized), outcome
    assert outcome.group.prompt_ids.tolist() == prompt_ids
    assert [own.ids.tolist() for own in outcome.group.candidates] == [own.ids.tolist() for own in group.candidates]
    assert [own.finished for own in outcome.group.candidates] == [done for _, done in completions]
    assert np.isnan(outcome.group.per_candidate["reward"]).all()


def test_texts_keep_their_spaces_where_those_make_the_tokens() -> None:
    chat = make_chat(tiny.byte_level(bos="<s>"))
    group, _ = drawn(chat, "The sky is", (" blue.", True), (" green", False))
    assert written_back(group, {"prompt": "The sky is"}, chat) == ([" blue.", " green"], [True, True])


def test_tokens_that_no_text_gives_back_are_known() -> None:
    """Llama 3's template trims answers; one of two tokens is another than the text's own."""
    chat = make_chat(families.tokenizer_of("llama3"))
    group, _ = drawn(chat, "What?", ("  Blue.", True), ("Blue.", True))
    texts, same = written_back(group, {"prompt": "What?"}, chat)
    assert (texts, same) == (["Blue.", "Blue."], [False, True])
