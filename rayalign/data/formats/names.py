"""What columns of data sets are called: prompts, answers, what only describes a row, what is no text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any, Final

from rayalign.data.schema import Fields

PROMPTS: Final = (
    "prompt", "question", "query", "instruction", "input", "user", "human", "problem", "user_prompt", "input_text",
    "context", "history", "post", "passage", "document", "article", "body", "title", "task", "dialogue", "dialog",
    "conversation", "conversations", "messages", "info", "request", "source_text",
)  # fmt: skip
"""Columns that may be a prompt or a part of one, the likeliest first."""
ANSWERS: Final = (
    "completion", "response", "answer", "output", "reply", "solution", "target", "summary", "generation",
    "generated_text", "gpt", "assistant", "completions", "responses", "answers", "outputs", "solutions", "targets",
    "summaries", "generations", "reference_answer",
)  # fmt: skip
"""Columns that may be an answer, the likeliest first."""
_BESIDE_TEXT: Final = ("role", "code", "canonical_solution")
"""Columns that make a text a turn, or a prompt."""
VERDICTS: Final = frozenset({"chosen", "rejected", "label", "labels", "choice", "kto_tag", "preference", "winner"})
"""Columns that say which answer is better, or how good one is."""
_NUMBERED = re.compile(r"(response|answer|completion|output|reply|candidate|summary|text)_?([0-9]|[a-dA-D])")
"""response_1, answer_B …: answers side by side."""
NUMBERS: Final = (
    "label", "kto_tag", "margin", "soft_label", "chosen_score", "rejected_score", "score_chosen", "score_rejected",
    "preference_strength", "overall_preference", "preference", "preferred", "better_response_id", "safer_response_id",
    "labels", "score_A", "score_B", "score_0", "score_1", "helpfulness", "reward",
)  # fmt: skip
"""Columns that hold numbers or truth values; in a CSV file every other cell is a text."""
MEDIA: Final = re.compile(r"(image|video|audio)s?(_(path|file|url|uri|byte|data)s?)?|pixel_values")
"""Columns of what is no text."""
MARKER: Final = re.compile(r"<(image|video|audio)>")
"""Marks the place of a picture in a text."""
MARKER_ALONE: Final = re.compile(r"\A<(image|video|audio)>[ \t]*\n|\n[ \t]*<(image|video|audio)>\Z")
"""The same in the first or last line, where nothing else can be meant."""
QUARANTINE: Final = frozenset({"file", "line", "reason", "field", "excerpt"})
_METADATA: Final = re.compile(
    r"(.*[_-])?(id|ids|uuid|hash|sha256|index|idx|source|sources|dataset|dataset_name|model|models|url|urls|link|links"
    r"|split|subset|config|meta|metadata|timestamp|time|date|created|updated|created_at|language|lang|domain|category"
    r"|categories|topic|topics|tag|tags|task_type|license|version|batch|worker|annotator|annotators|author|name|names"
    r"|seed|difficulty|turns|tokens|token_count|length|len|num|count|sampling|permalink|file|path|index_level_0__)"
    r"|num_.*|__.*__|n_.*|good_natured|conv(ersation)?_turns|(unnamed: \d+)?"
)


@cache
def is_metadata(name: str) -> bool:
    """Whether a column only describes its row, by its name: told, but not loudly."""
    return _METADATA.fullmatch(name.lower()) is not None


def is_answer_like(name: str) -> bool:
    return name.lower() in ANSWERS or name.lower() in VERDICTS or _NUMBERED.fullmatch(name) is not None


def is_text_alone(row: Fields) -> bool:
    """Whether no column beside ``text`` could be a prompt or an answer."""
    others = (name for name in row if name != "text")
    return not any(is_answer_like(name) or name.lower() in (*PROMPTS, *_BESIDE_TEXT) for name in others)


def first_known_name(names: Iterable[str], known: tuple[str, ...]) -> str | None:
    """The name that stands first in ``known``; None where none does."""
    held = {name.lower(): name for name in names}
    return next((held[name] for name in known if name in held), None)


def may_be_prompt(name: str, value: Any, *, is_text: bool) -> bool:
    """Whether a column that was not read could be the prompt of the row.

    Where answers are texts and nothing is known of the prompt (``is_text``), every conversation may be, and every text
    that no name excludes.
    """
    first = value[0] if isinstance(value, list | tuple) and value else None
    is_conversation = isinstance(first, dict) and not {"role", "from"}.isdisjoint(first)
    if name.lower() in PROMPTS:
        return isinstance(value, str | dict) or is_conversation
    is_free = isinstance(value, str) and not is_metadata(name) and not is_answer_like(name)
    return is_text and (is_conversation or is_free)


def is_said(value: Any, texts: frozenset[str]) -> bool:
    """Whether a column holds nothing but what ``texts``, the turns that were read, hold."""
    if isinstance(value, str):
        return value.strip() in texts
    if isinstance(value, list | tuple) and value and all(isinstance(item, dict) for item in value):
        contents = [item.get("content", item.get("value")) for item in value]
        return all(isinstance(content, str) and content.strip() in texts for content in contents)
    return False
