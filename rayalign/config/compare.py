"""A comparison: a base run and a grid of axes → cells, each an ordinary run or the reason why it is skipped."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from rayalign.config.budget import BudgetConfig, PricesConfig
from rayalign.config.carry import carry_settings, not_carried
from rayalign.config.document import Document, apply_overrides, credentials, read_document
from rayalign.config.errors import ConfigError, Problem
from rayalign.config.explain import explain
from rayalign.config.fields import Block
from rayalign.config.grid import GridEntry, apply_entry, read_axis
from rayalign.config.legality import blocks_without_use
from rayalign.config.load import importable, parse_run
from rayalign.config.run import Name, RunConfig
from rayalign.config.tune import TuneConfig, Tuning, plan_tuning

INITIAL = "(initial)"
"""``model.name`` of every cell until the ``initial`` run is trained; see :func:`started_from`."""
MAX_NAME = 128
NOTHING_TO_SAMPLE = "{} trains no policy, and a comparison samples what it has trained; train it with rayalign train"


class ReportConfig(Block):
    """The comparison's own words, and what its report looks at."""

    title: str | None = None
    """null: the comparison's name."""
    opening: tuple[str, ...] = ()
    """Sentences that stand above everything."""
    caveats: tuple[str, ...] = ()
    """Sentences that close the report."""
    kl_levels: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 2.0, 5.0)
    """KL, in nats, at which cells are set side by side."""
    curves: tuple[str, ...] = ("loss", "rewards/accuracies", "rewards/margins")
    """Training metrics that are drawn."""


class CompareConfig(Block):
    """What a comparison's YAML may say. Results go to ``<storage_path of base>/<name>/``."""

    config_version: Literal[1] = 1
    """Version of this schema; a file of another version is refused."""
    name: Name = "comparison"
    """The folder of the results, below the base's storage_path; the same name continues."""
    base: dict[str, Any]
    """A run, or the path of one: everything that is not under test."""
    grid: Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Field(min_length=1)]
    """Axis → entries; an axis is a block or a dotted setting of a run."""
    initial: dict[str, Any] | None = None
    """A run, or the path of one, trained once in the comparison's folder: ``model.name`` of every cell."""
    tune: TuneConfig | None = None
    """Trials that every configuration gets before the grid's seeds are trained."""
    report: ReportConfig = ReportConfig()
    budget: BudgetConfig | None = None
    """What training may use in all; then cells stop with a checkpoint, and what was trained is measured."""
    prices: PricesConfig | None = None
    """null: ``--dry-run --pilot`` estimates hours, and no money."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One point of the grid."""

    id: str
    """Readable, unique, fit for a folder's name; it depends on this cell's entries only."""
    label: str
    coordinates: Mapping[str, str]
    """Axis → the entry's label."""
    run: RunConfig | None
    """Named ``<comparison>.<id>``; None where the cell is skipped."""
    skipped_reason: str = ""
    picked: str = ""
    """What ``tune`` picked for it, fit for a folder's name."""

    @property
    def folder(self) -> str:
        """Where it is trained, below ``cells/``: runs of two picks are two runs."""
        return f"{self.id}__{self.picked}" if self.picked else self.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A comparison that can start: at least one cell has a run."""

    name: str
    storage_path: str
    initial: RunConfig | None
    cells: tuple[Cell, ...]
    report: ReportConfig
    tune: TuneConfig | None = None
    tuning: tuple[Tuning, ...] = ()
    """One per configuration; empty without ``tune``."""
    budget: BudgetConfig | None = None
    prices: PricesConfig | None = None
    notes: tuple[str, ...] = ()
    """What its author may not expect."""

    @property
    def trial_runs(self) -> tuple[RunConfig, ...]:
        trials = chain.from_iterable(tuning.trials for tuning in self.tuning)
        return tuple(chain.from_iterable(trial.runs for trial in trials))


def load_compare(path: str | Path, overrides: Iterable[str] = ()) -> Comparison:
    """The comparison that the YAML at ``path`` describes; ``base.optim.steps=20`` overrides the base run.

    A base or initial run that lies in a file of its own resolves its inputs against that file's folder.

    Raises:
        ConfigError: with every mistake found, one per line; also when every cell is skipped.
    """
    overrides = list(overrides)
    runs = ("base", "initial")
    prefixes = tuple(f"{key}." for key in runs)
    own = [text for text in overrides if not text.startswith(prefixes)]
    document = apply_overrides(read_document(path), own)
    if "grid" not in document.data and "method" in document.data:
        raise ConfigError([Problem(str(path), "", f"is a single run; start it with: rayalign train {path}")])
    given = [key for key in runs if document.data.get(key) is not None]
    parts = {key: _run_document(document, key, Path(path).parent, overrides) for key in given}
    leaked = list(chain.from_iterable(credentials(part) for part in (document, *parts.values())))
    if leaked:
        raise ConfigError(dict.fromkeys(leaked))
    try:
        config = CompareConfig.model_validate(document.data | {key: part.data for key, part in parts.items()})
    except ValidationError as error:
        raise ConfigError(explain(error, document, model=CompareConfig)) from None
    base = parts["base"]
    initial = _initial(config, parts["initial"], base) if "initial" in parts else None
    cells = expand(config, base=base, source=document)
    runnable = [cell.run for cell in cells if cell.run is not None]
    if not runnable:
        reasons = [Problem(str(path), f"cell {cell.id}", f"skipped, because {cell.skipped_reason}") for cell in cells]
        raise ConfigError([Problem(str(path), "grid", "no cell can be run"), *reasons])
    tuning: tuple[Tuning, ...] = ()
    if config.tune is not None:
        axes = [read_axis(axis, values, document) for axis, values in config.grid.items()]
        tuning = plan_tuning(config.tune, cells, axes, base=base, source=document)
    return Comparison(
        name=config.name,
        storage_path=runnable[0].storage_path,
        initial=initial,
        cells=tuple(cells),
        report=config.report,
        tune=config.tune,
        tuning=tuning,
        budget=config.budget,
        prices=config.prices,
        notes=tuple(not_carried(base.data.get("method"), (run.method.name for run in runnable))),
    )


def expand(config: CompareConfig, *, base: Document, source: Document) -> list[Cell]:
    """The product of the axes, in the order of the YAML; ``source`` is the document that holds the grid.

    Raises:
        ConfigError: a cell is malformed (an illegal one is skipped instead).
    """
    axes = [read_axis(axis, values, source) for axis, values in config.grid.items()]
    given = [block for block in ("rollout", "label", "scorer", "filter") if base.data.get(block) is not None]
    kept: set[str] = set()
    problems: dict[Problem, None] = {}
    cells = []
    for entries in itertools.product(*axes):
        document = base
        for entry in entries:
            document = apply_entry(entry, document, source)
        document = _without_unused(document, base)
        kept.update(document.data)
        try:
            cells.append(_cell(config, entries, document))
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    for block in given:
        if block not in kept:
            problems[Problem(base.place((block,)).where, block, "is used by no cell; remove it")] = None
    if problems:
        raise ConfigError(problems)
    return cells


def started_from(run: RunConfig, model: str) -> RunConfig:
    """A cell's run with the final model of the ``initial`` run in place of :data:`INITIAL`."""
    return run.model_copy(update={"model": run.model.model_copy(update={"name": model})})


def _run_document(document: Document, key: str, folder: Path, overrides: Iterable[str]) -> Document:
    value = document.data[key]
    part = read_document(folder / value) if isinstance(value, str) else document.part((key,))
    mine = [text.removeprefix(f"{key}.") for text in overrides if text.startswith(f"{key}.")]
    if not mine:
        return part
    with importable(part.directory):
        return apply_overrides(part, mine, replaced=carry_settings)


def _initial(config: CompareConfig, document: Document, base: Document) -> RunConfig:
    defaults = {"name": f"{config.name}.initial"}
    if "storage_path" in base.data:
        defaults["storage_path"] = base.data["storage_path"]
    run = parse_run(replace(document, data=defaults | document.data))
    if run.method.record.trains != "policy":
        reason = NOTHING_TO_SAMPLE.format(run.method.name)
        raise ConfigError([Problem(document.place(("method",)).where, "initial.method", reason)])
    return run


def _without_unused(document: Document, base: Document) -> Document:
    """Without the base's blocks that this cell's data policy has no use for: other cells have."""
    policy, label = document.get(("data_policy",)), document.get(("label",))
    name = policy.get("name", "off_policy") if isinstance(policy, Mapping) else policy or "off_policy"
    relabels = isinstance(label, Mapping) and label.get("relabel") is True
    unused = [
        block
        for block in blocks_without_use(name, relabels=relabels)
        if document.data.get(block) == base.data.get(block)
    ]
    return replace(document, data={key: value for key, value in document.data.items() if key not in unused})


def _cell(config: CompareConfig, entries: Sequence[GridEntry], document: Document) -> Cell:
    identity = "__".join(entry.slug for entry in entries)
    name = f"{config.name}.{identity}"
    if len(name) > MAX_NAME:
        raise ConfigError([Problem("", "grid", f"{name} is too long a name; give entries short ones, such as as: a")])
    if config.initial is not None:
        document = _with_initial_model(document)
    coordinates = {entry.axis: entry.label for entry in entries}
    try:
        run = parse_run(replace(document, data=document.data | {"name": name}))
    except ConfigError as error:
        if not all(problem.illegal for problem in error.problems):
            raise
        reason = "; ".join(f"{problem.field}: {problem.message}" for problem in error.problems)
        label = ", ".join(coordinates.values())
        return Cell(id=identity, label=label, coordinates=coordinates, run=None, skipped_reason=reason)
    if run.method.record.trains != "policy":
        return Cell(
            id=identity,
            label=", ".join(coordinates.values()),
            coordinates=coordinates,
            run=None,
            skipped_reason=f"method: {NOTHING_TO_SAMPLE.format(run.method.name)}",
        )
    if run.has_no_kl_term and "method" in coordinates:
        coordinates["method"] += " (no KL)"
    return Cell(id=identity, label=", ".join(coordinates.values()), coordinates=coordinates, run=run)


def _with_initial_model(document: Document) -> Document:
    if document.get(("model", "name")) is not None:
        where = document.place(("model", "name")).where
        raise ConfigError([Problem(where, "model.name", "is the initial run's final model; remove it")])
    return apply_overrides(document, [f"model.name={INITIAL}"])
