"""What runs have used by the rows that they wrote, and what becomes of cells when that is too much."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from rayalign.comparison.budget import Budget, Ending, limit_reached
from rayalign.comparison.cells import measure_cell, stopped_cell, train_cell
from rayalign.comparison.compare import refuse_unfinished
from rayalign.comparison.evaluate import Evaluation
from rayalign.comparison.record import CellResult, cell_status
from rayalign.config.budget import BudgetConfig
from rayalign.config.compare import Cell
from rayalign.config.run import RunConfig
from rayalign.errors import Stopped, UserError
from rayalign.run.display import ProgressBoard
from rayalign.runtime.trainer import Trainer
from rayalign.runtime.worker import TrainJob
from rayalign.stop import StopRequest
from rayalign.storage.manifest import commit

RUN = RunConfig.model_validate(
    {
        "model": {"name": "m"},
        "data": {"train": ["t.jsonl"]},
        "method": "dpo",
        "optim": {"steps": 100},
        "evaluate": {"every": 20, "prompts": "p.jsonl", "scorers": [{"name": "rule", "function": "a:b"}]},
    }
)


def write_rows(directory: Path, *rows: tuple[int, float, int]) -> None:
    """Rows of (step, seconds, tokens so far)."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"step": step, "seconds": seconds, "num_tokens": tokens, "workers": 1})
        for step, seconds, tokens in rows
    ]
    with (directory / "metrics.jsonl").open("a") as file:
        file.writelines(line + "\n" for line in lines)


def test_the_first_limit_that_is_reached_counts() -> None:
    used = {"device_hours": 1.25, "seconds": 900.0, "tokens_trained": 12_000}
    assert limit_reached(BudgetConfig(device_hours=1.5, seconds=901, tokens_trained=12_001), used) == ""
    assert limit_reached(BudgetConfig(tokens_trained=12_000), used) == "tokens_trained: 12,000 of 12,000"
    assert limit_reached(BudgetConfig(seconds=600, tokens_trained=5), used) == "seconds: 900 of 600.0"
    assert limit_reached(BudgetConfig(device_hours=1), used) == "device_hours: 1.250 of 1.0"


def test_use_is_summed_over_runs_from_their_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "one", (1, 2.0, 100), (2, 3.0, 200))  # before this attempt
    budget = Budget(BudgetConfig(tokens_trained=1000), read_every=0)
    budget.add(tmp_path / "one", 4)
    budget.add(tmp_path / "two", 2)
    assert not budget.asked
    write_rows(tmp_path / "two", (1, 7.0, 500))
    assert not budget.asked
    assert budget.used() == {"device_hours": (5 * 4 + 7 * 2) / 3600, "seconds": 12.0, "tokens_trained": 700}
    write_rows(tmp_path / "two", (2, 7.0, 800))
    assert budget.asked and budget.exceeded == "tokens_trained: 1,000 of 1,000"


def test_a_step_that_is_trained_again_counts_once(tmp_path: Path) -> None:
    write_rows(tmp_path, (1, 2.0, 100), (2, 2.0, 200), (3, 2.0, 300))
    budget = Budget(BudgetConfig(seconds=6.5), read_every=0)
    budget.add(tmp_path, 1)
    assert not budget.asked
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:1]
    (tmp_path / "cut.jsonl").write_text("\n".join(kept) + "\n")
    (tmp_path / "cut.jsonl").rename(tmp_path / "metrics.jsonl")  # as a restart cuts back to its checkpoint
    write_rows(tmp_path, (2, 2.0, 200), (3, 2.25, 300))
    assert not budget.asked
    assert budget.used()["seconds"] == 6.25
    write_rows(tmp_path, (4, 0.25, 400))
    assert budget.asked


def test_without_a_budget_nothing_ends(tmp_path: Path) -> None:
    budget = Budget(None)
    budget.add(tmp_path, 1)
    write_rows(tmp_path, (1, 1e9, 10**12))
    assert not budget.asked and not budget.meters


def board() -> ProgressBoard:
    return ProgressBoard(Console(file=StringIO()))


def cell(directory: Path, identity: str = "dpo") -> CellResult:
    spec = SimpleNamespace(directory=directory, steps=100, identity={})
    job = cast(TrainJob, SimpleNamespace(spec=spec, run=identity))
    found = Cell(id=identity, label=identity, coordinates={}, run=RUN)
    return CellResult(cell=found, run=RUN, job=job, points=(), failure="")


def checkpoint(directory: Path, step: int) -> Path:
    folder = directory / "checkpoints" / f"step_{step:06d}-a0123abcd"
    folder.mkdir(parents=True)
    commit(folder, {"step": step})
    return folder


def test_where_a_cell_was_is_said(tmp_path: Path) -> None:
    assert stopped_cell(cell(tmp_path), board()).stopped == "not started: budget"
    checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 33)
    assert stopped_cell(cell(tmp_path), board()).stopped == "stopped at step 33 of 100: budget"


class Asked(Trainer):
    """A trainer that was asked to stop before this cell."""

    def fit(self, job: TrainJob, lost: object = None) -> Path:
        raise AssertionError("no cell begins once the budget is used up")


def test_once_the_budget_is_used_up_no_cell_begins(tmp_path: Path) -> None:
    ending = Ending(StopRequest(), Budget(BudgetConfig(seconds=1), exceeded="seconds: 2 of 1"))
    assert train_cell(cell(tmp_path), Asked(), board(), ending).stopped == "not started: budget"
    with pytest.raises(Stopped):
        Trainer(stop=ending).attempt(cast(TrainJob, None))


def test_a_stopped_cell_is_measured_as_far_as_it_came(tmp_path: Path) -> None:
    for step in (20, 33):
        checkpoint(tmp_path, step)
    measured: list[str] = []

    class Measures:
        def points(self, where: Path, directory: Path) -> Any:
            measured.append(where.name)
            return (where.name,)

    found = measure_cell(stopped_cell(cell(tmp_path), board()), cast(Evaluation, Measures()), board())
    assert measured == ["step_000020-a0123abcd", "step_000033-a0123abcd"]
    assert cell_status(found) == "stopped"
    unbegun = measure_cell(stopped_cell(cell(tmp_path / "other"), board()), cast(Evaluation, Measures()), board())
    assert len(measured) == 2 and cell_status(unbegun) == "skipped"


def test_the_command_ends_with_what_is_missing_and_how_to_go_on(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a", 33)
    results = [stopped_cell(cell(tmp_path / name, name), board()) for name in ("a", "b")]
    budget = Budget(BudgetConfig(seconds=60), exceeded="seconds: 61 of 60")
    with pytest.raises(UserError) as error:
        refuse_unfinished(results, budget)
    assert str(error.value) == (
        "the budget is used up (seconds: 61 of 60): a stopped at step 33 of 100; b not started. Raise it and start the "
        "same command again: every cell resumes from where it is"
    )
    refuse_unfinished([cell(tmp_path)], budget)  # all were done when it was reached
