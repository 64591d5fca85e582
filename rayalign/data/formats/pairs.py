"""Pairs that say which answer is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rayalign.data.formats.base import (
    FINISHED,
    OF_PAIRS,
    Body,
    Format,
    Texts,
    aligned,
    answer_of,
    ending_in_answer,
    one_of,
    pair_columns,
)
from rayalign.data.formats.single import CONVERSATIONS, ending_in_question, instructed
from rayalign.data.formats.turns import ROLES, text_or_turns_said, turns_said
from rayalign.data.schema import Fields, RowProblem, Turns, required, required_text
from rayalign.data.shared_prompt import is_transcript, split_texts, split_turns, transcript_turns

QUESTIONS = ("question", "query", "input")


def _preference(row: Fields) -> Body:
    return _pair(text_or_turns_said(row, "prompt"), row, drawn=FINISHED in row)


def _pair(prompt: Texts, row: Fields, *, drawn: bool = False, is_foreign: bool = False) -> Body:
    """Chosen and rejected after ``prompt``; turns that both share belong to the prompt."""
    pair = {name: text_or_turns_said(row, name, may_be_empty=drawn) for name in ("chosen", "rejected")}
    prompt, (chosen, rejected) = aligned(prompt, pair, may_be_empty=drawn)
    if not isinstance(prompt, str):
        prompt, chosen, rejected = split_turns((*prompt, *chosen), (*prompt, *rejected))
    return Body(prompt, (chosen, rejected), pair_columns(row, leaves_lone_scores=is_foreign))


def _implicit_preference(row: Fields) -> Body:
    chosen, rejected = text_or_turns_said(row, "chosen"), text_or_turns_said(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = split_texts(chosen, rejected)
        pair = {"chosen": chosen, "rejected": rejected}
        return Body(prompt, tuple(required_text(pair, name) for name in pair), pair_columns(row), continues=True)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowProblem("rejected", "chosen and rejected must both be texts or both be lists of turns")
    return _conversations(row, chosen, rejected)


def _ultrafeedback(row: Fields) -> Body:
    prompt = required_text(row, "prompt")
    body = _conversations(row, turns_said(row, "chosen"), turns_said(row, "rejected"))
    if not any(turn["content"].strip() == prompt.strip() for turn in body.prompt if isinstance(turn, Mapping)):
        raise RowProblem("prompt", "prompt is none of the turns that chosen and rejected share")
    return body


def _conversations(row: Fields, chosen: Turns, rejected: Turns) -> Body:
    prompt, chosen, rejected = split_turns(chosen, rejected)
    return Body(prompt, (ending_in_answer(chosen, "chosen"), ending_in_answer(rejected, "rejected")), pair_columns(row))


def _hh(row: Fields) -> Body:
    """An empty last reply is a reply (annotators did prefer silence): its response is the end token alone."""
    chosen, rejected = (
        transcript_turns(required_text(row, "chosen"), "chosen"),
        transcript_turns(required_text(row, "rejected"), "rejected"),
    )
    prompt, chosen, rejected = split_turns(chosen, rejected)
    return Body(prompt, (chosen, rejected), pair_columns(row))


def _orca(row: Fields) -> Body:
    return _pair(text_or_turns_said(row, one_of(row, *QUESTIONS)), row, is_foreign=True)


def _alpaca_preference(row: Fields) -> Body:
    return _pair(instructed(row), row, is_foreign=True)


def _conversation_preference(row: Fields) -> Body:
    """The conversation is the prompt; chosen and rejected are its next turn."""
    prompt = ending_in_question(turns_said(row, name := one_of(row, *CONVERSATIONS)), name)
    pair = {side: answer_of(row, side) for side in ("chosen", "rejected")}
    return Body(*aligned(prompt, pair), pair_columns(row))


def _openai_preference(row: Fields) -> Body:
    given = required(row, "input")
    if not isinstance(given, dict) or "messages" not in given:
        raise RowProblem("input", "input must be an object with messages")
    prompt = ending_in_question(turns_said(given, "messages"), "input.messages")
    pair = {name: answer_of(row, name) for name in ("preferred_output", "non_preferred_output")}
    return Body(*aligned(prompt, pair), tools=given.get("tools") or None)


def starts_with_answer(value: Any) -> bool:
    """True for a turn of the assistant, or turns that begin with one."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    role = (first.get("role") or first.get("from")) if isinstance(first, dict) else None
    return isinstance(role, str) and ROLES.get(role.strip().lower()) == "assistant"


def _asks_before(row: Fields) -> bool:
    """Whether chosen and rejected are answers alone, so that the conversation beside them is their prompt."""
    return "prompt" not in row and (isinstance(row["chosen"], str) or starts_with_answer(row["chosen"]))


def _is_whole(row: Fields) -> bool:
    return (
        isinstance(row["prompt"], str)
        and isinstance(row["chosen"], list | tuple)
        and not starts_with_answer(row["chosen"])
    )


def _is_hh(row: Fields) -> bool:
    return is_transcript(row["chosen"]) and is_transcript(row["rejected"])


PAIRS: Mapping[str, Format] = MappingProxyType(
    {
        "openai_preference": Format(
            says="OpenAI's files of preferences: a conversation with its tools, and two outputs.",
            read=_openai_preference,
            needs=("input", "preferred_output", "non_preferred_output"),
        ),
        "hh": Format(
            says="Transcripts of Human: and Assistant: (HH-RLHF); the prompt is what both begin with.",
            read=_hh,
            needs=("chosen", "rejected"),
            may=OF_PAIRS,
            is_found=_is_hh,
        ),
        "ultrafeedback": Format(
            says="The prompt as text, the answers as whole conversations (UltraFeedback-binarized, Tulu 3).",
            read=_ultrafeedback,
            needs=("prompt", "chosen", "rejected"),
            may=OF_PAIRS,
            is_found=_is_whole,
        ),
        "preference": Format(
            says="A prompt and two answers, texts or turns.",
            read=_preference,
            needs=("prompt", "chosen", "rejected"),
            may=(*OF_PAIRS, FINISHED),
        ),
        "conversation_preference": Format(
            says="The conversation is the prompt, the answers are its next turn (LLaMA-Factory).",
            read=_conversation_preference,
            needs=("|".join(CONVERSATIONS), "chosen", "rejected"),
            may=OF_PAIRS,
            is_found=_asks_before,
        ),
        "alpaca_preference": Format(
            says="The prompt is the instruction, its input on the next line.",
            read=_alpaca_preference,
            needs=("instruction", "chosen", "rejected"),
            may=("input", "history", *OF_PAIRS),
            is_found=_asks_before,
            guesses_prompt=True,
        ),
        "orca": Format(
            says="The prompt is the question, or what replaces it (Orca and Intel pairs).",
            read=_orca,
            needs=("|".join(QUESTIONS), "chosen", "rejected"),
            may=OF_PAIRS,
            is_found=_asks_before,
            guesses_prompt=True,
        ),
        "implicit_preference": Format(
            says="The prompt is what both begin with (Skywork, Capybara).",
            read=_implicit_preference,
            needs=("chosen", "rejected"),
            may=OF_PAIRS,
            guesses_prompt=True,
        ),
    }
)
