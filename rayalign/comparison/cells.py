"""The cells of a comparison: made ready, trained several at a time, and measured as they come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import Queue

from rayalign.comparison.budget import Ending
from rayalign.comparison.evaluate import Evaluation, evaluated_checkpoints
from rayalign.comparison.record import CellResult
from rayalign.config.compare import Cell, started_from
from rayalign.errors import Stopped, UserError
from rayalign.run.display import ProgressBoard
from rayalign.run.job import evaluation_steps, make_job
from rayalign.run.stages import Stages
from rayalign.run.train import announce_run, is_finished_run, run_job
from rayalign.runtime.trainer import Trainer
from rayalign.storage.place import Place


def prepare_cell(
    cell: Cell, model: str | None, directory: Place, stages: Stages, processes: int, board: ProgressBoard
) -> CellResult:
    """The cell's job; stages that several cells share are made by the first.

    ``processes`` are all that run at the same time, the evaluator too: equal shares let workers stay for the next cell.
    """
    assert cell.run is not None
    run = started_from(cell.run, model) if model else cell.run
    unprepared = CellResult(cell=cell, run=run, job=None, points=(), failure="")
    try:
        job = make_job(run, directory / "cells" / cell.folder, stages, processes=processes, label=cell.id)
        if not is_finished_run(job):
            announce_run(run, job)
    except UserError as error:
        return failed_cell(unprepared, error, board)
    return replace(unprepared, job=job)


@contextlib.contextmanager
def train_cells(
    ready: Sequence[CellResult], parallel: int, board: ProgressBoard, ending: Ending
) -> Iterator[list[Future[CellResult]]]:
    """The trained cells as they come while the block measures those before: ``parallel`` train at the same time.

    Once the budget is used up, or somebody asks, cells that train end after their step and no other one begins.
    """
    pool = ThreadPoolExecutor(parallel)
    idle: Queue[Trainer] = Queue()
    for _ in range(parallel):
        idle.put(Trainer(stop=ending))

    def train_next(item: CellResult) -> CellResult:
        trainer = idle.get()
        try:
            return train_cell(item, trainer, board, ending)
        finally:
            idle.put(trainer)

    try:
        yield [pool.submit(train_next, item) for item in ready]
        pool.shutdown()
        while not idle.empty():
            idle.get().end()
    except (Stopped, UserError, GeneratorExit):
        if ending.asked:
            pool.shutdown(cancel_futures=True)  # those that train end their step and save it
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C cells that still train are not waited for


def train_cell(ready: CellResult, trainer: Trainer, board: ProgressBoard, ending: Ending) -> CellResult:
    """Train one cell; its failure does not stop the others."""
    if ready.job is None:
        return ready
    try:
        if ending.by_budget and not is_finished_run(ready.job):
            return stopped_cell(ready, board)
        run_job(ready.run, ready.job, trainer, board)
    except UserError as error:
        return failed_cell(ready, error, board)
    except Stopped:
        if not ending.by_budget:
            raise
        return stopped_cell(ready, board)
    return ready


def measure_cell(trained: CellResult, evaluation: Evaluation, board: ProgressBoard) -> CellResult:
    """Measure the checkpoints of a trained cell, or of one that was stopped as far as it came."""
    if trained.failure or trained.job is None:
        return trained
    directory = trained.job.spec.directory
    checkpoints = evaluated_checkpoints(directory)
    steps = evaluation_steps(trained.run, trained.job.spec.steps)
    if trained.stopped:
        steps = tuple(sorted({*steps, max(checkpoints, default=0)} & checkpoints.keys()))
    try:
        points = tuple(evaluation.points(checkpoints[step], directory) for step in steps)
    except UserError as error:
        return failed_cell(trained, error, board)
    if steps:
        board.say(f"{trained.cell.id}: measured at steps {', '.join(map(str, steps))}")
    return replace(trained, points=points)


def failed_cell(cell: CellResult, error: UserError, board: ProgressBoard) -> CellResult:
    board.say(f"{cell.cell.id}: failed: {error}")
    return replace(cell, failure=str(error))


def stopped_cell(cell: CellResult, board: ProgressBoard) -> CellResult:
    """A cell that the budget ended, or did not let begin."""
    assert cell.job is not None
    step = max(evaluated_checkpoints(cell.job.spec.directory), default=0)
    reached = f"stopped at step {step} of {cell.job.spec.steps}" if step else "not started"
    board.say(f"{cell.cell.id}: {reached}: budget")
    return replace(cell, stopped=f"{reached}: budget")
