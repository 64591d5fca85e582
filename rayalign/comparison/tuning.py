"""The trials of ``tune``: trained on seeds of their own, measured on the *select* half of the prompts, one picked."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from rich.table import Table

from rayalign.comparison.evaluate import (
    MEASURED_KL,
    Evaluation,
    evaluated_checkpoints,
    evaluation_digest,
    evaluation_spec,
)
from rayalign.comparison.record import CellResult, cell_cost, value_text
from rayalign.config.compare import Cell, Comparison
from rayalign.config.grid import slug
from rayalign.config.run import EvaluatedRun
from rayalign.config.scoring import REFERENCE
from rayalign.config.tune import Trial, TuneConfig, Tuning
from rayalign.engine.metrics import read_metrics
from rayalign.errors import UserError
from rayalign.judge.evaluator import EvaluationSpec, Evaluator
from rayalign.report import trials
from rayalign.report.points import EvaluationPoint, Samples, as_array
from rayalign.report.statistics import half_of, prompt_means
from rayalign.run.display import ProgressBoard
from rayalign.run.job import evaluation_steps
from rayalign.run.stages import Stages
from rayalign.runtime.pool import Pool

MOST_PICKED = 100
"""Characters of what was picked in a folder's name: file systems take 255 in all."""

TrainAll = Callable[[Sequence[Cell]], Generator[CellResult]]
"""Trains cells, several at a time; yields each once it is trained, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """What one training run of a trial came to: numbers, or why there are none."""

    trained: CellResult
    step: int = 0
    score: float = math.nan
    kl: float = math.nan
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the trials of one configuration came to."""

    tuning: Tuning
    picked: Trial | None
    record: trials.TuningRecord

    def settle(self, cell: Cell) -> Cell:
        """The cell with what was picked; as it is where there was nothing to try.

        Raises:
            UserError: there were trials, and none of them can be picked.
        """
        if not self.tuning.trials:
            return cell
        if self.picked is None:
            reasons = "; ".join(f"{trial.label}: {trial.reason}" for trial in self.record.trials)
            raise UserError(f"none of its {len(self.record.trials)} trials can be picked: {reasons}")
        assert cell.run is not None
        picked = slug(self.picked.label)[:MOST_PICKED]
        return replace(cell, run=self.picked.settled(cell.run), picked=picked)


def trials_table(comparison: Comparison) -> Table:
    """What is tried before anything starts, and what is not because of what."""
    table = Table(title=f"{comparison.name}: trials")
    for column in ("configuration", "trials", "seeds", "left out"):
        table.add_column(column)
    for tuning in comparison.tuning:
        fewer = f" (all there are; {tuning.asked} asked for)" if 0 < len(tuning.trials) < tuning.asked else ""
        tried = "\n".join(trial.label for trial in tuning.trials) or "untuned"
        seeds = ", ".join(str(run.seed) for run in tuning.trials[0].runs) if tuning.trials else ""
        left_out = "\n".join(f"{left.what}: {left.reason}" for left in tuning.left_out)
        table.add_row(tuning.id, f"{tried}{fewer}", seeds, left_out)
    return table


def trial_cells(comparison: Comparison) -> list[Cell]:
    """A cell per trial and tuning seed, in their order."""
    cells: list[Cell] = []
    for tuning in comparison.tuning:
        for trial in tuning.trials:
            for run in trial.runs:
                label = f"{tuning.label}, {trial.label}, seed={run.seed}"
                cells.append(Cell(id=f"{tuning.id}/{run.name}", label=label, coordinates={}, run=run))
    return cells


def tune(
    comparison: Comparison,
    config: TuneConfig,
    evaluated: EvaluatedRun,
    stages: Stages,
    train: TrainAll,
    board: ProgressBoard,
) -> tuple[Outcome, ...]:
    """Train and measure every trial and pick one per configuration. What was done before is found, not done again.

    ``evaluated`` is a run whose evaluation is every cell's.

    Raises:
        UserError: a half of the first prompt set is empty.
    """
    selecting = selecting_run(evaluated)
    spec = selecting_spec(selecting, stages)
    cells = trial_cells(comparison)
    seeds = len(config.seeds)
    board.say(f"tuning: {len(cells)} runs, {len(cells) // seeds} trials")
    measures: list[TrialResult] = []
    with ExitStack() as stack:
        evaluation: Evaluation | None = None
        trained = stack.enter_context(closing(train(cells)))  # now, not once somebody collects it: trials are saved
        for result in trained:
            if evaluation is None and result.job is not None:
                pool = Pool("tuning", Evaluator, spec, share=result.job.share, most=1)
                digest = evaluation_digest(spec)
                evaluation = Evaluation(spec=spec, config=selecting.evaluate, digest=digest, evaluators=pool)
                stack.callback(evaluation.close)
            measures.append(measure_trial(result, evaluation, board))
    by_trial = iter([measures[index : index + seeds] for index in range(0, len(measures), seeds)])
    found = []
    for tuning in comparison.tuning:
        outcome = pick_trial(tuning, [next(by_trial) for _ in tuning.trials], config, spec)
        if tuning.trials:
            board.say(f"{tuning.id}: picked {outcome.picked.label if outcome.picked else 'none of its trials'}")
        found.append(outcome)
    return tuple(found)


def selecting_run(evaluated: EvaluatedRun) -> EvaluatedRun:
    """Evaluated by the first scorer alone: a judge is not asked about trials."""
    alone = {"scorers": evaluated.evaluate.scorers[:1], "diagnostics": (), "judge": None, "baseline": REFERENCE}
    config = evaluated.evaluate.model_copy(update=alone)
    return EvaluatedRun(run=evaluated.run.model_copy(update={"evaluate": config}), evaluate=config)


def selecting_spec(selecting: EvaluatedRun, stages: Stages) -> EvaluationSpec:
    """On the *select* half of the first prompt set."""
    spec = evaluation_spec(selecting, stages)
    name, prompts = next(iter(spec.prompt_sets.items()))
    half = tuple(prompt for prompt in prompts if half_of(prompt.text) == "select")
    if not half or len(half) == len(prompts):
        raise UserError(
            f"tune: all {len(prompts)} prompts of {name} are in the {'select' if half else 'report'} half, which a "
            "hash of their text decides; give evaluate.prompts more of them"
        )
    return replace(spec, prompt_sets={name: half})


def measure_trial(trained: CellResult, evaluation: Evaluation | None, board: ProgressBoard) -> TrialResult:
    """Mean score and KL after the last evaluated step; a failure is logged and kept."""
    if trained.failure or trained.job is None or evaluation is None:
        return TrialResult(trained=trained, failure=trained.failure)
    directory = trained.job.spec.directory
    try:
        step = evaluation_steps(trained.run, trained.job.spec.steps)[-1]
        (point,) = evaluation.points(evaluated_checkpoints(directory)[step], directory)
    except UserError as error:
        board.say(f"{trained.cell.id}: failed: {error}")
        return TrialResult(trained=trained, failure=str(error))
    score, kl = mean_over_prompts(next(iter(point.scores.values()))), leading_kl(point)
    return TrialResult(
        trained=trained, step=step, score=score, kl=kl, failure="has no score" if math.isnan(score) else ""
    )


def leading_kl(point: EvaluationPoint) -> float:
    """By the first estimator that has a value."""
    means = [mean_over_prompts(point.kl[name]) for name in MEASURED_KL]
    return next((value for value in means if not math.isnan(value)), math.nan)


def mean_over_prompts(samples: Samples) -> float:
    """Over the prompts that have a value."""
    values = prompt_means(as_array(samples))
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else math.nan


def pick_trial(
    tuning: Tuning, measures: Sequence[Sequence[TrialResult]], config: TuneConfig, spec: EvaluationSpec
) -> Outcome:
    """The trial of the highest mean score, of equal ones the first, among those that did not fail nor drift too far."""
    records = [record_of(trial, found, config) for trial, found in zip(tuning.trials, measures, strict=True)]
    eligible = [index for index, trial in enumerate(records) if trial.status == "done" and not trial.reason]
    best = max(eligible, key=lambda index: (score_of(records[index]), -index), default=None)
    ((prompt_set, prompts),) = spec.prompt_sets.items()
    return Outcome(
        tuning=tuning,
        picked=None if best is None else tuning.trials[best],
        record=trials.TuningRecord(
            label=tuning.label,
            cells=tuning.cells,
            asked=tuning.asked,
            seeds=config.seeds,
            scorer=spec.scorers[0].label,
            prompt_set=prompt_set,
            num_prompts=len(prompts),
            max_kl=config.max_kl,
            trials=tuple(records),
            picked=best,
            left_out=tuple(trials.UntriedSetting(what=left.what, reason=left.reason) for left in tuning.left_out),
        ),
    )


def score_of(trial: trials.TrialRecord) -> float:
    return -math.inf if trial.score is None else trial.score


def record_of(trial: Trial, found: Sequence[TrialResult], config: TuneConfig) -> trials.TrialRecord:
    """A trial fails with any of its runs; one that drifts too far has numbers, and a reason against it."""
    costs = [cost_of(measure.trained) for measure in found]
    values = {key: value_text(value) for key, value in trial.values.items()}
    used = trials.Cost(
        tokens_trained=sum(one.tokens_trained for one in costs),
        tokens_generated=sum(one.tokens_generated for one in costs),
        labels_used=sum(one.labels_used for one in costs),
        scorer_calls=sum(one.scorer_calls for one in costs),
        device_seconds=sum(one.device_seconds or 0.0 for one in costs),
    )
    failures = [measure.failure for measure in found if measure.failure]
    if failures:
        return trials.TrialRecord(label=trial.label, values=values, status="failed", reason=failures[0], cost=used)
    score, kl = fmean(measure.score for measure in found), fmean(measure.kl for measure in found)
    reason = ""
    if config.max_kl is not None and not kl <= config.max_kl:
        reason = f"its KL of {kl:.3g} nats per reply is above tune.max_kl {config.max_kl:g}"
    return trials.TrialRecord(
        label=trial.label,
        values=values,
        status="done",
        reason=reason,
        step=found[0].step,
        score=score,
        kl=None if math.isnan(kl) else kl,
        cost=used,
    )


def cost_of(trained: CellResult) -> trials.Cost:
    if trained.job is None or not (trained.job.spec.directory / "metrics.jsonl").exists():
        return trials.Cost()
    rows = read_metrics(trained.job.spec.directory / "metrics.jsonl")
    return cell_cost(trained.job, rows) if rows else trials.Cost()


def settle_cells(
    cells: Sequence[Cell], outcomes: Sequence[Outcome], board: ProgressBoard
) -> tuple[list[Cell], Mapping[str, CellResult]]:
    """The cells with what was picked, and by id the results of those of which nothing could be."""
    by_cell: dict[str, Outcome] = {}
    for outcome in outcomes:
        by_cell |= dict.fromkeys(outcome.tuning.cells, outcome)
    settled, lost = [], {}
    for cell in cells:
        assert cell.run is not None
        try:
            settled.append(by_cell[cell.id].settle(cell) if cell.id in by_cell else cell)
        except UserError as error:
            board.say(f"{cell.id}: failed: {error}")
            settled.append(cell)
            lost[cell.id] = CellResult(cell=cell, run=cell.run, job=None, points=(), failure=str(error))
    return settled, lost
