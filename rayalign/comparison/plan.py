"""What a comparison would make, before anything is made: its stages by key, and what is there of them.

A :class:`Plan` replaces :class:`rayalign.storage.artifacts.Artifacts`: the same code asks it for the same stages with
the same inputs, and it lists them. An input may have the digest of something that is not made yet. The key of such a
stage is a placeholder: two placeholders are equal where the final keys will be. The plan shows it as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from rayalign.config.candidates import Drawing
from rayalign.config.compare import Cell, Comparison, started_from
from rayalign.config.data import DataSource
from rayalign.config.run import EvaluatedRun, RunConfig
from rayalign.errors import UserError
from rayalign.rounds.chunk import ChunkSpec
from rayalign.rounds.streams import StoredStream
from rayalign.run.job import make_job
from rayalign.run.reads import shape_of, with_format
from rayalign.run.resolve import resolve_run
from rayalign.run.rollouts import (
    drawn_spec,
    preparation,
    prompt_store,
    rollout_stage,
    stored_spec,
)
from rayalign.run.stages import Stages
from rayalign.run.streams import filter_stage
from rayalign.run.train import is_finished_run
from rayalign.runtime.session import Session
from rayalign.runtime.worker import TrainJob
from rayalign.storage.artifacts import PENDING, refuse_unknown, stage_key
from rayalign.storage.lease import holder_in_words
from rayalign.storage.manifest import MANIFEST
from rayalign.storage.place import Place

SHOWN_KEY = 8
"""Digits of a key that tables show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One stage; ``waits_for`` names what must be made before its key is known."""

    name: str
    directory: Place
    waits_for: tuple[str, ...]
    made: bool

    @property
    def label(self) -> str:
        """As tables call it; a key that is not the final one has a question mark."""
        return short_stage_name(self.directory.name) + ("?" if self.waits_for else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Lists the stages that it is asked for; nothing is written."""

    root: Place
    fresh: frozenset[str] = frozenset()
    stages: dict[Place, PlannedStage] = field(default_factory=dict)
    asked: list[Place] = field(default_factory=list)

    def __post_init__(self) -> None:
        refuse_unknown(self.fresh)

    @property
    def note(self) -> Callable[[str], None]:
        return lambda line: None

    def stage(self, name: str, inputs: Mapping[str, Any], build: Callable[[Place], None]) -> Place:
        directory = self.root / f"{name}-{stage_key(name, inputs)}"
        waits_for = tuple(dict.fromkeys(unknown_in(inputs)))
        made = not waits_for and name not in self.fresh and (directory / MANIFEST).exists()
        self.stages[directory] = PlannedStage(name=name, directory=directory, waits_for=waits_for, made=made)
        self.asked.append(directory)
        return directory

    def pending(self, directory: Place) -> str:
        planned = self.stages.get(directory)
        return "" if planned is None or planned.made else f"{PENDING}{directory.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A cell, or the initial run: its stages, and its job where all of them are made."""

    name: str
    directory: Place
    run: RunConfig
    stages: tuple[PlannedStage, ...]
    job: TrainJob | None
    refused: str = ""
    """Why it would fail before its first step."""
    tuned: bool = False
    """``tune`` settles its configuration: only then it is known how far it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A comparison as it would run."""

    stages: Mapping[PlannedStage, Sequence[str]]
    """Stage → the cells that want it."""
    runs: tuple[PlannedRun, ...]
    """The initial run, where there is one, and every cell that is not skipped."""


def plan(comparison: Comparison, evaluated: EvaluatedRun, keeper: Plan, session: Session) -> Planned:
    """List the stages of all runs of a comparison; ``evaluated`` is the run whose evaluation all cells share."""
    stages = Stages(artifacts=keeper, session=session)
    directory = keeper.root.parent / comparison.name
    users: dict[Place, list[str]] = {}
    runs: list[PlannedRun] = []

    def add(name: str, run: RunConfig, folder: Place, processes: int, *, tuned: bool = False) -> PlannedRun:
        found = plan_run(name, run, folder, keeper, stages, processes=processes, tuned=tuned)
        runs.append(found)
        for stage in found.stages:
            users.setdefault(stage.directory, []).append(name)
        return found

    model = None
    if comparison.initial is not None:
        processes = resolve_run(comparison.initial, session).processes
        initial = add("initial", comparison.initial, directory / "initial", processes)
        if initial.job is not None and not initial.refused and is_finished_run(initial.job):
            model = str(initial.directory / "final")
    cells = [cell for cell in comparison.cells if cell.run is not None]
    processes = processes_at_once(cells, session)
    tuned = set(chain.from_iterable(tuning.cells for tuning in comparison.tuning if tuning.trials))
    for cell in cells:
        assert cell.run is not None
        run = started_from(cell.run, model) if model else cell.run
        add(cell.id, run, directory / "cells" / cell.id, processes, tuned=cell.id in tuned)
    first = len(keeper.asked)
    ask_for_prompts(evaluated, stages)
    for stage in dict.fromkeys(keeper.asked[first:]):
        users.setdefault(stage, []).append("evaluation")
    return Planned(stages={keeper.stages[stage]: names for stage, names in users.items()}, runs=tuple(runs))


def plan_run(
    name: str, run: RunConfig, directory: Place, keeper: Plan, stages: Stages, *, processes: int, tuned: bool = False
) -> PlannedRun:
    """List what one run needs; where all of it is made, its job says the rest without work."""
    first, job, refused = len(keeper.asked), None, ""
    try:
        ask_for_stages(run, stages)
        if all(keeper.stages[stage].made for stage in keeper.asked[first:]):
            job = make_job(run, directory, stages, processes=processes, label=name)
            if not tuned:
                is_finished_run(job)
    except UserError as error:
        refused = str(error)
    found = tuple(keeper.stages[stage] for stage in dict.fromkeys(keeper.asked[first:]))
    return PlannedRun(name=name, directory=directory, run=run, stages=found, job=job, refused=refused, tuned=tuned)


def ask_for_stages(run: RunConfig, stages: Stages) -> None:
    """Ask for every stage that :func:`rayalign.run.job.make_job` asks for, without looking into any."""
    drawing = run.drawing
    if drawing is not None:
        prompts = [prompt_store(source, run, stages, draws=True) for source in drawing.prompts(run.data.train)]
        if not drawing.policy.draws_rounds:
            ask_for_drawn(drawing, run, prompts, stages)
    if run.data_policy.fresh_fraction < 1:
        stores = ask_for_stored(run, run.data.train, stages)
        if run.filter is not None:
            filter_stage(run.filter, stores, run, stages)
    for auxiliary in run.auxiliary or ():
        for source in auxiliary.data:
            stages.tokens(with_format(source, auxiliary.term), run, "one")
    if run.measures_loss:
        ask_for_stored(run, run.data.eval, stages)


def ask_for_stored(run: RunConfig, sources: Sequence[DataSource], stages: Stages) -> list[Place]:
    """The stores of stored groups, with their reference log-probs."""
    method = run.trained_method
    labelling = run.relabelling
    if labelling is not None:
        prompts = [prompt_store(source, run, stages, draws=False) for source in sources]
        shape = shape_of(method)
        specs = [stored_spec(labelling, run, prompts_not_made([store], [1.0]), shape, stages) for store in prompts]
        stores = [rollout_stage(spec, run, stages) for spec in specs]
    else:
        stores = [stages.tokens(source, run, shape_of(method)) for source in sources]
        if "mismatched" in method.needs:
            stores = [stages.mismatched(store) for store in stores]
    if run.needs_reference:
        for store in stores:
            stages.reference(store, run)
    return stores


def ask_for_drawn(drawing: Drawing, run: RunConfig, prompts: list[Place], stages: Stages) -> None:
    """What is drawn once, before the first step."""
    store = rollout_stage(drawn_once_chunks(drawing, run, prompts, stages), run, stages)
    columns = [stages.reference(store, run)] if run.needs_reference else []
    prepared = preparation(run)
    if prepared is not None:
        stages.prepared(store, columns, prepared)


def drawn_once_spec(drawing: Drawing, run: RunConfig, stages: Stages) -> ChunkSpec:
    """How the completions that a run draws once are drawn."""
    prompts = [prompt_store(source, run, stages, draws=True) for source in drawing.prompts(run.data.train)]
    return drawn_once_chunks(drawing, run, prompts, stages)


def drawn_once_chunks(drawing: Drawing, run: RunConfig, prompts: list[Place], stages: Stages) -> ChunkSpec:
    stream = prompts_not_made(prompts, [source.weight for source in drawing.prompts(run.data.train)])
    return drawn_spec(drawing, run, stream, shape_of(run.trained_method), stages, needs_reference=False)


def prompts_not_made(prompts: list[Place], weights: list[float]) -> StoredStream:
    """Stores of prompts that may not be made yet, so that nothing of them is known."""
    return StoredStream(
        name="prompts",
        stores=tuple(prompts),
        columns=((),) * len(prompts),
        weights=tuple(weights),
        groups_per_step=1,
        num_candidates=0,
    )


def ask_for_prompts(evaluated: EvaluatedRun, stages: Stages) -> None:
    """Prompts that an evaluation's own function makes."""
    for source in evaluated.evaluate.prompts or evaluated.run.data.eval:
        if source.function is not None:
            stages.rows(source.function, source)


def cells_at_once(cells: Sequence[Cell], session: Session) -> int:
    """As many cells as there are devices for: GPUs, of which some are the evaluator's, or CPU cores."""
    workers = max(resolve_run(cell.run, session).workers for cell in cells if cell.run is not None)
    devices = session.num_gpus - evaluator_devices(cells) if session.num_gpus else session.num_cpus
    return max(1, min(len(cells), int(devices // workers)))


def processes_at_once(cells: Sequence[Cell], session: Session) -> int:
    """Those of all cells that train at the same time, and the evaluator, counted by its devices."""
    most = max(resolve_run(cell.run, session).processes for cell in cells if cell.run is not None)
    return cells_at_once(cells, session) * most + evaluator_devices(cells)


def evaluator_devices(cells: Sequence[Cell]) -> int:
    """Devices of the engine that samples the evaluation."""
    runs = [cell.run for cell in cells if cell.run is not None and cell.run.evaluation_engine != "hf"]
    return max((run.rollout.tensor_parallel for run in runs if run.rollout is not None), default=1)


def stage_state(stage: PlannedStage, planned: Planned, fresh: frozenset[str]) -> str:
    """What is there of a stage."""
    if stage.made:
        return "cached"
    if stage.waits_for:
        labels = {other.directory.name: other.label for other in planned.stages}
        names = [labels.get(name, f"the {name} run") for name in stage.waits_for]
        return f"to make; its key depends on {', '.join(names)}"
    writer = holder_in_words(stage.directory)
    if writer:
        return f"in progress: {writer.partition(' is being written by ')[2]}"
    if stage.name in fresh and (stage.directory / MANIFEST).exists():
        return "to make again (--fresh)"
    return "begun, to resume" if stage.directory.exists() else "to make"


def short_stage_name(name: str) -> str:
    """``tokens-1a2b3c4d`` of the folder of a stage."""
    stage, _, key = name.partition("-")
    return f"{stage}-{key[:SHOWN_KEY]}"


def unknown_in(value: Any) -> Iterator[str]:
    """The names of what is not made yet, in the inputs of a stage."""
    if isinstance(value, str) and value.startswith(PENDING):
        yield value.removeprefix(PENDING)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from unknown_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from unknown_in(item)
