"""The system turn: a row's own, or the one that the configuration puts before conversations without any."""

from __future__ import annotations

from typing import Any

from rayalign.data.formats.base import SYSTEM, Texts, one_of
from rayalign.data.formats.parts import texts_joined
from rayalign.data.schema import Fields, RowProblem, assistant, user
from rayalign.data.shared_prompt import asked_transcript

ROLES = ("system", "developer")


def system_of(row: Fields) -> str | None:
    """The column ``system`` as a text; None where it is absent or empty."""
    name = one_of(row, *SYSTEM)
    value: Any = row.get(name)
    if isinstance(value, list):
        value = texts_joined(value, name)
    if value is not None and not isinstance(value, str):
        raise RowProblem(name, f"{name} must be a text")
    return value if value and value.strip() else None


def with_system(
    prompt: Texts, candidates: tuple[Texts, ...], own: str | None, *, default: str | None
) -> tuple[Texts, tuple[Texts, ...]]:
    """A prompt with a system turn in front; a text becomes a conversation by it.

    ``default`` stands only where the row has none of its own. Raises RowProblem where the row has two that differ.
    """
    if not isinstance(prompt, str) and prompt[0]["role"] in ROLES:
        if own is not None and own.strip() != prompt[0]["content"].strip():
            raise RowProblem("system", "system is given, and the turns begin with another system turn; remove one")
        return prompt, candidates
    text = own or default
    if not text:
        return prompt, candidates
    if isinstance(prompt, str) and (turns := asked_transcript(prompt)):
        answers = tuple(_answer(answer, strip=True) for answer in candidates)
    else:
        turns = user(prompt) if isinstance(prompt, str) else prompt
        answers = tuple(_answer(answer) for answer in candidates)
    return ({"role": "system", "content": text}, *turns), answers


def _answer(answer: Texts, *, strip: bool = False) -> Texts:
    """A text as a turn of the assistant; turns as they are."""
    if not isinstance(answer, str):
        return answer
    return assistant(answer.strip() if strip else answer)
