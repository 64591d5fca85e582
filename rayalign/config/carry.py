"""A block that is named again keeps the settings that hold under its new name.

``method: wpo`` in place of ``{name: dpo, beta: 0.05}`` is ``{name: wpo, beta: 0.05}``: a comparison of the two compares
methods, not temperatures. A setting holds where the new name has one of the same key and the same meaning. Two settings
mean the same if they have one type and one first sentence of documentation. SimPO's ``beta`` is another than DPO's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from rayalign.config.method import resolve_method
from rayalign.config.policy import DataPolicyConfig, LabelConfig, unread_parameters
from rayalign.config.training import OPTIONS, StrategyConfig, WeightingConfig
from rayalign.errors import UserError

Meaning = tuple[object, str]
NAMED = ("method", "weighting", "data_policy", "label", "strategy")
"""Blocks of a run that a name chooses and that have settings of one schema; a scorer's are its function's."""


def carry_settings(block: str, before: Any, after: Any) -> Any:
    """``after``, a value of the block that says its name, with the settings of ``before`` that hold under it."""
    old, new = as_block(before), as_block(after)
    if block not in NAMED or old is None or new is None:
        return after
    kept = carried(block, old, new)
    return {**kept, **new} if kept else after


def carried(block: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``old`` that ``new`` does not set and that mean the same under its name."""
    before, after = setting_meanings(block, old["name"]), setting_meanings(block, new["name"])
    return {
        key: value for key, value in old.items() if key not in new and key in after and before.get(key) == after[key]
    }


def not_carried(base: Any, methods: Iterable[str]) -> list[str]:
    """A sentence for each setting of the base's ``method`` that does not hold for all ``methods`` of a comparison."""
    block = as_block(base)
    if block is None:
        return []
    before, names, found = setting_meanings("method", block["name"]), list(dict.fromkeys(methods)), []
    for key in (key for key in block if key in before):
        holds, others = [], []
        for name in names:
            after = setting_meanings("method", name)
            if after.get(key) == before[key]:
                holds.append(name)
            else:
                others.append(f"{name}, whose {key} is another setting" if key in after else f"{name}, which has none")
        if others:
            whose = f"holds for {', '.join(holds) or 'no cell'}"
            found.append(f"base.method.{key}: {block[key]} {whose}; not for {'; '.join(others)}")
    return found


def as_block(value: Any) -> Mapping[str, Any] | None:
    """A block with a name, or the name alone; None for anything else."""
    if isinstance(value, str):
        return {"name": value}
    return value if isinstance(value, Mapping) and isinstance(value.get("name"), str) else None


def setting_meanings(block: str, name: str) -> dict[str, Meaning]:
    """The settings of a block called ``name``; none where nothing has that name; reading it reports that."""
    try:
        schema = schema_of(block, name)
    except UserError:
        return {}
    if schema is None:
        return {}
    unused: frozenset[str] = frozenset({"name"})
    if block == "label":
        unused |= unread_parameters(name)
    if block == "strategy":
        unused |= {option for option, owners in OPTIONS.items() if name not in owners}
        unused |= {"workers"} if name == "single" else set()
    return {
        key: (field.annotation, (field.description or "").partition(".")[0])
        for key, field in schema.model_fields.items()
        if key not in unused
    }


def schema_of(block: str, name: str) -> type[BaseModel] | None:
    """The schema of a block called ``name``; None where none of them has that name."""
    if block == "method":
        return resolve_method(name).config
    schemas: dict[str, type[BaseModel]] = {
        "weighting": WeightingConfig,
        "label": LabelConfig,
        "strategy": StrategyConfig,
    }
    policies = get_args(get_args(DataPolicyConfig)[0])
    return schemas.get(block) or {kind.model_fields["name"].default: kind for kind in policies}.get(name)
