"""What a planned run will use: tokens, exact or as an upper bound, and the time and money that a pilot lets expect.

Nothing is guessed: what only preparing the data, drawing or a pilot could tell is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median

from pydantic import ValidationError

from rayalign.comparison.evaluate import evaluated_checkpoints
from rayalign.comparison.plan import PlannedRun, drawn_once_spec
from rayalign.config.compare import INITIAL
from rayalign.config.dump import diff
from rayalign.config.run import RunConfig
from rayalign.engine.metrics import read_metrics
from rayalign.errors import UserError
from rayalign.report.status import read_run_json, runs
from rayalign.rounds.mixed import MixedGroups
from rayalign.rounds.stored import StoredGroups
from rayalign.rounds.streams import AnyStream, MixedStream, RoundStream, StoredStream
from rayalign.run.reads import shape_of
from rayalign.run.rollouts import groups_per_epoch, round_plan
from rayalign.run.stages import Stages
from rayalign.run.train import is_finished_run
from rayalign.runtime.worker import TrainJob
from rayalign.storage.place import Place

UNPREPARED, DRAWN = "?", "~"
"""Stand for numbers that are known once the data are prepared, and for those of what is drawn while it trains."""
NO_PILOT = "no such run in the pilot"
DECIDES_SPEED = (
    "model.",
    "data.max_tokens",
    "data.max_prompt_tokens",
    "data_policy.",
    "method.name",
    "weighting.",
    "auxiliary",
    "optim.groups_per_step",
    "optim.tokens_per_micro_batch",
    "reference.",
    "rollout.",
    "strategy.",
)
"""Settings, by their beginnings, that change how long a step takes."""


def planned_steps(planned: PlannedRun) -> int | str:
    """Total of the whole run."""
    if planned.job is not None:
        return planned.job.spec.steps
    return planned.run.optim.steps or UNPREPARED


def steps_done(planned: PlannedRun) -> int:
    """Steps that a run would not train again: those of its newest checkpoint, or all."""
    if planned.tuned:
        return 0
    if planned.job is not None and not planned.refused and is_finished_run(planned.job):
        return planned.job.spec.steps
    return max(evaluated_checkpoints(planned.directory), default=0)


def tokens_to_train(planned: PlannedRun) -> int | str:
    """``num_tokens`` of the last row that the whole run will write."""
    if planned.job is None:
        return DRAWN if planned.run.data_policy.draws_rounds else UNPREPARED
    if planned.job.rollouts is not None:
        return DRAWN
    return sum(stored_tokens(stream, planned.job) for stream in planned.job.source.streams)


def stored_tokens(stream: AnyStream, job: TrainJob) -> int:
    """Tokens of every group that a run takes from a stream in which nothing is fresh."""
    groups, total = open_groups(stream, job.source.seed), 0
    packed: dict[tuple[int, int], int] = {}
    for step in range(job.spec.steps):
        for drawn in groups.of_step(step):
            place = id(drawn.store), drawn.row
            if place not in packed:
                packed[place] = drawn.lengths.packed if drawn.lengths.candidates else 0
            total += packed[place]
    return total


def open_groups(stream: AnyStream, seed: int) -> StoredGroups | MixedGroups:
    if isinstance(stream, StoredStream):
        return StoredGroups(stream, seed)
    assert isinstance(stream, MixedStream) and not isinstance(stream.fresh, RoundStream)
    return MixedGroups(stream, fresh=StoredGroups(stream.fresh, seed), stored=StoredGroups(stream.stored, seed))


def tokens_to_generate(planned: PlannedRun, stages: Stages) -> int | str:
    """The most that this run generates: prompts × samples × ``max_new_tokens``; 0 where a cached store has them all."""
    run, drawing = planned.run, planned.run.drawing
    if drawing is None:
        return 0
    per_prompt = drawing.rollout.samples * drawing.rollout.max_new_tokens
    every = drawing.policy.refresh_every
    if isinstance(every, int):
        steps = planned_steps(planned)
        if isinstance(steps, str):
            return steps
        plan = round_plan(drawing, run, refresh_every=every, steps=steps)
        return sum(len(plan.round_positions(number)) for number in range(plan.num_rounds)) * per_prompt
    if all(stage.made for stage in planned.stages if stage.name == "rollouts"):
        return 0
    spec = drawn_once_spec(drawing, run, stages)
    if any(stages.artifacts.pending(store) for store in spec.prompts.stores):
        return UNPREPARED
    return groups_per_epoch(spec) * per_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotRun:
    """A run that was trained before, and how long its steps took."""

    directory: Place
    run: RunConfig
    workers: int
    threads: int
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Time of one step, and in what the pilot that it is from differs from the planned run."""

    seconds_per_step: float
    differences: tuple[str, ...]


def read_pilot(directory: Place) -> list[PilotRun]:
    """Every run at or below ``directory`` that has rows of metrics.

    Raises:
        UserError: there is none.
    """
    found = []
    for folder in runs(directory):
        facts, rows = read_run_json(folder / "run.json"), folder / "metrics.jsonl"
        seconds = tuple(row["seconds"] for row in read_metrics(rows)) if rows.exists() else ()
        if not seconds or "configuration" not in facts:
            continue
        try:
            run = RunConfig.model_validate(facts["configuration"])
        except (ValidationError, UserError):  # of a version with other settings, or with a method that is not here
            continue
        found.append(
            PilotRun(
                directory=folder,
                run=run,
                workers=facts["workers"] if isinstance(facts["workers"], int) else facts["workers"][-1],
                threads=facts["threads_per_worker"],
                seconds=seconds,
            )
        )
    if not found:
        raise UserError(
            f"--pilot {directory}: there is no run with metrics at or below it; name the folder of a run or of a "
            "comparison that was trained for some steps"
        )
    return found


def timing_kind(run: RunConfig) -> tuple[str, str, bool]:
    """What runs must have in common for the time of one to tell of the other's."""
    return shape_of(run.trained_method), run.data_policy.name, run.data_policy.draws_rounds


def estimate_step_time(
    run: RunConfig, pilots: Sequence[PilotRun], *, workers: int, threads: int | None
) -> StepTime | None:
    """The median over all steps of those pilots of this kind that differ from the run in the fewest settings.

    ``threads`` is None where a GPU computes.
    """
    alike = [pilot for pilot in pilots if timing_kind(pilot.run) == timing_kind(run)]
    if not alike:
        return None
    found = {pilot.directory: slowing(pilot, run, workers=workers, threads=threads) for pilot in alike}
    fewest = min(map(len, found.values()))
    nearest = [pilot for pilot in alike if len(found[pilot.directory]) == fewest]
    return StepTime(
        seconds_per_step=median(chain.from_iterable(pilot.seconds for pilot in nearest)),
        differences=tuple(dict.fromkeys(chain.from_iterable(found[pilot.directory] for pilot in nearest))),
    )


def slowing(pilot: PilotRun, run: RunConfig, *, workers: int, threads: int | None) -> list[str]:
    """``setting: the pilot's → the run's`` for all that changes the time of a step."""
    found = [
        str(change)
        for change in diff(pilot.run, run)
        if change.field.startswith(DECIDES_SPEED) and not (change.field == "model.name" and change.right == INITIAL)
    ]
    if pilot.workers != workers:
        found.append(f"workers: {pilot.workers} → {workers}")
    if threads is not None and pilot.threads != threads:
        found.append(f"threads per worker: {pilot.threads} → {threads}")
    return found
