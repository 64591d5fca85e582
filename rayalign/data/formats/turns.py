"""Turns as other tools write them, as ours: ``from`` and ``value``, other names of roles, content in parts.

Our turn is ``{role: user | assistant | system | developer | tool, content: text, …}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, Final

from rayalign.data.formats.encoded import decoded
from rayalign.data.formats.parts import turns_from_parts
from rayalign.data.schema import Fields, RowProblem, Turns, required, text_or_turns

_OTHER_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "chatbot": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_OURS = ("user", "assistant", "system", "developer", "tool")
ROLES: Final[Mapping[str, str]] = MappingProxyType({name: name for name in _OURS} | _OTHER_NAMES)
"""A role's name, in small letters → ours."""
CALLS: Final = "function_call"
"""ShareGPT's turn of the assistant whose value is a call, or a list of calls, as JSON text."""


def text_or_turns_said(row: Fields, name: str, *, may_be_empty: bool = False) -> str | Turns:
    """A text, or turns in our form; a single turn stands for a list of it."""
    value = decoded(required(row, name), name)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list | tuple):
        value = [*chain.from_iterable(our_turns(item, f"{name}[{place}]", name) for place, item in enumerate(value))]
        if not value:
            raise RowProblem(name, f"{name} is empty")
        value = _with_names(value)
    return text_or_turns({name: value}, name, may_be_empty=may_be_empty)


def turns_said(row: Fields, name: str) -> Turns:
    """Turns in our form; raises RowProblem for a text."""
    value = text_or_turns_said(row, name)
    if isinstance(value, str):
        raise RowProblem(name, f"{name} must be a list of turns, not a text")
    return value


def our_turns(item: Any, place: str, name: str) -> Iterator[Any]:
    """The turns that one item of a conversation holds: one, or several where its content has results of tools."""
    if not isinstance(item, dict):
        yield item  # the schema refuses it
        return
    turn = {key: value for key, value in item.items() if value is not None}
    if "role" not in turn and "from" in turn:
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turn = {"role": turn["from"], "content": turn.get("value"), **rest}
    role = turn.get("role")
    if role is None:
        keys = ", ".join(turn) or "nothing"
        raise RowProblem(
            name, f"{place} has no role, but {keys}: write {{role: user, content: …}} or {{from: human, value: …}}"
        )
    if isinstance(role, str) and role.strip().lower() == CALLS:
        calls = _calls(turn.get("content"), place, name)
        yield {**turn, "role": "assistant", "content": "", "tool_calls": calls}
        return
    turn["role"] = _our_role(role, place, name)
    if "content" not in turn and "refusal" in turn:
        raise RowProblem(name, f"{place} has a refusal in place of content: write it as content")
    if "function_call" in turn:
        turn["tool_calls"] = _calls(turn.pop("function_call"), place, name)
    if isinstance(turn.get("content"), list):
        yield from turns_from_parts(turn, place, name)
    else:
        yield turn


def _with_names(turns: list[Any]) -> list[Any]:
    """Results of tools with the tool's name, where they have only the call's id."""
    called = dict(chain.from_iterable(_called(turn) for turn in turns if isinstance(turn, dict)))
    named = list(turns)
    for place, turn in enumerate(turns):
        if isinstance(turn, dict):
            named[place] = _named(turn, called)
    return named


def _called(turn: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(id, name of the tool) of every call of a turn."""
    calls = turn.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict) and isinstance(call.get("id"), str) and isinstance(call.get("function"), dict):
            yield call["id"], call["function"].get("name")


def _named(turn: dict[str, Any], called: Mapping[str, Any]) -> dict[str, Any]:
    name = called.get(turn.get("tool_call_id", ""))
    return {**turn, "name": name} if turn.get("role") == "tool" and name and "name" not in turn else turn


def _our_role(role: Any, place: str, name: str) -> str:
    ours = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if ours is None:
        known = ", ".join(ROLES)
        raise RowProblem(name, f"{place}: {role!r} is no role that is known ({known}); rename it in the data")
    return ours


def _calls(value: Any, place: str, name: str) -> list[dict[str, Any]]:
    """Calls as ``tool_calls``: ``{"name": …, "arguments": {…}}`` or a list of such."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowProblem(name, f"{place}: the value of {CALLS} is not valid JSON: {error}") from error
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowProblem(name, f"{place}: the value of {CALLS} must be {{name: …, arguments: …}}, or a list of such")
    return [{"type": "function", "function": call} for call in calls]
