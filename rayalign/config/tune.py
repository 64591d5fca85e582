"""``tune``: every configuration of a comparison gets the same number of trials, on training seeds of their own.

A configuration is what the grid's axes but ``seed`` make: cells that differ in their seed are tuned together.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rayalign.config.document import Document, assign, keys_of
from rayalign.config.errors import ConfigError, Problem
from rayalign.config.explain import setting_meant
from rayalign.config.fields import Block
from rayalign.config.grid import SECTIONS, Change, GridEntry, slug
from rayalign.config.load import parse_run
from rayalign.config.run import RunConfig

if TYPE_CHECKING:
    from rayalign.config.compare import Cell

NOT_TUNED = {"seed", "evaluate", "checkpoint", "track", "resources", "strategy"}
"""Sections that do not decide which model a run ends in, or only by chance."""
MAX_COMBINATIONS = 10_000
ALL = "all"
"""The id of a configuration where ``seed`` is the only axis."""


def _numbers(value: object) -> object:
    return [value] if isinstance(value, int) else value


class TuneConfig(Block):
    """Trials before the comparison: with what wins them on one half of the prompts, the grid's seeds are trained."""

    over: Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Field(min_length=1)]
    """Dotted setting → values; a trial is a combination of them. What an entry of the grid sets itself stays."""
    trials: int = Field(default=6, ge=1)
    """Combinations that every configuration tries, drawn without repetition; all, where there are fewer."""
    on: Literal["select"] = "select"
    """The half of the first prompt set that decides, by the first scorer after the last evaluated step."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), BeforeValidator(_numbers)] = (1000,)
    """Training seeds of the trials; none of them is the grid's. With several, their mean decides."""
    max_kl: float | None = Field(default=None, gt=0)
    """Nats per reply: a trial whose mean KL is larger is not picked."""
    sample_seed: int = Field(default=0, ge=0)
    """Seed of the draw of combinations: the same ones for every configuration that has the same settings."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("two tuning seeds are the same")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A setting, or a combination, that a configuration does not try."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One combination of values."""

    label: str
    """``optim.lr=1e-06 method.beta=0.1``."""
    values: Mapping[str, Any]
    runs: tuple[RunConfig, ...]
    """One per tuning seed; its name is fit for a folder."""

    def settled(self, run: RunConfig) -> RunConfig:
        """``run`` with this trial's values."""
        return self.runs[0].model_copy(update={"seed": run.seed, "name": run.name})


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What one configuration tries."""

    id: str
    """The cells' without the seed."""
    label: str
    cells: tuple[str, ...]
    """Ids of the cells that are trained with what is picked."""
    trials: tuple[Trial, ...]
    """Empty: the configuration is untuned."""
    asked: int
    """Trials that ``tune.trials`` asks for."""
    left_out: tuple[LeftOut, ...]


def plan_tuning(
    tune: TuneConfig, cells: Sequence[Cell], axes: Sequence[Sequence[GridEntry]], *, base: Document, source: Document
) -> tuple[Tuning, ...]:
    """The trials of every configuration that has a run; ``cells`` are the product of ``axes``, in its order.

    Raises:
        ConfigError: a setting or a value goes with no configuration, or a tuning seed is the grid's.
    """
    problems = list(_refused(tune, cells, source))
    if problems:
        raise ConfigError(problems)
    groups: dict[str, list[tuple[Cell, RunConfig, tuple[GridEntry, ...]]]] = {}
    for entries, cell in zip(itertools.product(*axes), cells, strict=True):
        if cell.run is not None:
            same = cell.run.model_dump(mode="json", exclude={"name", "seed"})
            own = [entry.slug for entry in entries if entry.axis != "seed"]
            groups.setdefault(json.dumps([own, same], sort_keys=True), []).append((cell, cell.run, entries))
    used: set[tuple[str, int]] = set()
    refused: dict[str, str] = {}
    found = [_tuning(tune, group, base, used, refused) for group in groups.values()]
    for key, values in tune.over.items():
        if not any((key, index) in used for index in range(len(values))):
            problems.append(Problem(source.place(("tune", "over", key)).where, f"tune.over.{key}", refused[key]))
            continue
        problems += [
            Problem(
                source.place(("tune", "over", key, index)).where,
                f"tune.over.{key}[{index}]",
                f"{value!r} goes with no configuration: {refused[_label({key: value})]}",
            )
            for index, value in enumerate(values)
            if (key, index) not in used
        ]
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def _refused(tune: TuneConfig, cells: Sequence[Cell], source: Document) -> Iterator[Problem]:
    shared = sorted({cell.run.seed for cell in cells if cell.run is not None} & set(tune.seeds))
    if shared:
        text = f"{shared[0]} is a seed of the grid, whose runs would then have been chosen for it; write another"
        yield Problem(source.place(("tune", "seeds")).where, "tune.seeds", text)
    size = 1
    for key, values in tune.over.items():
        place, field = source.place(("tune", "over", key)).where, f"tune.over.{key}"
        size *= len(values)
        if key.partition(".")[0] not in SECTIONS - NOT_TUNED:
            meant = "" if key.partition(".")[0] in SECTIONS else setting_meant(key, values)
            known = f"a setting is in one of {', '.join(sorted(SECTIONS - NOT_TUNED))}"
            yield Problem(place, field, f"cannot be tuned; {f'did you mean {meant}?' if meant else known}")
        if any(isinstance(value, Mapping) for value in values):
            yield Problem(
                place, field, "a value is a block; tune one setting at a time, such as optim.lr: [1e-6, 3e-6]"
            )
    if size > MAX_COMBINATIONS:
        where = source.place(("tune", "over")).where
        yield Problem(where, "tune.over", f"{size:,} combinations, more than {MAX_COMBINATIONS:,}; write fewer values")


def _tuning(
    tune: TuneConfig,
    group: Sequence[tuple[Cell, RunConfig, tuple[GridEntry, ...]]],
    base: Document,
    used: set[tuple[str, int]],
    refused: dict[str, str],
) -> Tuning:
    """``used`` collects (setting, place of a value) of what some configuration takes, ``refused`` why one does not."""
    cell, run, entries = group[0]
    own = [entry for entry in entries if entry.axis != "seed"]
    changes = list(chain.from_iterable(entry.changes for entry in own))
    left_out: list[LeftOut] = []
    choices: list[list[tuple[str, Any]]] = []
    for key, values in tune.over.items():
        place = tuple(key.split("."))
        if any(_sets(change, place) for change in changes):
            left_out.append(LeftOut(what=key, reason="the grid's entry sets it"))
            refused.setdefault(key, "is set by every entry of the grid that could take it; remove it here or there")
            continue
        reasons = {index: _attempt(run, {key: value}, base)[1] for index, value in enumerate(values)}
        taken = [index for index, reason in reasons.items() if not reason]
        used |= {(key, index) for index in taken}
        if not taken:
            left_out.append(LeftOut(what=key, reason=reasons[0]))
            refused.setdefault(key, reasons[0])
            for index, reason in reasons.items():
                refused.setdefault(_label({key: values[index]}), reason)
            continue
        refused |= {_label({key: values[index]}): reason for index, reason in reasons.items() if reason}
        left_out += [
            LeftOut(what=_label({key: values[index]}), reason=reason) for index, reason in reasons.items() if reason
        ]
        choices.append([(key, values[index]) for index in taken])
    trials = list(_trials(tune, run, choices, base, left_out)) if choices else []
    return Tuning(
        id="__".join(entry.slug for entry in own) or ALL,
        label=", ".join(label for axis, label in cell.coordinates.items() if axis != "seed") or run.display_name,
        cells=tuple(member.id for member, _, _ in group),
        trials=tuple(trials),
        asked=tune.trials,
        left_out=tuple(left_out),
    )


def _trials(
    tune: TuneConfig,
    run: RunConfig,
    choices: Sequence[Sequence[tuple[str, Any]]],
    base: Document,
    left_out: list[LeftOut],
) -> Iterator[Trial]:
    """The first ``tune.trials`` legal combinations of a shuffled product: more trials begin with the same ones."""
    combinations = [dict(combination) for combination in itertools.product(*choices)]
    random.Random(tune.sample_seed).shuffle(combinations)
    seen: list[RunConfig] = []
    for values in combinations:
        if len(seen) == tune.trials:
            return
        found, reason = _attempt(run, values, base)
        if found is None:
            left_out.append(LeftOut(what=_label(values), reason=reason))
        elif found in seen:
            left_out.append(LeftOut(what=_label(values), reason="is the same run as another combination"))
        else:
            seen.append(found)
            names = {seed: f"{slug(_label(values))}__seed-{seed}" for seed in tune.seeds}
            runs = tuple(found.model_copy(update={"seed": seed, "name": name}) for seed, name in names.items())
            yield Trial(label=_label(values), values=values, runs=runs)


def _attempt(run: RunConfig, values: Mapping[str, Any], base: Document) -> tuple[RunConfig | None, str]:
    """``run`` with ``values``, or why that is no run."""
    for key in values:
        block, _, parameter = key.partition(".")
        if block == "method" and parameter not in run.method.record.config.model_fields:
            return None, f"{run.method.record.name} has no {parameter}"
    data = run.model_dump(mode="json")
    try:
        for key, value in values.items():
            assign(data, keys_of(key), value)
        return parse_run(Document(data=data, directory=base.directory)), ""
    except ConfigError as error:
        return None, "; ".join(f"{problem.field}: {problem.message}" for problem in error.problems)
    except ValueError as error:
        return None, str(error)


def _sets(change: Change, path: tuple[str, ...]) -> bool:
    """Whether a change of the grid decides the setting at ``path``."""
    if change.path[: len(path)] == path:
        return True
    if path[: len(change.path)] != change.path:
        return False
    value = change.value
    for part in path[len(change.path) :]:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping):
            if part not in value:
                return False
            value = value[part]
        else:
            return True  # null, above all: the block is taken away
    return True


def _label(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())
