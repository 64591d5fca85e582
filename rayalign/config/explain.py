"""From pydantic's errors to sentences for the person who wrote the YAML."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from rayalign.config import foreign
from rayalign.config.document import Document
from rayalign.config.errors import FieldPath, Problem, dotted
from rayalign.config.method import MethodChoice, resolve_method

Model = type[BaseModel]

_REQUIRED = {
    "model": "say which model to train: model: {name: path-or-hub-id}",
    "model.name": "say which model to train: a folder, or a name on the hub",
    "data": "say what to train on: data: {train: [pairs.jsonl]}",
    "data.train": "say what to train on: train: [pairs.jsonl]",
    "filter.policy_logp_quantile": "say which pairs are kept: policy_logp_quantile: 0.7 is the likeliest 30 %",
    "method": "say how to train: method: {name: dpo}",
    "base": "say what all cells share: base: run.yaml",
    "grid": "say what is compared: grid: {method: [dpo, exo_pref]}",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_KINDS = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text; quote it",
    "tuple_type": "a list",
    "list_type": "a list",
}


def explain(error: ValidationError, document: Document, *, model: Model) -> list[Problem]:
    """One problem per error of reading ``document`` as ``model``, in the file's order."""
    found = []
    for detail in error.errors(include_url=False):
        path, blocks = _locate(model, detail["loc"], document.data)
        place = document.place(path)
        message = _sentence(detail, path, blocks, model=model, text=place.text)
        problem = Problem(place.where, dotted(path), message, illegal=detail["type"] == "illegal")
        found.append((place.order, problem))
    return [problem for _, problem in sorted(found, key=lambda item: item[0])]


def _locate(model: Model, location: FieldPath, data: Any) -> tuple[FieldPath, list[Model]]:
    """The path in the YAML without pydantic's union tags, and the blocks whose keys could stand last in it."""
    path: list[str | int] = []
    around: list[Model] = [model]
    blocks: list[Model] = [model]
    for part in (part for part in location if part != "[key]"):
        tagged = [block for block in blocks if len(blocks) > 1 and block.model_fields["name"].default == part]
        if tagged:
            blocks = tagged
            continue
        path.append(part)
        if isinstance(part, str):
            around = blocks
            fields = [block.model_fields[part] for block in blocks if part in block.model_fields]
            blocks = [nested for field in fields for nested in _blocks(field.annotation, data)]
    return tuple(path), around


def _blocks(annotation: Any, data: Any) -> Iterator[Model]:
    """Every block that a field of this type can hold; ``data`` tells which method's parameters are meant."""
    if annotation is MethodChoice:
        choice = data.get("method") if isinstance(data, Mapping) else None
        if isinstance(choice, Mapping) and isinstance(choice.get("name"), str):
            yield resolve_method(choice["name"]).config
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _blocks(argument, data)


def _keys(blocks: Sequence[Model]) -> list[str]:
    return list(dict.fromkeys(key for block in blocks for key in block.model_fields))


def _sentence(detail: Any, path: FieldPath, blocks: Sequence[Model], *, model: Model, text: str | None) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {_unknown_key(path, value, _keys(blocks), model)}"
    if kind == "missing":
        return f"missing; {_REQUIRED.get(dotted(path), 'this key is required')}"
    if kind in ("literal_error", "union_tag_invalid"):
        given = value.get("name") if isinstance(value, Mapping) else value
        expected = context["expected"] if kind == "literal_error" else context["expected_tags"]
        return _not_one_of(given, expected.replace(" or ", ", ").replace("'", "").split(", "), text)
    if kind == "union_tag_not_found":
        return "needs a name: write name first"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        given = "nothing" if value is None else _show(value)
        return f"{given} stands where a block of keys is expected, such as key: value"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{_show(value)} must be {words} {context[bound]:g}"
    if kind == "string_type" and isinstance(value, bool):
        return f"{text or _show(value)} is a boolean in YAML; quote it"
    if kind in _KINDS:
        return f"{_show(value)} is not {_KINDS[kind]}"
    if kind == "too_short":
        return "is an empty list; name at least one"
    if kind == "string_too_short":
        return "is empty"
    if kind == "string_pattern_mismatch":
        return (
            f"{_show(value)} is not made of letters, digits, '.', '_' and '-' only, "
            "beginning with a letter or digit, at most 128"
        )
    message: str = str(context["error"]) if kind == "value_error" else detail["msg"]
    return message


def _not_one_of(given: object, choices: Sequence[str], text: str | None) -> str:
    if isinstance(given, bool):
        written = (text or ("on" if given else "off")).lower()
        meant = [choice for choice in choices if choice.startswith(written)]
        advice = f"quote it: '{written}'" if written in choices else f"write {' | '.join(meant or choices)}"
        return f"{written} is a boolean in YAML; {advice}"
    sentence = f"{_show(given)} is none of {' | '.join(choices)}"
    close = difflib.get_close_matches(str(given), choices, n=1)
    return f"{sentence}; did you mean {close[0]}?" if close else sentence


def _unknown_key(path: FieldPath, value: object, keys: Sequence[str], model: Model) -> str:
    key = str(path[-1])
    known = foreign.advice(key, value, nested=len(path) > 1)
    if known:
        return known
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.65)
    if close:
        return f"did you mean {dotted((*path[:-1], close[0]))}?"
    elsewhere = [field for field in _fields(model, "") if field.rpartition(".")[2] == key]
    if len(elsewhere) == 1:
        return f"did you mean {elsewhere[0]}?"
    return f"the keys here are {', '.join(keys)}"


def _fields(model: Model, prefix: str) -> Iterator[str]:
    """Dotted names of every field of every block below ``model``."""
    for key, field in model.model_fields.items():
        yield prefix + key
        for block in dict.fromkeys(_blocks(field.annotation, None)):
            yield from _fields(block, f"{prefix}{key}.")


def _show(value: object) -> str:
    """A value as it looks in YAML."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
