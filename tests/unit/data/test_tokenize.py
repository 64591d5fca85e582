"""Budgets, numbers and batches; the letters of these texts are one token each, so lengths can be read off them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.data.chat import make_chat
from rayalign.data.group import Group
from rayalign.data.records import BadRow, RawRow
from rayalign.data.schema import MISSING, Example
from rayalign.data.tables import read_rows
from rayalign.data.tokenize import DroppedRow, Tokenized, TokenizeSettings, rows_to_groups, to_group, to_groups
from rayalign.errors import UserError

RAW = make_chat(tiny.byte_level(bos="<s>"))
BOS, END = RAW.tokenizer.bos_token_id, RAW.end_id
UNLIMITED = TokenizeSettings(max_prompt_tokens=10_000, max_tokens=20_000)


def ids(text: str) -> list[int]:
    found: list[int] = RAW.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def tokenized(example: Example, settings: TokenizeSettings) -> Tokenized:
    (outcome,) = to_groups([example], RAW, settings)
    assert isinstance(outcome, Tokenized), outcome
    return outcome


PAIR = Example(format="preference", prompt="0123456789", candidates=("abcdefgh", "xy"), source="p.jsonl", line=2)


def test_nothing_is_cut_within_the_budget() -> None:
    outcome = tokenized(PAIR, TokenizeSettings(max_prompt_tokens=11, max_tokens=20))
    assert outcome.group.prompt_ids.tolist() == [BOS, *ids("0123456789")]
    assert [answer.ids.tolist() for answer in outcome.group.candidates] == [[*ids("abcdefgh"), END], [*ids("xy"), END]]
    assert all(answer.mask.all() and answer.finished for answer in outcome.group.candidates)
    assert not outcome.truncation
    assert (outcome.group.source, outcome.group.line) == ("p.jsonl", 2)
    assert outcome.group.prompt_ids.dtype == np.int32 and outcome.group.candidates[0].mask.dtype == np.bool_


def test_prompt_is_cut_from_the_left_and_keeps_its_beginning_token() -> None:
    outcome = tokenized(PAIR, TokenizeSettings(max_prompt_tokens=4, max_tokens=30))
    assert outcome.group.prompt_ids.tolist() == [BOS, *ids("789")]
    assert outcome.truncation.prompt == 7 and outcome.truncation.responses == (0, 0)
    plain = make_chat(tiny.byte_level())
    group = to_group(PAIR, plain, TokenizeSettings(max_prompt_tokens=4, max_tokens=30))
    assert isinstance(group, Group) and group.prompt_ids.tolist() == ids("6789")


def test_response_is_cut_from_the_right_and_has_no_end_token() -> None:
    outcome = tokenized(PAIR, TokenizeSettings(max_prompt_tokens=11, max_tokens=16))
    long, short = outcome.group.candidates
    assert long.ids.tolist() == ids("abcde") and not long.finished
    assert short.ids.tolist() == [*ids("xy"), END] and short.finished
    assert outcome.truncation.responses == (4, 0)


def test_response_that_loses_only_its_end_token_is_unfinished() -> None:
    long = tokenized(PAIR, TokenizeSettings(max_prompt_tokens=11, max_tokens=19)).group.candidates[0]
    assert long.ids.tolist() == ids("abcdefgh") and not long.finished


def test_closed_responses_end_in_the_end_token() -> None:
    outcome = tokenized(PAIR, TokenizeSettings(max_prompt_tokens=11, max_tokens=16, truncated="close"))
    long, short = outcome.group.candidates
    assert long.ids.tolist() == [*ids("abcd"), END] and long.finished and long.mask.all()
    assert short.ids.tolist() == [*ids("xy"), END]
    assert outcome.truncation.responses == (5, 0)


def test_dropped_rows_are_told_apart_from_bad_ones() -> None:
    settings = TokenizeSettings(max_prompt_tokens=11, max_tokens=16, truncated="drop")
    dropped = to_group(PAIR, RAW, settings)
    assert isinstance(dropped, DroppedRow) and (dropped.source, dropped.line) == ("p.jsonl", 2)
    assert dropped.truncation.responses == (4, 0)


def test_what_is_left_of_a_conversation_ends_in_a_predicted_token() -> None:
    turns = tuple(
        {"role": role, "content": text} for role, text in [("assistant", "ab"), ("user", "c"), ("assistant", "d")]
    )
    example = Example(format="messages", prompt=({"role": "user", "content": "q"},), candidates=(turns,))
    whole = tokenized(example, UNLIMITED).group
    first_end = whole.candidates[0].ids.tolist().index(END) + 1
    masked = len(whole.candidates[0].ids) - whole.candidates[0].num_predicted
    assert first_end == len(ids(" ab")) + 1 and masked == len(ids("\n\nHuman: c\n\nAssistant:"))
    for room in range(1, len(whole.candidates[0].ids) + 1):
        settings = TokenizeSettings(max_prompt_tokens=len(whole.prompt_ids), max_tokens=len(whole.prompt_ids) + room)
        (answer,) = tokenized(example, settings).group.candidates
        expected = min(room, first_end) if room <= first_end + masked else room
        assert answer.ids.tolist() == whole.candidates[0].ids[:expected].tolist()
        assert answer.mask[-1] and answer.finished == (answer.ids[-1] == END)


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
    budget = TokenizeSettings(
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_prompt_tokens + room,
        truncated=truncated,  # type: ignore[arg-type]
    )
    whole, outcome = tokenized(example, UNLIMITED).group, tokenized(example, budget)
    group = outcome.group
    assert 1 <= len(group.prompt_ids) <= max_prompt_tokens and group.prompt_ids[0] == BOS
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
    group = tokenized(example, TokenizeSettings(max_prompt_tokens=2, max_tokens=6)).group
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
        RawRow(source="f", line=5, value={"prompt": "a", "completion": "b</s>c"}),
    ]
    outcomes = rows_to_groups(rows, RAW, UNLIMITED)
    assert [type(outcome) for outcome in outcomes] == [Tokenized, BadRow, Tokenized, BadRow, BadRow]
    lines = [outcome.group.line if isinstance(outcome, Tokenized) else outcome.line for outcome in outcomes]
    assert lines == [1, 2, 3, 4, 5]
    assert rows_to_groups([], RAW, UNLIMITED) == []


def test_batches_do_not_change_groups(test_data: Path) -> None:
    chat = make_chat(tiny.byte_level(template=tiny.CHATML))
    rows = [row for _, row in zip(range(40), read_rows(str(test_data / "hh_harmless_test.jsonl.gz")), strict=False)]
    together = rows_to_groups(rows, chat, TokenizeSettings())
    alone = [outcome for row in rows for outcome in rows_to_groups([row], chat, TokenizeSettings())]
    assert [repr(outcome) for outcome in together] == [repr(outcome) for outcome in alone]


@pytest.mark.parametrize(("max_prompt_tokens", "max_tokens"), [(0, 5), (5, 5), (6, 5)])
def test_budgets_that_leave_no_room(max_prompt_tokens: int, max_tokens: int) -> None:
    with pytest.raises(UserError, match=f"data.max_prompt_tokens is {max_prompt_tokens} and data.max_tokens 5"):
        TokenizeSettings(max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens)
