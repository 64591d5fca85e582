"""What a row means: a prompt, its candidates and their numbers; and how its fields are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rayalign.data.records import BadRow, RawRow, excerpt_of

Fields = Mapping[str, Any]
Message = Mapping[str, Any]
"""One turn: ``role``, ``content`` and whatever else the chat template may read (``tool_calls``, ``name`` …)."""
Turns = tuple[Message, ...]
MISSING = math.nan
Preference = Literal["stored", "rewards", "ranks", "unstated", "undecided"]
"""How candidates are ordered: as they stand, by ``reward``, by ``rank``, not said, or said to be equal (or null)."""


class RowProblem(Exception):
    """Why one row cannot be used; becomes a :class:`BadRow` where the row's place is known."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt and its candidates before tokenization; for pairs candidate 0 is chosen and 1 rejected."""

    format: str
    prompt: str | Turns
    candidates: tuple[str | Turns, ...]
    """All texts or all turns, as the prompt; none for a prompt alone."""
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """reward, label, margin, soft_label, behavior_logp: one number per candidate, NaN = missing."""
    continues: bool = False
    """The candidates carry on the prompt's text: never wrapped as turns, whatever the template."""
    preference: Preference = "stored"
    tools: tuple[Fields, ...] | None = None
    template_kwargs: Fields = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    """Columns that hold something and were not read."""
    metadata: tuple[str, ...] = ()
    """Further columns that were not read: they describe the row, or repeat it."""
    source: str = ""
    line: int = 0


def bad_row(row: RawRow, problem: RowProblem) -> BadRow:
    return BadRow(
        source=row.source,
        line=row.line,
        reason=problem.reason,
        field=problem.field,
        excerpt=excerpt_of(row.value),
    )


def required(row: Fields, name: str) -> Any:
    if name not in row:
        raise RowProblem(name, f"{name} is missing; the row has {', '.join(sorted(row)) or 'no field'}")
    return row[name]


def text(row: Fields, name: str) -> str:
    value = required(row, name)
    if not isinstance(value, str):
        raise RowProblem(name, f"{name} must be a text, not a {_kind(value)}")
    if not value.strip():
        raise RowProblem(name, f"{name} is empty")
    return value


def turns(row: Fields, name: str) -> Turns:
    value = required(row, name)
    if not isinstance(value, list | tuple):
        raise RowProblem(name, f"{name} must be a list of turns, not a {_kind(value)}")
    if not value:
        raise RowProblem(name, f"{name} is empty")
    return tuple(_message(item, f"{name}[{index}]", name) for index, item in enumerate(value))


def text_or_turns(row: Fields, name: str) -> str | Turns:
    value = required(row, name)
    if isinstance(value, str):
        return text(row, name)
    if isinstance(value, list | tuple):
        return turns(row, name)
    raise RowProblem(name, f"{name} must be a text or a list of turns, not a {_kind(value)}")


def number(row: Fields, name: str) -> float:
    """A finite number; NaN where the field is absent."""
    return _finite(row[name], name, name) if name in row else MISSING


def numbers(row: Fields, name: str, count: int) -> tuple[float, ...] | None:
    """``count`` finite numbers, or None where the field is absent."""
    if name not in row:
        return None
    value = row[name]
    if not isinstance(value, list | tuple) or len(value) != count:
        found = f"{len(value)} of them" if isinstance(value, list | tuple) else f"a {_kind(value)}"
        raise RowProblem(name, f"{name} must be a list of {count} numbers, one per completion, not {found}")
    return tuple(_finite(item, f"{name}[{index}]", name) for index, item in enumerate(value))


def tools(row: Fields) -> tuple[Fields, ...] | None:
    """Tool schemas: a list of objects, or that list as JSON text (Arrow cannot hold objects of mixed shape)."""
    if "tools" not in row:
        return None
    value = row["tools"]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowProblem("tools", f"tools is not valid JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowProblem("tools", "tools must be a list of JSON schemas")
    return tuple(value)


def template_kwargs(row: Fields) -> Fields:
    value = row.get("chat_template_kwargs", {})
    if not isinstance(value, dict):
        raise RowProblem("chat_template_kwargs", f"chat_template_kwargs must be an object, not a {_kind(value)}")
    return value


def user(content: str) -> Turns:
    return ({"role": "user", "content": content},)


def assistant(content: str) -> Turns:
    return ({"role": "assistant", "content": content},)


def is_assistant(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _message(value: Any, place: str, name: str) -> Message:
    if not isinstance(value, dict):
        raise RowProblem(name, f"{place} must be an object with role and content, not a {_kind(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    if not isinstance(message.get("role"), str):
        raise RowProblem(name, f"{place} has no role")
    content = message.get("content", "" if "tool_calls" in message else None)
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        found = "missing" if content is None else f"a {_kind(content)}"
        raise RowProblem(name, f"{place}.content must be a text, but is {found}")
    return {**message, "content": content}


def _finite(value: Any, place: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowProblem(name, f"{place} must be a number, not a {_kind(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise RowProblem(name, f"{place} is {result}: it must be finite; leave the field out where it is unknown")
    return result


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", tuple: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
