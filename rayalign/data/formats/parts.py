"""Content in parts, as OpenAI and Anthropic write it, as turns whose content is a text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rayalign.data.schema import RowProblem

TEXTS = ("text", "input_text", "output_text")
ORDER = ("tool_result", "thinking", "text", "tool_use")
"""The order in which templates write the parts of one turn."""


def turns_from_parts(turn: Mapping[str, Any], place: str, name: str) -> Iterator[dict[str, Any]]:
    """The same as turns with texts: every result of a tool becomes a turn of its own before the rest.

    Thoughts become ``reasoning_content`` and uses of tools ``tool_calls``. Raises RowProblem for what is no text, such
    as an image, and where parts stand in an order that no template keeps.
    """
    parts = [_part(item, f"{place}.content[{index}]", name) for index, item in enumerate(turn["content"])]
    kinds = [kind for kind, _ in parts]
    if kinds != sorted(kinds, key=ORDER.index):
        raise RowProblem(name, f"{place}.content has parts in the order {', '.join(kinds)}: split the turn")
    results = [part for kind, part in parts if kind == "tool_result"]
    if results and turn["role"] not in ("user", "tool"):
        raise RowProblem(name, f"{place}.content has a tool_result in a turn of {turn['role']}")
    for result in results:
        yield {"role": "tool", "content": _result(result, name), "tool_call_id": result.get("tool_use_id")}
    rest = [(kind, part) for kind, part in parts if kind != "tool_result"]
    if not rest and results:
        return
    said = {**turn, "content": "".join(part["text"] for kind, part in rest if kind == "text")}
    thoughts = "\n".join(part["thinking"] for kind, part in rest if kind == "thinking")
    if thoughts:
        said["reasoning_content"] = thoughts
    calls = [_call(part) for kind, part in rest if kind == "tool_use"]
    if (thoughts or calls) and turn["role"] != "assistant":
        raise RowProblem(name, f"{place}.content has a {kinds[0]} in a turn of {turn['role']}")
    if calls:
        said["tool_calls"] = [*turn.get("tool_calls", ()), *calls]
    yield said


def texts_joined(parts: list[Any], name: str) -> str:
    """Parts that are all text as one text."""
    found = [_part(item, f"{name}[{index}]", name) for index, item in enumerate(parts)]
    if any(kind != "text" for kind, _ in found):
        raise RowProblem(name, f"{name} has a part that is no text")
    return "".join(own["text"] for _, own in found)


def _part(item: Any, where: str, name: str) -> tuple[str, dict[str, Any]]:
    """(kind, what it holds) of one part; the three kinds of text are one."""
    if not isinstance(item, dict):
        raise RowProblem(name, f"{where} must be an object with a type")
    part = {key: value for key, value in item.items() if value is not None}
    kind = part.get("type")
    if kind in TEXTS:
        kind, held = "text", "text"
    else:
        held = {"thinking": "thinking", "tool_use": "name", "tool_result": "type"}.get(str(kind), "")
    if not held:
        told = f"{kind}, which is no text: rayalign trains on text alone" if kind else "a part without a type"
        raise RowProblem(name, f"{where} is {told}; leave such rows out")
    if not isinstance(part.get(held), str):
        raise RowProblem(name, f"{where}.{held} must be a text")
    return str(kind), part


def _call(part: Mapping[str, Any]) -> dict[str, Any]:
    given = {"id": part["id"]} if "id" in part else {}
    return {**given, "type": "function", "function": {"name": part["name"], "arguments": part.get("input", {})}}


def _result(part: Mapping[str, Any], name: str) -> str:
    """What a tool answered: a text, or parts of text."""
    content = part.get("content", "")
    if isinstance(content, list):
        return texts_joined(content, name)
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
