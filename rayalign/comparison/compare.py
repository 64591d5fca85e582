"""``rayalign compare``: every cell of a grid trained, measured on the same prompts, and reported together."""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from rayalign.comparison.budget import Budget, Ending
from rayalign.comparison.cells import measure_cell, prepare_cell, train_cells
from rayalign.comparison.dry_run import dry_run as show_plan
from rayalign.comparison.evaluate import Evaluation, refuse_broken_scorers
from rayalign.comparison.plan import cells_at_once, processes_at_once
from rayalign.comparison.record import CellResult, comparison_record
from rayalign.comparison.tuning import Outcome, settle_cells, trial_cells, trials_table, tune
from rayalign.config.compare import Cell, Comparison, load_compare, started_from
from rayalign.config.dump import redacted_setting
from rayalign.config.run import EvaluatedRun
from rayalign.errors import Stopped, UserError
from rayalign.report.points import ComparisonRecord, save_comparison
from rayalign.report.render import render_report
from rayalign.report.tables import narrow_table
from rayalign.run.display import ProgressBoard
from rayalign.run.job import make_job
from rayalign.run.readers import refuse_unusable_models
from rayalign.run.resolve import resolve_run
from rayalign.run.stages import Stages
from rayalign.run.train import import_folder, refuse_unsupported, run_job
from rayalign.runtime.gauges import Gauges
from rayalign.runtime.session import connect
from rayalign.runtime.trainer import Trainer
from rayalign.runtime.worker import TrainJob
from rayalign.stop import stopping
from rayalign.storage.artifacts import Artifacts
from rayalign.storage.lease import lease
from rayalign.storage.place import Place

MEASURED_BY = ("prompts", "scorers", "diagnostics", "judge", "max_missing_fraction", "sampling", "baseline")
"""Settings of ``evaluate`` that all cells share."""
MEASURED_WITH = (
    ("model", "name"),
    ("model", "revision"),
    ("model", "reference"),
    ("model", "dtype"),
    ("model", "from_scratch"),
    ("model", "text_only"),
    ("model", "save_dtype"),
    ("reference", "dtype"),
    ("data", "template"),
    ("data", "stop"),
    ("data", "max_prompt_tokens"),
)
"""Settings of a run that decide what its replies and its KL are measured on."""


def compare(
    path: Path,
    overrides: Sequence[str],
    *,
    dry_run: bool,
    fresh: frozenset[str],
    console: Console,
    pilot: Path | None = None,
) -> None:
    """Train every legal cell, measure all of them, and write ``report/`` below the comparison's folder.

    With ``dry_run`` only say what that would take, by the speed of ``pilot`` where one is named.
    """
    folder = import_folder(path)
    sys.path.insert(0, str(folder))
    comparison = load_compare(path, overrides)
    evaluated = checked_evaluation(comparison)
    announce(comparison, console)
    if dry_run:
        return show_plan(comparison, evaluated, fresh=fresh, pilot=pilot, console=console)
    console.print(cells_table(comparison))
    started = datetime.datetime.now(datetime.UTC)
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(connect(import_paths=[folder]))
        storage = session.storage(comparison.storage_path)
        directory = storage / comparison.name
        stack.enter_context(lease(directory))
        board = stack.enter_context(ProgressBoard(console, Gauges().set))
        session.vital.stop = stop = stack.enter_context(stopping())
        ending = Ending(stop, Budget(comparison.budget))
        artifacts = Artifacts(root=storage / "artifacts", fresh=fresh, note=board.say)
        stages = Stages(artifacts=artifacts, session=session)
        model = initial_model(comparison, directory, stages, board, ending)
        cells = runnable(comparison)
        parallel = cells_at_once(cells, session)
        processes = processes_at_once(cells, session)

        def train_trials(trials: Sequence[Cell]) -> Generator[CellResult]:
            folder = directory / "tuning"
            ready = [prepare_cell(cell, model, folder, stages, processes, board) for cell in trials]
            count_usage(ready, ending.budget)
            with train_cells(ready, parallel, board, ending) as trained:
                yield from (whole_trial(cell.result(), ending.budget) for cell in trained)

        measured = replace(evaluated, run=started_from(evaluated.run, model)) if model else evaluated
        outcomes: tuple[Outcome, ...] = ()
        if comparison.tune is not None:
            outcomes = tune(comparison, comparison.tune, measured, stages, train_trials, board)
        cells, lost = settle_cells(cells, outcomes, board)
        ready = [lost.get(cell.id) or prepare_cell(cell, model, directory, stages, processes, board) for cell in cells]
        jobs = count_usage(ready, ending.budget)
        if not jobs:
            raise UserError(f"no cell can be trained; {ready[0].cell.id}: {ready[0].failure}")
        board.say(f"{len(jobs)} cells, {parallel} at a time")
        trained = stack.enter_context(train_cells(ready, parallel, board, ending))
        evaluation = Evaluation.start(measured, stages, share=jobs[0].share, actors=1)
        stack.callback(evaluation.close)
        reference, baseline = evaluation.points(None, directory), evaluation.baseline(directory)
        results = [measure_cell(cell.result(), evaluation, board) for cell in trained]
        record = comparison_record(
            comparison,
            evaluation,
            reference,
            baseline,
            results,
            tuning=[outcome.record for outcome in outcomes],
            started=started,
            command=["rayalign", "compare", str(path), *map(redacted_setting, overrides)],
        )
        board.say(f"report: {saved_report(record, directory)}")
        if not any(result.failure or result.stopped for result in results):
            session.vital.settle()
    refuse_unfinished(results, ending.budget)


def runnable(comparison: Comparison) -> list[Cell]:
    """The cells that are not skipped."""
    return [cell for cell in comparison.cells if cell.run is not None]


def checked_evaluation(comparison: Comparison) -> EvaluatedRun:
    """A run whose evaluation is every cell's and every trial's.

    Raises:
        UserError: something of the comparison cannot run here, or cells are measured in different ways.
    """
    refuse_unusable_runs(comparison)
    evaluated = common_evaluation(replace(comparison, cells=(*comparison.cells, *trial_cells(comparison))))
    refuse_broken_scorers(evaluated.evaluate)
    return evaluated


def saved_report(record: ComparisonRecord, directory: Place) -> Place:
    """Write ``comparison.json`` and the report; the page's path."""
    save_comparison(record, directory)
    return render_report(record, directory)


def announce(comparison: Comparison, console: Console) -> None:
    """Print the notes of the configuration, and the trials of ``tune``."""
    for note in comparison.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if comparison.tuning:
        console.print(trials_table(comparison))


def refuse_unusable_runs(comparison: Comparison) -> None:
    """Raise UserError for a setting or a model that this machine cannot run."""
    runs = [comparison.initial] if comparison.initial is not None else []
    runs += [cell.run for cell in comparison.cells if cell.run is not None]
    for run in (*runs, *comparison.trial_runs):
        refuse_unsupported(run)
        refuse_unusable_models(run)


def refuse_unfinished(results: Sequence[CellResult], budget: Budget) -> None:
    """Raise UserError that names the cells that failed, and those that the budget did not let end."""
    failed = [result.cell.id for result in results if result.failure]
    stopped = [f"{result.cell.id} {result.stopped.removesuffix(': budget')}" for result in results if result.stopped]
    reasons = []
    if failed:
        reasons.append(f"{len(failed)} of {len(results)} cells failed, see the report: {', '.join(failed)}")
    if stopped:
        reasons.append(
            f"the budget is used up ({budget.exceeded}): {'; '.join(stopped)}. Raise it and start the same command "
            "again: every cell resumes from where it is"
        )
    if reasons:
        raise UserError("\n".join(reasons))


def common_evaluation(comparison: Comparison) -> EvaluatedRun:
    """A run whose evaluation is every cell's; cells that are measured differently cannot be compared."""
    runs = [cell.run for cell in comparison.cells if cell.run is not None]
    first = runs[0]
    if first.evaluate is None or not first.evaluate.scorers:
        raise UserError("base.evaluate: a comparison needs prompts and at least one scorer")
    for run in runs:
        same = run.evaluate is not None and all(
            getattr(run.evaluate, field) == getattr(first.evaluate, field) for field in MEASURED_BY
        )
        if not same:
            raise UserError(f"{run.name}: evaluate differs from {first.name}'s; only `every` and `at` may")
        for block, field in MEASURED_WITH:
            mine, theirs = getattr(getattr(run, block), field), getattr(getattr(first, block), field)
            if mine != theirs:
                raise UserError(
                    f"{run.name}: {block}.{field} is {mine}, and {first.name}'s is {theirs}: one comparison measures "
                    "all cells with one tokenizer, on the same prompt tokens and against one reference"
                )
        if run.model.from_scratch and run.seed != first.seed:
            raise UserError(
                f"{run.name}: model.from_scratch draws another reference for every seed; train it once as `initial`"
            )
    # Cells that draw nothing are sampled by the engine of those that do.
    drawing = next((run for run in runs if run.rollout is not None), first)
    return EvaluatedRun(run=first.model_copy(update={"rollout": drawing.rollout}), evaluate=first.evaluate)


def cells_table(comparison: Comparison) -> Group:
    """The grid before anything starts: what runs, and what is skipped because of what."""
    lines: list[list[str]] = []
    skipped: list[Text] = []
    for cell in comparison.cells:
        run = cell.run
        if run is None:
            lines.append([cell.id, "", "", "", "skipped"])
            skipped.append(Text(f"{cell.id} is skipped, because {cell.skipped_reason}"))
        else:
            lines.append([cell.id, run.display_name, run.data_policy.name, str(run.seed), ""])
    title = f"{comparison.name}: {len(comparison.cells)} cells"
    return Group(narrow_table(("cell", "objective", "data policy", "seed", "state"), lines, title=title), *skipped)


def initial_model(
    comparison: Comparison, directory: Place, stages: Stages, board: ProgressBoard, ending: Ending
) -> str | None:
    """Train ``initial`` once for all cells; its final model's folder.

    Raises:
        UserError: the budget was used up before its last step.
    """
    if comparison.initial is None:
        return None
    processes = resolve_run(comparison.initial, stages.session).processes
    job = make_job(comparison.initial, directory / "initial", stages, processes=processes, label="initial")
    ending.budget.add(job.spec.directory, job.share.devices)
    with Trainer(stop=ending) as trainer:
        try:
            return str(run_job(comparison.initial, job, trainer, board))
        except Stopped as stopped:
            if not ending.by_budget:
                raise
            raise UserError(
                f"the budget is used up ({ending.budget.exceeded}), and no cell has begun: {stopped}. Raise it and "
                "start the same command again: the initial run resumes from there"
            ) from stopped


def count_usage(ready: Sequence[CellResult], budget: Budget) -> list[TrainJob]:
    """The jobs of what is ready; what they use is counted from here on."""
    jobs = [item.job for item in ready if item.job is not None]
    for job in jobs:
        budget.add(job.spec.directory, job.share.devices)
    return jobs


def whole_trial(result: CellResult, budget: Budget) -> CellResult:
    """Raise UserError where the budget ended a trial: half of one tells nothing."""
    if result.stopped:
        raise UserError(
            f"the budget is used up ({budget.exceeded}) by the trials of tune, and no cell has begun: {result.cell.id} "
            f"{result.stopped}. Raise it and start the same command again"
        )
    return result
