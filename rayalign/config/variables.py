"""Variables of a chat template, which compares them with true and false."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

_TRUTHS = ("true", "false", "null", "none")


def refuse_truths_as_texts(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables; raises ValueError for a text such as ``'false'``, which a template takes for true."""
    for name, value in variables.items():
        if isinstance(value, str) and value.strip().lower() in _TRUTHS:
            raise ValueError(f"{name} is the text {value!r}, which a template takes for true; write it without quotes")
    return variables


Variables = Annotated[dict[str, Any], AfterValidator(refuse_truths_as_texts)]
