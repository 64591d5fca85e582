"""Which sources a run reads, and what its method learns from each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from rayalign.config.data import DataSource
from rayalign.config.run import RunConfig
from rayalign.data.budget import Completed
from rayalign.data.tokenize_rows import Shape
from rayalign.methods.method import Method

COLUMN_FIELDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "reward": "`rewards`, one number per completion",
        "label": "`label`",
        "behavior_logp": "`behavior_logps`, the log-probabilities of whole completions under the policy that drew them "
        "(one that is cut at data.max_tokens has none); without them write method.behavior: assume_reference if the "
        "reference drew them (the report repeats it)",
    }
)
"""Column → the field of rows that it comes from, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One source of a run, and what is read of it."""

    field: str
    """Where the configuration names the source."""
    source: DataSource
    shape: Shape
    needs: frozenset[str] = frozenset()
    """Columns that every row has to have, and ``completion`` where prompts alone do not do."""
    completed: Completed = "no"
    """Whether fresh completions follow the prompts."""
    is_strict: bool = False
    """One bad row ends the run, whatever ``data.max_bad_fraction`` is."""


def sources_read(run: RunConfig) -> Iterator[Read]:
    """Every source that ``run`` reads, in the order of the configuration."""
    record, policy = run.method.record, run.data_policy
    shape: Shape = "prompt" if run.relabels else shape_of(record)
    needs = frozenset({"completion"}) if run.relabels else needed_of_rows(record, run.method.config)
    if policy.fresh_fraction < 1:
        yield from _listed("data.train", run.data.train, shape, needs)
    elif policy.name != "off_policy" and policy.prompts is None:
        stored = needs & {"behavior_logp"} if policy.name == "hybrid" else frozenset[str]()
        completed: Completed = "beside" if policy.name == "hybrid" else "alone"
        yield from _listed("data.train", run.data.train, "prompt", stored, completed)
    if run.measures_loss:
        yield from _listed("data.eval", run.data.eval, shape, needs)
    for number, auxiliary in enumerate(run.auxiliary or ()):
        sources = [with_format(source, auxiliary.term) for source in auxiliary.data]
        yield from _listed(f"auxiliary[{number}].data", sources, "one", frozenset())
    if policy.name != "off_policy" and policy.prompts is not None:
        source = _of_any_format(policy.prompts)
        yield Read(field="data_policy.prompts", source=source, shape="prompt", completed="alone")
    if run.evaluate is not None:
        for number, source in enumerate(run.evaluate.prompts):
            yield Read(
                field=f"evaluate.prompts[{number}]", source=_of_any_format(source), shape="prompt", is_strict=True
            )


def _listed(
    field: str, sources: Sequence[DataSource], shape: Shape, needs: frozenset[str], completed: Completed = "no"
) -> Iterator[Read]:
    for number, source in enumerate(sources):
        yield Read(field=f"{field}[{number}]", source=source, shape=shape, needs=needs, completed=completed)


def _of_any_format(source: DataSource) -> DataSource:
    """``data.format`` is that of the rows that are trained on; prompts may come otherwise."""
    return source.model_copy(update={"format": source.format or "auto"})


def with_format(source: DataSource, term: Literal["reference", "pretrain"]) -> DataSource:
    """The source in the format of its term; ``data.format`` is that of the rows under test."""
    return source.model_copy(update={"format": source.format or ("text" if term == "pretrain" else "auto")})


def shape_of(method: Method) -> Shape:
    """What the method learns from."""
    if method.candidates == "one":
        return "labelled" if "label" in method.needs else "one"
    return method.candidates


def needed_of_rows(method: Method, config: Any) -> frozenset[str]:
    """Those of :func:`needed_columns` that rows must have: a pair has no label, and is two labelled answers."""
    return needed_columns(method, config) - ({"label"} if shape_of(method) == "labelled" else set())


def needed_columns(method: Method, config: Any) -> frozenset[str]:
    """Numbers of rows that the method requires."""
    needed = {*COLUMN_FIELDS} & method.needed(config)
    if getattr(config, "behavior", "") == "assume_reference":
        needed -= {"behavior_logp"}
    return frozenset(needed)
