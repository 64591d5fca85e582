"""Cells of a comparison are independent: what one of them cannot do stops none of the others."""

from __future__ import annotations

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from rayalign.comparison import cells
from rayalign.comparison.budget import Budget, Ending
from rayalign.comparison.compare import refuse_unfinished, whole_trial
from rayalign.comparison.evaluate import Evaluation
from rayalign.comparison.record import CellResult
from rayalign.config.budget import BudgetConfig
from rayalign.config.compare import Cell
from rayalign.config.run import RunConfig
from rayalign.errors import Stopped, UserError
from rayalign.run.display import ProgressBoard
from rayalign.runtime.worker import TrainJob
from rayalign.stop import StopRequest
from rayalign.storage.manifest import commit

RUN = RunConfig.model_validate(
    {
        "model": {"name": "m"},
        "data": {"train": ["t.jsonl"]},
        "method": "dpo",
        "optim": {"steps": 4},
        "evaluate": {"prompts": "p.jsonl", "scorers": [{"name": "rule", "function": "a:b"}]},
    }
)
NAMES = ("first", "unprepared", "breaks", "unmeasured", "last")


def ready(folder: Path, name: str) -> CellResult:
    spec = SimpleNamespace(directory=folder / name, steps=4, identity={})
    job = cast(TrainJob, SimpleNamespace(spec=spec, run=name))
    found = Cell(id=name, label=name, coordinates={}, run=RUN)
    if name == "unprepared":
        return CellResult(cell=found, run=RUN, job=None, points=(), failure="no such file")
    return CellResult(cell=found, run=RUN, job=job, points=(), failure="")


@pytest.mark.parametrize("parallel", [1, 2])
def test_one_failed_cell_does_not_lose_the_others(
    parallel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_job(run: RunConfig, job: TrainJob, trainer: Any, board: ProgressBoard) -> Path:
        if job.run == "breaks":
            raise UserError("step 3: loss nan")
        checkpoint = job.spec.directory / "checkpoints" / "step_000004-aabc"
        checkpoint.mkdir(parents=True)
        commit(checkpoint, {"step": 4})
        return job.spec.directory / "final"

    class Measures:
        def points(self, checkpoint: Path, directory: Path) -> Any:
            if directory.name == "unmeasured":
                raise UserError("the judge gave no answer")
            return (f"points of {directory.name}",)

    monkeypatch.setattr(cells, "run_job", run_job)
    board, evaluation = ProgressBoard(Console(file=StringIO())), cast(Evaluation, Measures())
    prepared = [ready(tmp_path, name) for name in NAMES]
    with cells.train_cells(prepared, parallel, board, Ending(StopRequest(), Budget(None))) as trained:
        results = [cells.measure_cell(cell.result(), evaluation, board) for cell in trained]
    assert [result.cell.id for result in results] == list(NAMES)
    assert [result.failure for result in results] == [
        "",
        "no such file",
        "step 3: loss nan",
        "the judge gave no answer",
        "",
    ]
    assert [result.points for result in results] == [(("points of first",),), (), (), (), (("points of last",),)]
    with pytest.raises(UserError, match="3 of 5 cells failed, see the report: unprepared, breaks, unmeasured"):
        refuse_unfinished(results, Budget(None))


@pytest.mark.parametrize("by", ["signal", "budget"])
def test_trials_that_train_are_saved_before_the_others_are_given_up(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first trial is over; the second ends its step only once somebody waits for it."""
    begun, waited = threading.Event(), threading.Event()
    saved: list[str] = []

    class Waits(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            if wait:
                waited.set()
            super().shutdown(wait, cancel_futures=cancel_futures)

    def run_job(run: RunConfig, job: TrainJob, trainer: Any, board: ProgressBoard) -> Path:
        if job.run == "first":
            assert begun.wait(60)
            if by == "budget":
                ending.budget.exceeded = "seconds: 2 of 1"
                raise Stopped("stopped after step 1 of 4")
            return job.spec.directory
        begun.set()
        assert waited.wait(60)
        saved.append(job.run)
        raise Stopped("stopped after step 2 of 4")

    def trials() -> Generator[CellResult]:
        items = [ready(tmp_path, name) for name in ("first", "second")]
        with cells.train_cells(items, 2, ProgressBoard(Console(file=StringIO())), ending) as trained:
            yield from (whole_trial(cell.result(), ending.budget) for cell in trained)

    monkeypatch.setattr(cells, "ThreadPoolExecutor", Waits)
    monkeypatch.setattr(cells, "run_job", run_job)
    ending = Ending(StopRequest(), Budget(BudgetConfig(seconds=1), read_every=1e9, read_at=1e18))
    found = trials()
    if by == "budget":
        with pytest.raises(UserError, match="used up .seconds: 2 of 1. by the trials of tune"):
            next(found)
    else:
        assert next(found).cell.id == "first"
        ending.signals.number = 15  # while the first trial is measured
        found.close()
    assert saved == ["second"]
