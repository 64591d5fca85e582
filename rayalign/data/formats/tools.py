"""Descriptions of tools as OpenAI and Anthropic write them, in the form that chat templates read."""

from __future__ import annotations

from typing import Any

from rayalign.data.schema import Fields, RowProblem, tools


def tools_of(row: Fields, own: Any) -> tuple[Fields, ...] | None:
    """``own``, where the format keeps tools elsewhere, or the columns ``tools`` or ``functions``; None for none."""
    if row.get("tools") and row.get("functions"):
        raise RowProblem("functions", "tools and functions could both be meant: name one with `columns`")
    name = "functions" if row.get("functions") else "tools"
    value = own or row.get(name)
    if isinstance(value, str) and not value.strip():
        return None
    found = tools({"tools": value}) if value else None
    return tuple(_function(tool, wraps=name == "functions") for tool in found) if found else None


def _function(tool: Fields, *, wraps: bool) -> Fields:
    """One tool: Anthropic's has ``input_schema``, an entry of OpenAI's older ``functions`` is the function itself."""
    if "input_schema" in tool:
        described = {key: tool[key] for key in ("name", "description") if key in tool}
        return {"type": "function", "function": {**described, "parameters": tool["input_schema"]}}
    return {"type": "function", "function": tool} if wraps and "function" not in tool else tool
