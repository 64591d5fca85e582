"""The table of other trainers' keys points at fields that exist and never shadows one of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from rayalign.config import RunConfig
from rayalign.config.foreign import EXPLAINED, METHODS, RENAMED, advice
from rayalign.methods import METHODS as OURS
from rayalign.methods import resolve


def fields(annotation: Any) -> Iterator[str]:
    """Dotted names of all fields below a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for key, field in annotation.model_fields.items():
            yield key
            yield from (f"{key}.{below}" for below in fields(field.annotation))
    else:
        for argument in get_args(annotation):
            yield from fields(argument)


def test_every_renamed_key_points_at_a_field() -> None:
    parameters = {f"method.{key}" for name in OURS for key in resolve(name).config.model_fields}
    assert set(RENAMED.values()) - set(fields(RunConfig)) - parameters == set()


def test_no_foreign_key_is_one_of_ours_at_the_same_place() -> None:
    assert (set(RENAMED) | set(EXPLAINED)) & set(RunConfig.model_fields) == set()
    assert set(RENAMED) & set(EXPLAINED) == set()


def test_foreign_names_of_methods_are_not_ours() -> None:
    assert set(METHODS) & set(OURS) == set()


def test_values_of_loss_type_are_translated() -> None:
    assert advice("loss_type", "sigmoid", nested=False) == "write method: {name: dpo}"
    assert advice("loss_type", "cdpo", nested=False) == "write method: {name: dpo, label_smoothing: …}"
    assert advice("rl", "kto", nested=False) == "write method: {name: kto}"
    assert advice("rl", "1e-6", nested=True) is None
    assert advice("no_such_key", 1, nested=False) is None
