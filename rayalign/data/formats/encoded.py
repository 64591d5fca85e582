"""Conversations that a file holds as text: JSON is read; what holds one in another way is refused, never learned."""

from __future__ import annotations

import json
import re
from typing import Any

from rayalign.data.schema import RowProblem

_PYTHON = re.compile(r"(?:array\()?\s*[\[(]?\s*(?:array\()?\s*[\[(]?\s*\{\s*'(?:role|from|content|value)'\s*:")
"""How turns begin that Python or numpy printed."""
_BEGINNINGS = ("[", "{", "(", '"', "array(")
_HOLDERS = ("messages", "conversations", "conversation")
_SPEAKERS = frozenset({"user", "assistant", "system", "human", "gpt"})


def decoded(value: Any, name: str) -> Any:
    """A conversation or a turn that is written as JSON text, as what it says; any other value as it is.

    Raises:
        RowProblem: the text holds a conversation in another way.
    """
    bare = value.strip().removeprefix("\ufeff").lstrip() if isinstance(value, str) else ""
    if not bare.startswith(_BEGINNINGS):
        return value
    if _PYTHON.match(bare):
        raise RowProblem(name, f"{name} is a list of turns as Python prints it; write it as JSON (json.dumps)")
    found = _loaded(bare)
    if _is_said(found):
        return found
    if how := _otherwise(found):
        raise RowProblem(name, f"{name} is the JSON text of {how}; write a list of {{role: …, content: …}}")
    return value


def _loaded(text: str) -> Any:
    """None where the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_said(found: Any) -> bool:
    """Whether this is a turn, or a list of objects of which one at least is a turn."""
    if isinstance(found, dict):
        return _is_turn(found)
    return isinstance(found, list) and all(isinstance(item, dict) for item in found) and any(map(_is_turn, found))


def _is_turn(item: dict[str, Any]) -> bool:
    """Answers may be JSON too, with a role or a from of their own."""
    is_ours = "role" in item and not {"content", "tool_calls", "function_call"}.isdisjoint(item)
    return is_ours or {"from", "value"} <= item.keys()


def _otherwise(found: Any) -> str:
    """What holds a conversation in another way, for a person; empty where nothing does."""
    if isinstance(found, str) and _is_said(_loaded(found)):
        return "a conversation that is JSON text already"
    if isinstance(found, dict) and any(_is_said(found.get(key)) for key in _HOLDERS):
        return "an object with a conversation in it"
    if isinstance(found, list) and found and all(map(_is_exchange, found)):
        return "pairs of a speaker and words"
    return ""


def _is_exchange(item: Any) -> bool:
    is_pair = isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item)
    return is_pair and item[0].strip().lower() in _SPEAKERS
