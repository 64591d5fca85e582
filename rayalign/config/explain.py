"""From pydantic's errors to sentences for the person who wrote the YAML."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from rayalign.config import foreign
from rayalign.config.document import Document
from rayalign.config.errors import FieldPath, Problem, dotted
from rayalign.config.method import MethodChoice, resolve_method
from rayalign.config.run import RunConfig
from rayalign.errors import UserError
from rayalign.methods import METHODS

Model = type[BaseModel]

UNKNOWN = "unknown key"
COMMON = frozenset({"config", "data", "function", "model", "name", "path", "split", "weight"})
"""Keys that mean something in their block alone: elsewhere they are not taken for those of another block."""
_REQUIRED = {
    "model": "say which model to train: model: {name: path-or-hub-id}",
    "model.name": "say which model to train: a folder, or a name on the hub",
    "data": "say what to train on: data: {train: [pairs.jsonl]}",
    "data.train": "say what to train on: train: [pairs.jsonl]",
    "filter.policy_logp_quantile": "say which pairs are kept: policy_logp_quantile: 0.7 is the likeliest 30 %",
    "method": "say how to train: method: {name: dpo}",
    "tune.over": "say what is tried: over: {optim.lr: [1e-7, 5e-7]}",
    "base": "say what all cells share: base: run.yaml",
    "grid": "say what is compared: grid: {method: [dpo, exo_pref]}",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_SIZES = {
    "too_long": "{value} has {actual_length} items; write {max_length} at most",
    "too_short": "is empty; name at least one",
    "string_too_short": "is empty",
    "string_pattern_mismatch": (
        "{value} is not made of letters, digits, '.', '_' and '-' only, beginning with a letter or digit, at most 128"
    ),
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
    **dict.fromkeys(
        ("date_type", "date_parsing", "date_from_datetime_parsing", "date_from_datetime_inexact"),
        "a date such as 2024-07-26",
    ),
}


def explain(error: ValidationError, document: Document, *, model: Model) -> list[Problem]:
    """At least one problem per error of reading ``document`` as ``model``, in the file's order."""
    found: list[tuple[int, Problem, Sequence[Model]]] = []
    for detail in error.errors(include_url=False):
        path, blocks = _locate(model, detail["loc"], document.data)
        for own, message in _lines(detail, path, blocks, model=model, document=document):
            place = document.place(own)
            problem = Problem(place.where, dotted(own), message, illegal=detail["type"] == "illegal")
            found.append((place.order, problem, blocks))
    return _with_keys([(problem, blocks) for _, problem, blocks in sorted(found, key=lambda item: item[0])])


def _with_keys(found: Sequence[tuple[Problem, Sequence[Model]]]) -> list[Problem]:
    """The problems; of the unknown keys that nothing is known of, the first one in a block names that block's keys."""
    told: list[Sequence[Model]] = []
    problems = []
    for problem, blocks in found:
        if problem.message == UNKNOWN and blocks not in told:
            told.append(blocks)
            problem = replace(problem, message=f"{UNKNOWN}; the keys here are {', '.join(_keys(blocks))}")
        problems.append(problem)
    return problems


def _lines(
    detail: Any, path: FieldPath, blocks: Sequence[Model], *, model: Model, document: Document
) -> Iterator[tuple[FieldPath, str]]:
    """(path, message) of an error: one for each key that somebody brought from elsewhere."""
    value = detail["input"]
    if detail["type"] == "extra_forbidden":
        if path[0] == "method" and len(path) == 2:
            yield path, _unknown_parameter(str(path[1]), document)
            return
        if len(path) == 1 and (parameter := _parameter(str(path[0]), document)):
            yield path, f"{UNKNOWN}; {parameter}"
            return
        if isinstance(value, Mapping) and (close := _near(str(path[-1]), value, _fields_of(blocks))):
            yield path, f"{UNKNOWN}; did you mean {dotted((*path[:-1], close))}?"
            return
        for own, said in foreign.answers_within(path, value):
            said = said or _guess(own, document.get(own), blocks if own == path else (), model)
            yield own, f"{UNKNOWN}; {said}" if said else UNKNOWN
    elif (
        isinstance(value, Mapping)
        and detail["type"] == "string_type"
        and any(said for _, said in foreign.answers_within(path, value))
    ):
        for own, said in foreign.answers_within(path, value):
            yield own, f"{UNKNOWN}; {said}" if said else UNKNOWN
    else:
        yield path, _sentence(detail, path, text=document.place(path).text)


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
            blocks = list(chain.from_iterable(_blocks(field.annotation, data) for field in fields))
    return tuple(path), around


def _blocks(annotation: Any, data: Any) -> Iterator[Model]:
    """Every block that a field of this type can hold; ``data`` tells which method's parameters are meant."""
    if annotation is MethodChoice:
        choice = data.get("method") if isinstance(data, Mapping) else None
        if isinstance(choice, Mapping) and isinstance(choice.get("name"), str):
            with contextlib.suppress(UserError):  # which is one of the problems already
                yield resolve_method(choice["name"]).config
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _blocks(argument, data)


def _keys(blocks: Sequence[Model]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(block.model_fields for block in blocks)))


_AS_YAML = {"True": "true", "False": "false"}


def _sentence(detail: Any, path: FieldPath, *, text: str | None) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in _SIZES:
        return _SIZES[kind].format(value=_show(value), **context)
    if kind == "missing":
        return f"missing; {_REQUIRED.get(dotted(path), 'this key is required')}"
    if kind in ("literal_error", "union_tag_invalid"):
        given = value.get("name") if isinstance(value, Mapping) else value
        expected = context["expected"] if kind == "literal_error" else context["expected_tags"]
        choices = expected.replace(" or ", ", ").replace("'", "").split(", ")
        return _not_one_of(given, [_AS_YAML.get(choice, choice) for choice in choices], text)
    if kind == "union_tag_not_found":
        return "needs a name: write name first"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        given = "nothing" if value is None else _show(value)
        instead = foreign.block_advice(path) if value is not None else ""
        return f"{given} is given where a block of keys is expected" + (
            f"; {instead}" if instead else ", such as key: value"
        )
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{_show(value)} must be {words} {context[bound]:g}"
    if kind == "string_type" and value is None:
        return "nothing is given where text is expected"
    if kind == "string_type" and isinstance(value, bool):
        return f"{text or _show(value)} is a boolean in YAML; quote it"
    if kind in _KINDS:
        return f"{_show(value)} is not {_KINDS[kind]}"
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


def _parameter(key: str, document: Document) -> str:
    """What to write instead of a key at the top that is a parameter of the file's method; empty where it is none."""
    choice = document.get(("method",))
    name = choice.get("name") if isinstance(choice, Mapping) else choice
    if not isinstance(name, str):
        return ""
    try:
        fields = resolve_method(name).config.model_fields
    except UserError:
        return ""
    return f"did you mean method.{key}?" if key in fields else _renamed(key, name, fields)


def _unknown_parameter(key: str, document: Document) -> str:
    """What to write instead of a parameter that the method does not have."""
    choice = document.get(("method",))
    name = str(choice.get("name")) if isinstance(choice, Mapping) else ""
    fields, value = resolve_method(name).config.model_fields, document.get(("method", key))
    others = [other for other in METHODS if key in resolve_method(other).config.model_fields]
    meant = _renamed(key, name, fields) or _near_parameter(key, value, fields)
    if not meant and not others:
        meant = _not_a_parameter(key, value, fields)
    if meant:
        return f"{UNKNOWN} of {name}; {meant}"
    whose = f"; {key} is of {', '.join(others)}" if others else ""
    return f"{UNKNOWN} of {name}; its keys are {', '.join(fields)}{whose}"


def _renamed(key: str, method: str, fields: Mapping[str, FieldInfo]) -> str:
    """What to write instead of another trainer's parameter in ``method``; empty where it has none like it."""
    ours = foreign.parameter_in_method(method, key)
    if " " in ours:
        return ours
    return f"did you mean method.{ours}?" if ours in fields else ""


def _near_parameter(key: str, value: object, fields: Mapping[str, FieldInfo]) -> str:
    close = _near(key, value, fields)
    return f"did you mean method.{close}?" if close else ""


def _not_a_parameter(key: str, value: object, fields: Mapping[str, FieldInfo]) -> str:
    """What to write instead of a key that stands among a method's parameters and is none; empty where none fits."""
    said = foreign.foreign_advice(("method", key), value) or _guess(("method", key), value, (), RunConfig)
    of_method = said.removeprefix("did you mean method.").removesuffix("?")
    return "" if of_method != said.removesuffix("?") and of_method not in fields else said


def _guess(path: FieldPath, value: object, blocks: Sequence[Model], model: Model) -> str:
    """The key that was meant: a misspelt one of this block, or one of another block; empty where none fits."""
    key = str(path[-1])
    close = _near(key, value, _fields_of(blocks))
    if close:
        return f"did you mean {dotted((*path[:-1], close))}?"
    if key in COMMON or any(isinstance(part, int) for part in path):
        return ""
    elsewhere = {name: field for name, field in _fields(model, "") if name.rpartition(".")[2] == key}
    if len(path) > 1:  # a block inside another block has words of its own: alpha, columns
        elsewhere = {name: field for name, field in elsewhere.items() if name.count(".") < 2}
    fitting = [name for name, field in elsewhere.items() if name != dotted(path) and _fits(value, field)]
    return f"did you mean {fitting[0]}?" if len(fitting) == 1 else ""


def setting_meant(key: str, values: Sequence[Any]) -> str:
    """The setting of a run that is probably meant, such as ``optim.lr`` by ``lr``; empty where none is near."""
    value = values[0] if values else None
    if any(key in resolve_method(name).config.model_fields for name in METHODS):
        return f"method.{key}"
    said = foreign.foreign_advice((key,), value) or _guess((key,), value, [RunConfig], RunConfig)
    return said.removeprefix("did you mean ").rstrip("?") if said.startswith("did you mean ") else ""


def _fields_of(blocks: Sequence[Model]) -> dict[str, FieldInfo]:
    return dict(chain.from_iterable(block.model_fields.items() for block in blocks))


def _near(key: str, value: object, fields: Mapping[str, FieldInfo]) -> str:
    """The field whose name is a slip away and that can have the value; empty for none.

    A block is meant whatever it holds, and so is a name that differs in its case alone.
    """
    likely = [
        (difflib.SequenceMatcher(None, _plain(key), name).ratio(), name)
        for name, field in fields.items()
        if _is_slip(_plain(key), name)
        and (_plain(key) == name or _fits(value, field) or (isinstance(value, Mapping) and _is_block(field)))
    ]
    return max(likely, default=(0.0, ""))[1]


def _plain(key: str) -> str:
    return key.lower().replace("-", "_")


def _is_block(field: FieldInfo) -> bool:
    return not _is_list(field.annotation) and any(True for _ in _blocks(field.annotation, None))


def _is_slip(key: str, name: str) -> bool:
    """Whether ``key`` is ``name`` misspelt: nearly the same letters, or one added, left out, changed or transposed."""
    if difflib.SequenceMatcher(None, key, name).ratio() > 0.8:
        return True
    if len(key) == len(name):
        differing = [place for place in range(len(key)) if key[place] != name[place]]
        return len(key) > 2 and (len(differing) == 1 or (len(differing) == 2 and sorted(key) == sorted(name)))
    long, short = max(key, name, key=len), min(key, name, key=len)
    return any(long[:place] + long[place + 1 :] == short for place in range(len(long)))


def _fits(value: object, field: FieldInfo) -> bool:
    """Whether a field can have the value."""
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        TypeAdapter(kind).validate_python(value)
    except (ValidationError, UserError):
        return False
    return True


def _fields(model: Model, prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of everything in every block below ``model`` that is no item of a list."""
    for key, field in model.model_fields.items():
        yield prefix + key, field
        if not _is_list(field.annotation):
            for block in dict.fromkeys(_blocks(field.annotation, None)):
                yield from _fields(block, f"{prefix}{key}.")


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(map(_is_list, get_args(annotation)))


def _show(value: object) -> str:
    """A value as it looks in YAML."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
