"""Two answers side by side and a verdict about them, as data sets of comparisons have them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rayalign.data.formats.base import Body, Format, Texts, comparison_body, one_of
from rayalign.data.formats.scored import helpsteer_prompt
from rayalign.data.formats.turns import text_or_turns_said
from rayalign.data.schema import Fields, RowProblem, optional_number, required, required_text

IDS = ("preferred", "better_response_id", "safer_response_id")
STRENGTHS = ("preference_strength", "overall_preference", "preference")
ASK_WHICH = (
    "better_response_id and safer_response_id are two preferences: write columns: {preferred: better_response_id} for "
    "the more helpful answer, or columns: {preferred: safer_response_id} for the safer one"
)
ASK_SIGN = (
    "preference may be a sign or the number of an answer: write format: helpsteer_preference if negative numbers "
    "prefer the first answer and positive ones the second"
)


def _helpsteer_preference(row: Fields) -> Body:
    """Negative: the first answer is better; positive: the second; zero: neither."""
    name = one_of(row, *STRENGTHS)
    strength = optional_number(row, name) if name in row else 0.0
    if not -3 <= strength <= 3:
        raise RowProblem(name, f"{name} is {row[name]!r}: it must lie between -3 (first) and 3 (second)")
    answers = _side_by_side(row, one_of(row, "response_1", "response1"), one_of(row, "response_2", "response2"))
    prompt = helpsteer_prompt(row, one_of(row, "prompt", "context"))
    return comparison_body(prompt, answers, better=int(strength > 0) if strength else None)


def _safe_rlhf(row: Fields) -> Body:
    name = "preferred" if "preferred" in row else one_of(row, *IDS)
    return comparison_body(
        text_or_turns_said(row, "prompt"),
        _side_by_side(row, "response_0", "response_1"),
        better=_place(row.get(name), name),
    )


def _shp(row: Fields) -> Body:
    """``labels`` is 1 where A is preferred; scores are votes."""
    place = _place(row.get("labels"), "labels")
    scores = ("score_A", "score_B")
    return comparison_body(
        required_text(row, "history"),
        _side_by_side(row, "human_ref_A", "human_ref_B"),
        better=None if place is None else 1 - place,
        rewards=[optional_number(row, name) for name in scores] if all(name in row for name in scores) else (),
    )


def _webgpt(row: Fields) -> Body:
    """The answer with the higher score is preferred; equal scores are a tie."""
    question = required(row, "question")
    prompt = required_text(question, "full_text") if isinstance(question, dict) else required_text(row, "question")
    scores = [optional_number(row, name) for name in ("score_0", "score_1") if name in row]
    answers = _side_by_side(row, "answer_0", "answer_1")
    if len(scores) < 2 or scores[0] == scores[1]:
        return comparison_body(prompt, answers, better=None, rewards=scores if len(scores) == 2 else ())
    return comparison_body(prompt, answers, better=int(scores[1] > scores[0]), rewards=scores)


def _tldr(row: Fields) -> Body:
    """The prompt is written as the data set's own authors wrote it."""
    info, summaries = required(row, "info"), required(row, "summaries")
    if not isinstance(info, dict) or not all(isinstance(info.get(key), str) for key in ("post", "title", "subreddit")):
        raise RowProblem("info", "info must be an object with the texts post, title and subreddit")
    if not isinstance(summaries, list | tuple) or len(summaries) != 2 or not all(map(_has_text, summaries)):
        raise RowProblem("summaries", "summaries must be a list of two objects with a text")
    prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
    answers: dict[str, Texts] = {f"summaries[{place}].text": own["text"] for place, own in enumerate(summaries)}
    return comparison_body(prompt, answers, better=_place(row.get("choice"), "choice"))


def _has_text(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("text"), str) and bool(value["text"].strip())


def _side_by_side(row: Fields, first: str, second: str) -> dict[str, Texts]:
    return {name: text_or_turns_said(row, name) for name in (first, second)}


def _place(value: Any, name: str) -> int | None:
    """0 or 1, the preferred answer; None where the row does not say."""
    if value is not None and value not in (0, 1):
        raise RowProblem(name, f"{name} must be 0 or 1, not {value!r}")
    return None if value is None else int(value)


def _has_one_id(row: Fields) -> bool:
    """Helpful and harmless are two preferences: which is meant must be said."""
    return "preferred" in row or sum(name in row for name in IDS) == 1


def _has_signed_strength(row: Fields) -> bool:
    """``preference`` alone may as well be the number of an answer."""
    return any(name in row for name in STRENGTHS[:2])


COMPARED: Mapping[str, Format] = MappingProxyType(
    {
        "tldr": Format(
            says="Two summaries of a post and a choice (summarize_from_feedback, comparisons).",
            read=_tldr,
            needs=("info", "summaries", "choice"),
            verdicts=("choice",),
            leaves=("extra",),
        ),
        "shp": Format(
            says="Two answers to a post; ``labels`` 1 prefers A. Scores become rewards.",
            read=_shp,
            needs=("history", "human_ref_A", "human_ref_B", "labels"),
            may=("score_A", "score_B"),
            leaves=("score_ratio", "seconds_difference", "upvote_ratio", "root_text_A", "root_text_B"),
            verdicts=("labels",),
        ),
        "webgpt": Format(
            says="Two answers and their scores, of which the higher is preferred; equal scores are a tie.",
            read=_webgpt,
            needs=("question", "answer_0", "answer_1", "score_0", "score_1"),
            leaves=("quotes_0", "quotes_1", "tokens_0", "tokens_1"),
            verdicts=("score_0", "score_1"),
        ),
        "safe_rlhf": Format(
            says="Two answers and the number of the better one; of two such columns, the one named ``preferred``.",
            read=_safe_rlhf,
            needs=("prompt", "response_0", "response_1", "|".join(IDS)),
            verdicts=IDS,
            is_found=_has_one_id,
            ask=ASK_WHICH,
        ),
        "helpsteer_preference": Format(
            says="Two answers; a negative number prefers the first, a positive one the second, 0 is a tie.",
            read=_helpsteer_preference,
            needs=("prompt|context", "response_1|response1", "response_2|response2", "|".join(STRENGTHS)),
            leaves=("preference_statement", "preference_elaboration", "individual_preference"),
            verdicts=STRENGTHS,
            is_found=_has_signed_strength,
            ask=ASK_SIGN,
        ),
    }
)
