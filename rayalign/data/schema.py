"""What a row means: a prompt, its candidates and their numbers; and how its fields are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rayalign.config.variables import refuse_truths_as_texts
from rayalign.data.records import BadRow, RawRow, excerpt_of

Fields = Mapping[str, Any]
Message = Mapping[str, Any]
"""One turn: ``role``, ``content`` and whatever else the chat template may read (``tool_calls``, ``name`` …)."""
Turns = tuple[Message, ...]
MISSING = math.nan
Preference = Literal["stored", "rewards", "ranks", "unstated", "undecided"]
"""How candidates are ordered: as they stand, by ``reward``, by ``rank``, not said, or said to be equal (or null)."""
WEIGHT = "weight"
"""Field of a turn: 0 where it is not to be trained."""
PLAIN = frozenset({"role", "content"})
"""Fields of a turn that is words alone."""
_WEIGHTS = (
    WEIGHT, "train", "trainable", "training", "loss", "loss_weight", "loss_mask", "learn", "do_train", "is_trainable",
    "train_on", "train_on_turn",
)  # fmt: skip
"""Names under which files say so."""
_MAYBE_WEIGHT = re.compile(r".*(train|loss|learn|mask|weight|ignore|skip).*", re.IGNORECASE)
"""Names that may say so as well, in a way that is not known."""
_ARGUMENTS = ("arguments", "parameters", "input", "args", "kwargs")
"""Names under which files have the arguments of a call."""


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
    drawn: bool = False
    """True for words of a model, or of a user at a prompt, and not of a file: markup in them is words."""
    finished: tuple[bool, ...] | None = None
    """For every candidate: False where it was cut off and has no end token; None: all are finished."""
    preference: Preference = "stored"
    tools: tuple[Fields, ...] | None = None
    template_kwargs: Fields = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    """Columns that hold something and were not read."""
    metadata: tuple[str, ...] = ()
    """Further columns that were not read: they describe the row, or repeat it."""
    source: str = ""
    line: int = 0

    @property
    def whether_finished(self) -> tuple[bool, ...]:
        return (self.candidates and self.finished) or (True,) * len(self.candidates)


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


def required_text(row: Fields, name: str) -> str:
    value = required(row, name)
    if not isinstance(value, str):
        raise RowProblem(name, f"{name} must be a text, not a {json_kind(value)}")
    if not value.strip():
        raise RowProblem(name, f"{name} is empty")
    return value


def required_turns(row: Fields, name: str) -> Turns:
    value = required(row, name)
    if not isinstance(value, list | tuple):
        raise RowProblem(name, f"{name} must be a list of turns, not a {json_kind(value)}")
    if not value:
        raise RowProblem(name, f"{name} is empty")
    return tuple(message(item, f"{name}[{index}]", name) for index, item in enumerate(value))


def text_or_turns(row: Fields, name: str, *, may_be_empty: bool = False) -> str | Turns:
    """``may_be_empty``: an empty text is an answer too, which ends at once."""
    value = required(row, name)
    if isinstance(value, str):
        return value if may_be_empty else required_text(row, name)
    if isinstance(value, list | tuple):
        return required_turns({name: value}, name)
    raise RowProblem(name, f"{name} must be a text or a list of turns, not a {json_kind(value)}")


def optional_number(row: Fields, name: str) -> float:
    """A finite number; NaN where the field is absent."""
    return _finite(row[name], name, name) if name in row else MISSING


def optional_numbers(row: Fields, name: str, count: int) -> tuple[float, ...] | None:
    """``count`` finite numbers, NaN for nulls; or None where the field is absent."""
    if name not in row:
        return None
    value = row[name]
    if not isinstance(value, list | tuple) or len(value) != count:
        found = f"{len(value)} of them" if isinstance(value, list | tuple) else f"a {json_kind(value)}"
        raise RowProblem(name, f"{name} must be a list of {count} numbers, one per completion, not {found}")
    given = [MISSING] * count
    for index, item in enumerate(value):
        if item is not None:
            given[index] = _finite(item, f"{name}[{index}]", name)
    return tuple(given)


def finished_flags(row: Fields, count: int) -> tuple[bool, ...] | None:
    """Whether each of ``count`` candidates was finished; None where the row does not say."""
    value = row.get("finished")
    if value is None:
        return None
    found = [value] if isinstance(value, bool) else value
    if not isinstance(found, list | tuple) or len(found) != count or not all(isinstance(one, bool) for one in found):
        raise RowProblem("finished", f"finished must say true or false of each of {count} completions, not {value!r}")
    return tuple(found)


def tools(row: Fields) -> tuple[Fields, ...] | None:
    """Tool schemas: a list of objects, or that list as JSON text (Arrow cannot hold objects of mixed shape)."""
    value = _from_json(row.get("tools"), "tools")
    if value in (None, [], {}):
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
        raise RowProblem("tools", "tools must be a list of JSON schemas")
    return tuple(value)


def template_kwargs(row: Fields) -> Fields:
    """Variables of the template: an object, or one as JSON text."""
    value = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if value in (None, [], {}):
        return {}
    if not isinstance(value, dict):
        raise RowProblem("chat_template_kwargs", f"chat_template_kwargs must be an object, not a {json_kind(value)}")
    try:
        return refuse_truths_as_texts(value)
    except ValueError as error:
        raise RowProblem("chat_template_kwargs", f"chat_template_kwargs: {error}") from error


def _from_json(value: Any, name: str) -> Any:
    """A value, or the value that a text is as JSON; None for an empty text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise RowProblem(name, f"{name} is not valid JSON: {error}") from error


def user(content: str) -> Turns:
    return ({"role": "user", "content": content},)


def assistant(content: str) -> Turns:
    return ({"role": "assistant", "content": content},)


def is_assistant(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def is_learned(message: Message) -> bool:
    """Whether an answer is to be learned."""
    return bool(message.get(WEIGHT, 1))


def message(value: Any, place: str, name: str) -> Message:
    """One turn, checked; ``place`` names it and ``name`` its field.

    Nulls and an empty list of tool calls are left out, content parts become one text, and all ways of saying that an
    answer is not to be trained become ``weight: 0``.
    """
    if not isinstance(value, dict):
        raise RowProblem(name, f"{place} must be an object with role and content, not a {json_kind(value)}")
    fields = {key: item for key, item in value.items() if item is not None}
    if not isinstance(fields.get("role"), str):
        raise RowProblem(name, f"{place} has no role")
    trained = [_weight(fields.pop(key), f"{place}.{key}", name) for key in _WEIGHTS if key in fields]
    unknown = next(filter(_MAYBE_WEIGHT.fullmatch, fields), None) if fields["role"] == "assistant" else None
    if unknown is not None:
        raise RowProblem(
            name, f"{place}.{unknown} may say that the answer is not to be learned: write weight: 0 or 1 in its place"
        )
    calls = _calls(fields.pop("tool_calls", None), place, name)
    content = fields.get("content", "" if calls else None)
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        found = "missing" if content is None else f"a {json_kind(content)}"
        raise RowProblem(name, f"{place}.content must be a text, but is {found}")
    called = {"tool_calls": calls} if calls else {}
    return {**fields, "content": content, **called, **({} if all(trained) else {WEIGHT: 0})}


def _weight(value: Any, place: str, name: str) -> bool:
    if value not in (0, 1):
        raise RowProblem(name, f"{place} must be 0 or 1, not {value!r}: an answer is learned, or only seen")
    return bool(value)


def _calls(value: Any, place: str, name: str) -> list[Fields]:
    """Tool calls, each with its ``function``; arguments stay as they are, an object or the text of one."""
    found = _from_json(value, name)
    if found in (None, [], {}, ()):
        return []
    if not isinstance(found, list | tuple):
        raise RowProblem(name, f"{place}.tool_calls must be a list of calls, not a {json_kind(found)}")
    return [_tool_call(call, f"{place}.tool_calls[{index}]", name) for index, call in enumerate(found)]


def _tool_call(value: Any, place: str, name: str) -> Fields:
    if not isinstance(value, dict):
        raise RowProblem(name, f"{place} must be an object, not a {json_kind(value)}")
    call = {key: item for key, item in value.items() if item is not None}
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem(name, f"{place} names no function")
    own = {**call, **function}
    given = [key for key in _ARGUMENTS if own.get(key) is not None]
    if len(given) > 1:
        raise RowProblem(name, f"{place} has {given[0]} and {given[1]}: which are the arguments is not certain")
    arguments = {"arguments": own[given[0]]} if given else {}
    found = _from_json(arguments.get("arguments"), f"{place}.function.arguments")
    if found is not None and not isinstance(found, dict):
        raise RowProblem(name, f"{place}.function.arguments must be an object, not a {json_kind(found)}")
    if "function" not in call:
        named = {"id": call["id"]} if "id" in call else {}
        return {**named, "type": "function", "function": {"name": call["name"], **arguments}}
    around, inside = (_without(fields, _ARGUMENTS) for fields in (call, function))
    return {"type": "function", **around, "function": {**inside, **arguments}}


def _without(fields: Fields, names: tuple[str, ...]) -> Fields:
    return {key: value for key, value in fields.items() if key not in names}


def _finite(value: Any, place: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowProblem(name, f"{place} must be a number, not a {json_kind(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise RowProblem(name, f"{place} is {result}: it must be finite; leave the field out where it is unknown")
    return result


def json_kind(value: object) -> str:
    names = {dict: "object", list: "list", tuple: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
