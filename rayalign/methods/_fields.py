"""Parameter types that several methods share; each refuses impossible values and says why."""

from __future__ import annotations

from collections.abc import Mapping
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


def refuse_booleans(model: type[BaseModel], data: Any) -> Any:
    """``data`` for ``model``, before it is read: YAML's ``true`` is no 1 where a number is expected.

    Raises ValidationError at every field that takes numbers and no booleans, and has one, alone or in a list.
    """
    given = data if isinstance(data, Mapping) else {}
    found = [
        InitErrorDetails(
            type=PydanticCustomError(
                "number_expected", "{value} is a boolean in YAML; write a number", {"value": value}
            ),
            loc=(name,),
            input=given[name],
        )
        for name, field in model.model_fields.items()
        if (value := _boolean_in(given.get(name))) and _takes_numbers_only(field.annotation)
    ]
    if found:
        raise ValidationError.from_exception_data(model.__name__, found)
    return data


def _boolean_in(value: Any) -> str:
    """``true`` or ``false`` where the value is one or a list with one; else empty."""
    items = value if isinstance(value, list | tuple) else (value,)
    return next((str(item).lower() for item in items if isinstance(item, bool)), "")


def _takes_numbers_only(annotation: Any) -> bool:
    """Whether numbers stand in a type, and no booleans."""
    kinds = set(_kinds(annotation))
    return bool(kinds & {int, float}) and bool not in kinds


def _kinds(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return [kind for argument in arguments for kind in _kinds(argument)] if arguments else [annotation]


LabelSmoothing = Annotated[float, AfterValidator(_share_of_flipped_labels)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
