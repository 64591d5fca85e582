"""Cells of a comparison are independent: what one of them cannot do stops none of the others."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from rayalign.config.compare import Cell
from rayalign.config.run import RunConfig
from rayalign.errors import UserError
from rayalign.manifest import commit
from rayalign.pipeline import cells
from rayalign.pipeline.budget import Budget, Ending
from rayalign.pipeline.compare import refuse_unfinished
from rayalign.pipeline.display import Board
from rayalign.pipeline.evaluate import Evaluation
from rayalign.pipeline.results import CellResult
from rayalign.runtime.stop import StopRequest
from rayalign.runtime.worker import TrainJob

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
    spec = SimpleNamespace(directory=folder / name, optimizer=SimpleNamespace(steps=4), identity={})
    job = cast(TrainJob, SimpleNamespace(spec=spec, run=name))
    found = Cell(id=name, label=name, coordinates={}, run=RUN)
    if name == "unprepared":
        return CellResult(cell=found, run=RUN, job=None, points=(), failure="no such file")
    return CellResult(cell=found, run=RUN, job=job, points=(), failure="")


@pytest.mark.parametrize("parallel", [1, 2])
def test_one_failed_cell_does_not_lose_the_others(
    parallel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_job(run: RunConfig, job: TrainJob, trainer: Any, board: Board) -> Path:
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
    board, evaluation = Board(Console(file=StringIO())), cast(Evaluation, Measures())
    prepared = [ready(tmp_path, name) for name in NAMES]
    with cells.training(prepared, parallel, board, Ending(StopRequest(), Budget(None))) as trained:
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
