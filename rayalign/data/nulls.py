"""Nulls that a table fills in: Arrow gives every object the fields of all others, and what it does not have is null."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from rayalign.data.schema import Fields


def from_arrow(row: Fields) -> Fields:
    """A row of a table without the fields of objects that are null."""
    return {name: _without_nulls(value) for name, value in row.items()}


def was_in_a_table(row: Fields) -> bool:
    """Whether a row of JSON was written from a table: nulls stand where a writer of JSON leaves the key out.

    That is a turn of a user or a tool without calls that has ``tool_calls: null``, or a tool with a parameter that is
    null in place of its schema.
    """
    return any(map(_is_filled, chain.from_iterable(map(_objects, row.values()))))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _objects(value: Any) -> Iterator[Fields]:
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))


def _is_filled(item: Fields) -> bool:
    speaker = item.get("role", item.get("from"))
    if speaker is not None:
        return speaker not in ("assistant", "gpt") and "tool_calls" in item and item["tool_calls"] is None
    function = item.get("function", item)
    parameters = function.get("parameters", function.get("input_schema")) if isinstance(function, dict) else None
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return isinstance(properties, dict) and None in properties.values()
