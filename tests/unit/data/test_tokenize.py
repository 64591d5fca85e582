"""Budgets, numbers and batches; the letters of these texts are one token each, so lengths can be read off them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rayalign.config.data import TokenBudget
from rayalign.data.budget import Completed
from rayalign.data.chat import make_chat
from rayalign.data.group import Group
from rayalign.data.records import BadRow, RawRow
from rayalign.data.schema import MISSING, Example
from rayalign.data.tables import read_rows
from rayalign.data.tokenize import DroppedRow, Tokenized, rows_to_groups, to_group, to_groups

RAW = make_chat(tiny.byte_level(bos="<s>"))
BOS, END = RAW.tokenizer.bos_token_id, RAW.end_id
UNLIMITED = TokenBudget(max_prompt_tokens=10_000, max_tokens=20_000)


def ids(text: str) -> list[int]:
    found: list[int] = RAW.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def tokenized(example: Example, settings: TokenBudget, *, completed: Completed = "no") -> Tokenized:
    (outcome,) = to_groups([example], RAW, settings, completed=completed)
    assert isinstance(outcome, Tokenized), outcome
    return outcome


PAIR = Example(format="preference", prompt="0123456789", candidates=("abcdefgh", "xy"), source="p.jsonl", line=2)


def test_nothing_is_cut_within_the_budget() -> None:
    outcome = tokenized(PAIR, TokenBudget(max_prompt_tokens=11, max_tokens=20))
    assert outcome.group.prompt_ids.tolist() == [BOS, *ids("0123456789")]
    assert [answer.ids.tolist() for answer in outcome.group.candidates] == [[*ids("abcdefgh"), END], [*ids("xy"), END]]
    assert all(answer.mask.all() and answer.finished for answer in outcome.group.candidates)
    assert not outcome.truncation
    assert (outcome.group.source, outcome.group.line) == ("p.jsonl", 2)
    assert outcome.group.prompt_ids.dtype == np.int32 and outcome.group.candidates[0].mask.dtype == np.bool_


def test_prompt_is_cut_from_the_left_and_keeps_its_beginning_token() -> None:
    outcome = tokenized(PAIR, TokenBudget(max_prompt_tokens=4, max_tokens=13))
    assert outcome.group.prompt_ids.tolist() == [BOS, *ids("789")]
    assert outcome.truncation.prompt == 7 and outcome.truncation.responses == (0, 0)
    plain = make_chat(tiny.byte_level())
    group = to_group(PAIR, plain, TokenBudget(max_prompt_tokens=4, max_tokens=13))
    assert isinstance(group, Group) and group.prompt_ids.tolist() == ids("6789")


@pytest.mark.parametrize(
    ("max_prompt_tokens", "max_tokens", "kept", "cut"),
    [
        (4, 20, 11, 0),  # prompt and response fit together: nothing is cut, however long the prompt
        (4, 19, 10, 0),  # one token too many: the prompt loses it, and no more
        (4, 13, 4, 0),
        (4, 12, 4, 1),  # the prompt keeps its four, and the response loses its end
        (11, 19, 11, 1),  # a prompt within max_prompt_tokens is never cut
        (12, 13, 11, 7),
    ],
)
def test_a_prompt_gives_way_to_the_response_as_far_as_needed(
    max_prompt_tokens: int, max_tokens: int, kept: int, cut: int
) -> None:
    """The prompt has 11 tokens, the longer response 9."""
    settings = TokenBudget(max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens)
    outcome = tokenized(PAIR, settings)
    assert len(outcome.group.prompt_ids) == kept == 11 - outcome.truncation.prompt
    assert outcome.truncation.responses[0] == cut
    alone = tokenized(replace(PAIR, candidates=()), settings).group
    assert len(alone.prompt_ids) == min(11, max_prompt_tokens)
    completed = tokenized(PAIR, settings, completed="beside").group
    assert completed.prompt_ids.tolist() == alone.prompt_ids.tolist()
    for policy in ({"truncated": "drop"}, {"long_prompts": "drop"}):
        dropped = to_group(PAIR, RAW, settings.model_copy(update=policy))
        wanted = kept < 11 or (cut > 0 and "truncated" in policy)
        assert isinstance(dropped, DroppedRow) == wanted


def test_response_is_cut_from_the_right_and_has_no_end_token() -> None:
    outcome = tokenized(PAIR, TokenBudget(max_prompt_tokens=11, max_tokens=16))
    long, short = outcome.group.candidates
    assert long.ids.tolist() == ids("abcde") and not long.finished
    assert short.ids.tolist() == [*ids("xy"), END] and short.finished
    assert outcome.truncation.responses == (4, 0)


def test_response_that_loses_only_its_end_token_is_unfinished() -> None:
    long = tokenized(PAIR, TokenBudget(max_prompt_tokens=11, max_tokens=19)).group.candidates[0]
    assert long.ids.tolist() == ids("abcdefgh") and not long.finished


def test_closed_responses_end_in_the_end_token() -> None:
    outcome = tokenized(PAIR, TokenBudget(max_prompt_tokens=11, max_tokens=16, truncated="close"))
    long, short = outcome.group.candidates
    assert long.ids.tolist() == [*ids("abcd"), END] and long.finished and long.mask.all()
    assert short.ids.tolist() == [*ids("xy"), END]
    assert outcome.truncation.responses == (5, 0)


def test_dropped_rows_are_told_apart_from_bad_ones() -> None:
    settings = TokenBudget(max_prompt_tokens=11, max_tokens=16, truncated="drop")
    dropped = to_group(PAIR, RAW, settings)
    assert isinstance(dropped, DroppedRow) and (dropped.source, dropped.line) == ("p.jsonl", 2)
    assert dropped.truncation.responses == (4, 0)


def test_what_is_left_of_a_conversation_ends_in_a_predicted_token() -> None:
    chat = make_chat(tiny.byte_level(template=tiny.ZEPHYR))
    turns = tuple(
        {"role": role, "content": text} for role, text in [("assistant", "ab"), ("user", "c"), ("assistant", "d")]
    )
    example = Example(format="messages", prompt=({"role": "user", "content": "q"},), candidates=(turns,))
    whole = to_group(example, chat, UNLIMITED)
    assert isinstance(whole, Group)
    first_end = len(ids("ab")) + 1
    masked = len(whole.candidates[0].ids) - whole.candidates[0].num_predicted
    assert whole.candidates[0].ids[first_end - 1] == chat.end_id and whole.candidates[0].num_predicted == first_end + 2
    for room in range(1, len(whole.candidates[0].ids) + 1):
        settings = TokenBudget(max_prompt_tokens=len(whole.prompt_ids), max_tokens=len(whole.prompt_ids) + room)
        cut = to_group(example, chat, settings)
        assert isinstance(cut, Group)
        expected = min(room, first_end) if room <= first_end + masked else room
        (answer,) = cut.candidates
        assert answer.ids.tolist() == whole.candidates[0].ids[:expected].tolist()
        assert answer.mask[-1] and answer.finished == (answer.ids[-1] == chat.end_id)


def test_a_row_of_which_no_predicted_token_fits_is_left_out() -> None:
    """Both first answers are only seen, since Mistral's template moves the system's words; they fill the budget."""
    chat = make_chat(tiny.byte_level(template=tiny.MISTRAL, bos="<s>"))
    system, question = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    answers = tuple(
        ({"role": "assistant", "content": text}, question, {"role": "assistant", "content": "d"})
        for text in ("ab", "cd")
    )
    example = Example(format="preference", prompt=(system, question), candidates=answers)
    whole = to_group(example, chat, UNLIMITED)
    assert isinstance(whole, Group) and whole.candidates[0].mask.tolist()[:3] == [False] * 3
    room = len(whole.prompt_ids) + 3
    settings = TokenBudget(max_prompt_tokens=len(whole.prompt_ids), max_tokens=room)
    assert isinstance(to_group(example, chat, settings), DroppedRow)


@given(
    prompt=st.text("ab ", min_size=1, max_size=30).filter(str.strip),
    answers=st.lists(st.text("xyz \n", max_size=30), min_size=1, max_size=4),
    max_prompt_tokens=st.integers(1, 20),
    room=st.integers(1, 20),
    truncated=st.sampled_from(["keep", "close"]),
)
@settings(max_examples=150, deadline=None)
def test_budgets_hold_and_nothing_becomes_empty(
    prompt: str, answers: list[str], max_prompt_tokens: int, room: int, truncated: str
) -> None:
    example = Example(format="ranked", prompt=prompt, candidates=tuple(answers))
    budget = TokenBudget(
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_prompt_tokens + room,
        truncated=truncated,  # type: ignore[arg-type]
    )
    whole, outcome = tokenized(example, UNLIMITED).group, tokenized(example, budget)
    group = outcome.group
    longest = max(len(answer.ids) for answer in whole.candidates)
    room_beside = max(max_prompt_tokens, budget.max_tokens - longest)
    assert len(group.prompt_ids) == min(len(whole.prompt_ids), room_beside) and group.prompt_ids[0] == BOS
    assert len(group.prompt_ids) + outcome.truncation.prompt == len(whole.prompt_ids)
    for answer, full, cut in zip(group.candidates, whole.candidates, outcome.truncation.responses, strict=True):
        assert 1 <= answer.num_predicted <= len(answer.ids) <= budget.max_tokens - len(group.prompt_ids)
        assert answer.ids.tolist().count(END) == int(answer.finished)
        kept = len(full.ids) - cut
        assert answer.ids[:kept].tolist() == full.ids[:kept].tolist()
        assert len(answer.ids) == kept + (truncated == "close" and cut > 0)


def test_numbers_become_columns_and_a_cut_response_loses_its_behavior_logp() -> None:
    columns = {"reward": (1.5, MISSING), "behavior_logp": (-3.0, -2.0)}
    example = Example(format="ranked", prompt="q", candidates=("abcdef", "x"), columns=columns)
    group = tokenized(example, TokenBudget(max_prompt_tokens=2, max_tokens=6)).group
    assert group.per_candidate["reward"].dtype == np.float32
    assert group.per_candidate["reward"][0] == 1.5 and math.isnan(group.per_candidate["reward"][1])
    assert math.isnan(group.per_candidate["behavior_logp"][0]) and group.per_candidate["behavior_logp"][1] == -2.0


def test_prompt_alone_is_a_group_without_candidates() -> None:
    group = to_group(Example(format="prompt_only", prompt="ab", candidates=()), RAW, UNLIMITED)
    assert isinstance(group, Group) and group.candidates == () and group.prompt_ids.tolist() == [BOS, *ids("ab")]


def test_rows_and_outcomes_stand_side_by_side() -> None:
    rows = [
        RawRow(source="f", line=1, value={"prompt": "a", "completion": "b"}),
        BadRow(source="f", line=2, reason="torn"),
        RawRow(source="f", line=3, value={"prompt": "a"}),
        RawRow(source="f", line=4, value={"prompt": "a", "completion": ""}),
        RawRow(source="f", line=5, value={"prompt": "a", "completion": "bc</s>"}),
    ]
    outcomes = rows_to_groups(rows, RAW, UNLIMITED)
    assert [type(outcome) for outcome in outcomes] == [Tokenized, BadRow, Tokenized, BadRow, BadRow]
    lines = [outcome.group.line if isinstance(outcome, Tokenized) else outcome.line for outcome in outcomes]
    assert lines == [1, 2, 3, 4, 5]
    assert rows_to_groups([], RAW, UNLIMITED) == []


def test_batches_do_not_change_groups(test_data: Path) -> None:
    chat = make_chat(tiny.byte_level(template=tiny.CHATML))
    rows = [row for _, row in zip(range(40), read_rows(str(test_data / "hh_harmless_test.jsonl.gz")), strict=False)]
    together = rows_to_groups(rows, chat, TokenBudget())
    alone = [outcome for row in rows for outcome in rows_to_groups([row], chat, TokenBudget())]
    assert [repr(outcome) for outcome in together] == [repr(outcome) for outcome in alone]


@pytest.mark.parametrize(("max_prompt_tokens", "max_tokens"), [(0, 5), (5, 5), (6, 5)])
def test_budgets_that_leave_no_room(max_prompt_tokens: int, max_tokens: int) -> None:
    with pytest.raises(ValidationError, match="max_prompt_tokens"):
        TokenBudget(max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens)
