"""The words of tools' descriptions: what a template may not leave out of them, and what it may."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rayalign.data.schema import Fields

_KINDS = ("type", "required", "$schema", "$ref")
"""Keywords whose texts say how a tool is described."""


class ToolWord(NamedTuple):
    text: str
    needed: bool
    """A parameter's name, or a value that it may have; templates leave out other details, such as a default."""


def tool_words(tools: Sequence[Fields]) -> Iterator[ToolWord]:
    for tool in tools:
        yield from _words(tool, needed=False)


def _words(value: Any, *, needed: bool) -> Iterator[ToolWord]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "properties" and isinstance(item, dict):
                yield from (ToolWord(name, True) for name in item)
                yield from _words(list(item.values()), needed=False)
            elif key not in _KINDS or isinstance(item, dict):
                yield from _words(item, needed=key == "enum")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _words(item, needed=needed)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield ToolWord(str(value).strip(), needed)
