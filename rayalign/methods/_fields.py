"""Parameter types that several methods share; each refuses impossible values and says why."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError


def _share_of_flipped_labels(value: float) -> float:
    if not 0 <= value < 0.5:
        raise ValueError(
            "label_smoothing is the assumed share of flipped labels and must lie in [0, 0.5): "
            "at 0.5 the labels say nothing, above it they say the opposite"
        )
    return value


LARGEST = 2**63 - 1
"""The largest whole number: arrays and generators take no larger one."""


def refuse_odd_numbers(model: type[BaseModel], data: Any) -> Any:
    """``data`` for ``model``, before it is read: YAML's ``true`` is no 1 where a number is expected.

    Raises ValidationError at every field that takes numbers and no booleans, and has a boolean or a whole number that
    is larger than any array takes, alone or in a list.
    """
    given = data if isinstance(data, Mapping) else {}
    found = [
        InitErrorDetails(
            type=PydanticCustomError("number_expected", "{value} {problem}", {"value": odd[0], "problem": odd[1]}),
            loc=(name,),
            input=given[name],
        )
        for name, field in model.model_fields.items()
        if (odd := _odd_number(given.get(name))) and _takes_numbers_only(field.annotation)
    ]
    if found:
        raise ValidationError.from_exception_data(model.__name__, found)
    return data


def _odd_number(value: Any) -> tuple[str, str] | None:
    """What is no number here and why, where the value is such, or a list with one."""
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, bool):
            return str(item).lower(), "is a boolean in YAML; write a number"
        if isinstance(item, int) and abs(item) > LARGEST:
            return "a whole number of more than 63 bits", f"is too large; write {LARGEST} at most"
    return None


def _takes_numbers_only(annotation: Any) -> bool:
    """Whether a type has numbers and no booleans."""
    kinds = set(_kinds(annotation))
    return bool(kinds & {int, float}) and bool not in kinds


def _kinds(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return list(chain.from_iterable(_kinds(argument) for argument in arguments)) if arguments else [annotation]


LabelSmoothing = Annotated[float, AfterValidator(_share_of_flipped_labels)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
