"""The ``method`` block: a method's name and that method's own parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import core_schema

from rayalign.config import foreign
from rayalign.errors import UserError

if TYPE_CHECKING:
    from rayalign.methods.method import Method, MethodConfig
    from rayalign.methods.weighting import WPOWeighting


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """``{name: dpo, beta: 0.1}``, validated with the configuration class of that method."""

    name: str
    """A name of the table, or ``module:RECORD``."""
    config: MethodConfig

    @property
    def record(self) -> Method:
        """The method itself."""
        return resolve_method(self.name)

    @classmethod
    def parse(cls, value: object) -> MethodChoice:
        """From the YAML's value; the config class's own errors keep their place below ``method``."""
        if isinstance(value, MethodChoice):
            return value
        if isinstance(value, str):
            value = {"name": value}
        name = value.get("name") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(name, str):
            raise ValueError("needs a name, such as method: {name: dpo, beta: 0.1}")
        record = resolve_method(name)
        return cls(name, record.config.model_validate({key: item for key, item in value.items() if key != "name"}))

    def dump(self) -> dict[str, Any]:
        """The YAML's value again, with every parameter."""
        return {"name": self.name, **self.config.model_dump(mode="json")}

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: object) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(cls.dump)
        )


def resolve_method(name: str) -> Method:
    """The record called ``name``. Imported here, so that the schema is read without loading torch.

    Raises:
        UserError: nothing has that name.
    """
    from rayalign.methods import resolve

    others, plain = foreign.foreign_table(), name.lower()
    if plain in others.methods:
        raise UserError(f"{name!r} is another project's name; write {others.methods[plain]}")
    if plain in others.unknown_methods:
        raise UserError(foreign.method_advice(plain))
    return resolve(name)


def why_not_weighted(record: Method, weighting: WPOWeighting) -> str | None:
    """Why ``weighting`` does not go with a method; None where it does."""
    from rayalign.methods import compose

    try:
        compose(record, weighting)
    except UserError as error:
        return str(error)
    return None
