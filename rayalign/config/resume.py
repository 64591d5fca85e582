"""Which settings decide the model that a run ends in: with another value of one of them a run is not resumed.

Each setting decides, unless it is marked where it is defined:

* :data:`~rayalign.config.fields.MAY_CHANGE`: results stay, up to rounding. A marked block marks all below it.
* :data:`~rayalign.config.fields.BY_CONTENT`: it says where something lies or how it is read. What is read decides, and
  the run has a digest of that; the setting explains why digests differ.

A setting without use (:meth:`~rayalign.config.fields.Block.unused`) decides nothing, and one that is left out is its
default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from rayalign.config.dump import dump
from rayalign.config.errors import FieldPath
from rayalign.config.fields import BY_CONTENT, MAY_CHANGE, Block
from rayalign.config.policy import LabelConfig
from rayalign.config.run import RunConfig
from rayalign.config.training import CriticConfig


class Identity(NamedTuple):
    """Settings of one run as nested plain values."""

    decides: dict[str, Any]
    described: dict[str, Any]
    """Those whose content decides."""


def identity(run: RunConfig) -> Identity:
    """The settings of ``run`` that a resumed run must share, and those that explain its data and models.

    A path is recorded by its last part only: a job that is submitted again works in another copy of the folder.
    """
    run = with_defaults_spelled_out(run)
    found: dict[Any, dict[str, Any]] = {None: {}, BY_CONTENT: {}, MAY_CHANGE: {}}
    for path, mark, value in marked_settings(run, dump(run, portable=True)):
        block = found[mark]
        for part in path[:-1]:
            block = block.setdefault(str(part), {})
        block[str(path[-1])] = value
    return Identity(decides=found[None], described=found[BY_CONTENT])


def with_defaults_spelled_out(run: RunConfig) -> RunConfig:
    """``run`` with the blocks that it leaves to their defaults, and without a label that its method does not ask."""
    record = run.method.record
    update: dict[str, Any] = {}
    if record.candidates == "group":
        update["label"] = None
    elif run.label is None and run.data_policy.name != "off_policy":
        update["label"] = LabelConfig()
    if record.critic is not None and run.critic is None:
        update["critic"] = CriticConfig()
    return run.model_copy(update=update)


def marked_settings(
    value: Any, dumped: Any, path: FieldPath = (), mark: object = None
) -> Iterator[tuple[FieldPath, object, Any]]:
    """(path, mark, dumped value) of every setting of a block; ``dumped`` is the block as plain values."""
    if isinstance(value, BaseModel) and isinstance(dumped, Mapping):
        unused = value.unused() if isinstance(value, Block) else frozenset()
        for name, field in type(value).model_fields.items():
            if name in dumped and name not in unused:
                own = mark or mark_of(field.metadata)
                yield from marked_settings(getattr(value, name), dumped[name], (*path, name), own)
    elif isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
        for index, (item, plain) in enumerate(zip(value, dumped, strict=True)):
            yield from marked_settings(item, plain, (*path, index), mark)
    else:
        yield path, mark, dumped


def mark_of(metadata: list[Any]) -> object:
    """The mark among a field's annotations; None where it decides."""
    return next((mark for mark in metadata if mark in (MAY_CHANGE, BY_CONTENT)), None)
