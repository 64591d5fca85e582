"""The axes of a comparison: what each entry of the grid changes in the base run, and what it is called."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayalign.config.carry import carry_settings
from rayalign.config.document import Document, assign
from rayalign.config.errors import ConfigError, FieldPath, Problem
from rayalign.config.explain import setting_meant
from rayalign.config.run import RunConfig

SECTIONS = frozenset(RunConfig.model_fields) - {"config_version", "name", "storage_path"}
"""What an axis or an entry may change: everything but a run's name and place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """``value``, written at ``origin`` of the comparison's YAML, for ``path`` of a run."""

    path: FieldPath
    value: Any
    origin: FieldPath


@dataclass(frozen=True, slots=True, kw_only=True)
class GridEntry:
    """One value of one axis."""

    axis: str
    label: str
    """As tables show it."""
    slug: str
    """As folders are named."""
    changes: tuple[Change, ...]


def read_axis(axis: str, values: Sequence[Any], document: Document) -> list[GridEntry]:
    """The entries of one axis.

    Raises:
        ConfigError: the axis is not part of a run, or two entries have the same name, or one has none.
    """
    where = document.place(("grid", axis)).where
    if axis.partition(".")[0] not in SECTIONS:
        meant = setting_meant(axis, values)
        advice = f"did you mean {meant}?" if meant else f"an axis is in one of {', '.join(sorted(SECTIONS))}"
        raise ConfigError([Problem(where, f"grid.{axis}", f"is no setting of a run; {advice}")])
    entries = [_entry(axis, value, ("grid", axis, index)) for index, value in enumerate(values)]
    problems = []
    for index, entry in enumerate(entries):
        place = document.place(("grid", axis, index)).where
        if is_no_name(values[index]):
            message = "as: YAML reads on, off, yes, no and null as values; write the name in quotes"
            problems.append(Problem(place, f"grid.{axis}[{index}]", message))
        elif not entry.slug:
            problems.append(Problem(place, f"grid.{axis}[{index}]", "has no name; give it one with as: …"))
        elif entry.slug in [earlier.slug for earlier in entries[:index]]:
            problems.append(
                Problem(
                    place,
                    f"grid.{axis}[{index}]",
                    f"two entries are called {entry.label!r}; remove one, or give it another name with as: …",
                )
            )
    if problems:
        raise ConfigError(problems)
    return entries


def is_no_name(value: Any) -> bool:
    """Whether an entry's ``as`` was read as something else than the word that was written."""
    return isinstance(value, Mapping) and isinstance(value.get("as", ""), bool | None)


def apply_entry(entry: GridEntry, run: Document, source: Document) -> Document:
    """``run`` with the entry's changes; what the entry wrote keeps its place in ``source``.

    Raises:
        ConfigError: the axis leads through a value of ``run`` that has no keys.
    """
    data, places = copy.deepcopy(run.data), dict(run.places)
    for change in entry.changes:
        current = replace(run, data=data).get(change.path)
        try:
            target = assign(data, [str(part) for part in change.path], _merged(current, change.value, change.path))
        except ValueError as error:
            raise ConfigError([Problem(source.place(change.origin).where, entry.axis, str(error))]) from None
        depth = len(change.origin)
        places |= {
            (*target, *path[depth:]): place for path, place in source.places.items() if path[:depth] == change.origin
        }
    return replace(run, data=data, places=places)


def _entry(axis: str, value: Any, origin: FieldPath) -> GridEntry:
    path = tuple(axis.split("."))
    if not isinstance(value, Mapping):
        label = _scalar_label(path[-1], value)
        return GridEntry(
            axis=axis, label=label, slug=slug(label), changes=(Change(path=path, value=value, origin=origin),)
        )
    own = {"reference"} if axis == "model" else set()  # a key of the block and a section of a run: the block's
    sections = [key for key in value if key in SECTIONS - own]
    block = {key: item for key, item in value.items() if key not in sections and key != "as"}
    label = str(value.get("as", _block_label(block) + _filter_label(value if axis != "filter" else {})))
    changes = [Change(path=path, value=block, origin=origin)] if block else []
    changes += [Change(path=(key,), value=value[key], origin=(*origin, key)) for key in sections]
    return GridEntry(axis=axis, label=label, slug=slug(label), changes=tuple(changes))


def _merged(current: Any, value: Any, path: FieldPath) -> Any:
    """A block that says its name replaces the one before, but for settings that hold under it; others are merged in.

    So is every ``model``.
    """
    if not isinstance(value, Mapping) or ("name" in value and path != ("model",)):
        return copy.deepcopy(carry_settings(str(path[0]), current, value) if len(path) == 1 else value)
    if isinstance(current, str):
        current = {"name": current}
    if not isinstance(current, Mapping):
        current = {}
    return {**current, **{key: _merged(current.get(key), item, (*path, key)) for key, item in value.items()}}


def _scalar_label(key: str, value: Any) -> str:
    if value is None:
        return f"no {key}"
    if isinstance(value, list):
        return f"{key}={'+'.join(map(str, value))}"
    return value if isinstance(value, str) and key in SECTIONS else f"{key}={value}"


def _block_label(block: Mapping[str, Any]) -> str:
    """``exo_pref label_smoothing=0.1``: the name and every plain value that is given."""
    given = [f"{key}={item}" for key, item in block.items() if key != "name" and not isinstance(item, dict | list)]
    return " ".join([str(block["name"]), *given] if "name" in block else given)


def _filter_label(entry: Mapping[str, Any]) -> str:
    """`` + filter 0.7``, as tables call the objective: without it the filtered cell would have the whole one's name."""
    filtering = entry.get("filter")
    quantile = filtering.get("policy_logp_quantile") if isinstance(filtering, Mapping) else None
    return "" if quantile is None else f" + filter {quantile}"


def slug(label: str) -> str:
    """Only characters that every file system takes; never ``__``, which separates the axes."""
    signed = re.sub(r"(?<![A-Za-z0-9.])-(?=[0-9.])", "minus", label)
    return re.sub(r"_{2,}", "_", re.sub(r"[^A-Za-z0-9._]+", "-", signed)).strip("-._")
