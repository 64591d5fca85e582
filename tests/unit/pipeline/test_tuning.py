"""Which trial is picked, what the others are told, and what becomes of the cells."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from io import StringIO
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from rayalign.comparison import tuning
from rayalign.comparison.record import CellResult
from rayalign.comparison.tuning import (
    Outcome,
    TrialResult,
    mean_over_prompts,
    pick_trial,
    settle_cells,
    trial_cells,
    trials_table,
)
from rayalign.config import Comparison, load_compare
from rayalign.config.compare import Cell
from rayalign.config.run import EvaluatedRun
from rayalign.config.scoring import EvaluateConfig, RuleScorerConfig
from rayalign.errors import Stopped
from rayalign.judge.evaluator import EvaluationSpec
from rayalign.judge.measure import Prompt
from rayalign.rollout.base import SamplingParams
from rayalign.run.display import ProgressBoard
from rayalign.run.stages import Stages

YAML = """\
base:
  model: {name: gpt2}
  data: {train: [pairs.jsonl]}
  optim: {steps: 10}
tune: {over: {optim.lr: [1, 2, 3]}, trials: 3, seeds: [7, 8], max_kl: 5}
grid: {method: [dpo], seed: [0, 1]}
"""
SPEC = EvaluationSpec(
    reference=None,  # type: ignore[arg-type]
    prompt_sets={"shop": (Prompt(ids=(1,), prompt="Why?"),) * 3},
    sampling=SamplingParams(),
    scorers=(RuleScorerConfig(function="lab.world:oracle"),),
)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    (tmp_path / "compare.yaml").write_text(YAML)
    return load_compare(tmp_path / "compare.yaml")


def outcome(comparison: Comparison, *numbers: tuple[float, float, str]) -> Outcome:
    """(score, KL, failure) of each run: three trials with two seeds."""
    (own,) = comparison.tuning
    cells = trial_cells(comparison)
    results = [CellResult(cell=cell, run=cell.run, job=None, points=(), failure="") for cell in cells if cell.run]
    measures = [
        TrialResult(trained=result, step=10, score=score, kl=kl, failure=failure)
        for result, (score, kl, failure) in zip(results, numbers, strict=True)
    ]
    assert comparison.tune is not None
    return pick_trial(own, [measures[index : index + 2] for index in (0, 2, 4)], comparison.tune, SPEC)


def test_the_highest_mean_over_the_tuning_seeds_is_picked(comparison: Comparison) -> None:
    found = outcome(comparison, (0.9, 1, ""), (0.1, 1, ""), (0.6, 2, ""), (0.6, 4, ""), (0.2, 1, ""), (0.2, 1, ""))
    assert found.picked is not None and found.picked == comparison.tuning[0].trials[1]
    assert [trial.score for trial in found.record.trials] == pytest.approx([0.5, 0.6, 0.2])
    assert found.record.choice is not None
    assert (found.record.choice.kl, found.record.choice.step, found.record.num_prompts) == (3.0, 10, 3)


def test_of_equal_trials_the_first_is_picked(comparison: Comparison) -> None:
    found = outcome(comparison, *[(0.5, 1.0, "")] * 6)
    assert found.record.picked == 0


def test_a_trial_that_drifts_or_fails_is_told_and_not_picked(comparison: Comparison) -> None:
    """5.5 nats on the mean of two seeds is above 5; one failed seed fails its trial."""
    broken = (math.nan, 1, "the loss became NaN")
    found = outcome(comparison, (0.9, 1, ""), (0.9, 10, ""), (0.8, 1, ""), broken, (0, 1, ""), (0, 9, ""))
    drifted, failed, picked = found.record.trials
    assert (drifted.status, drifted.reason) == ("done", "its KL of 5.5 nats per reply is above tune.max_kl 5")
    assert (failed.status, failed.reason, failed.score) == ("failed", "the loss became NaN", None)
    assert found.record.choice == picked and picked.kl == 5.0


def test_cells_whose_trials_all_failed_fail_with_every_reason(comparison: Comparison) -> None:
    found = outcome(comparison, *[(math.nan, 1.0, "no room")] * 4, *[(1.0, 6.0, "")] * 2)
    assert found.picked is None
    board = ProgressBoard(Console(file=StringIO()))
    cells, lost = settle_cells(comparison.cells, [found], board)
    assert [cell.id for cell in cells] == ["dpo__seed-0", "dpo__seed-1"] == list(lost)
    failure = lost["dpo__seed-1"].failure
    assert failure.startswith("none of its 3 trials can be picked: ")
    assert failure.count("no room") == 2 and "its KL of 6 nats per reply is above tune.max_kl 5" in failure


def test_cells_are_trained_with_what_was_picked_and_without_tuning_as_they_are(comparison: Comparison) -> None:
    found = outcome(comparison, *[(0.1, 1.0, "")] * 4, *[(0.2, 1.0, "")] * 2)
    board = ProgressBoard(Console(file=StringIO()))
    cells, lost = settle_cells(comparison.cells, [found], board)
    assert not lost and found.picked is not None
    assert [(cell.run.optim.lr, cell.run.seed) for cell in cells if cell.run] == [
        (found.picked.values["optim.lr"], 0),
        (found.picked.values["optim.lr"], 1),
    ]
    assert settle_cells(comparison.cells, [], board) == (list(comparison.cells), {})


def test_what_is_picked_later_is_trained_in_another_folder(comparison: Comparison) -> None:
    """With more trials another one may win; ids, by which reports name cells, stay."""
    board = ProgressBoard(Console(file=StringIO()))
    found = [
        settle_cells(comparison.cells, [outcome(comparison, *[(score, 1.0, "") for score in scores])], board)[0]
        for scores in ((0.3, 0.3, 0.2, 0.2, 0.1, 0.1), (0.1, 0.1, 0.2, 0.2, 0.1, 0.1))
    ]
    first, second = (trial.values["optim.lr"] for trial in comparison.tuning[0].trials[:2])
    assert [[cell.folder for cell in cells] for cells in found] == [
        [f"dpo__seed-{seed}__optim.lr-{value}" for seed in (0, 1)] for value in (first, second)
    ]
    assert [[cell.id for cell in cells] for cells in found] == [["dpo__seed-0", "dpo__seed-1"]] * 2
    assert [cell.folder for cell in comparison.cells] == ["dpo__seed-0", "dpo__seed-1"]


def test_trials_are_listed_before_anything_starts(comparison: Comparison) -> None:
    text = StringIO()
    Console(file=text, width=200).print(trials_table(comparison))
    for words in ("optim.lr=1", "optim.lr=2", "optim.lr=3", "7, 8"):
        assert words in text.getvalue()
    ids = [cell.id for cell in trial_cells(comparison)]
    assert len(set(ids)) == 6 and all(name.startswith("dpo/optim.lr-") for name in ids)


def test_a_mean_is_over_prompts_that_have_a_value() -> None:
    assert mean_over_prompts(((1.0, 3.0), (None, None), (None, 5.0))) == 3.5
    assert math.isnan(mean_over_prompts(((None,),)))


def test_a_stop_while_a_trial_is_measured_ends_the_training_of_the_others(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def train(cells: Sequence[Cell]) -> Generator[CellResult]:
        try:
            for cell in cells:
                assert cell.run is not None
                yield CellResult(cell=cell, run=cell.run, job=None, points=(), failure="")
        finally:
            events.append("training ended")

    def measured(*arguments: object) -> TrialResult:
        raise Stopped("stopped")

    monkeypatch.setattr(tuning, "selecting_spec", lambda *arguments: SPEC)
    monkeypatch.setattr(tuning, "measure_trial", measured)
    board, stages = ProgressBoard(Console(file=StringIO())), cast(Stages, None)
    evaluated = EvaluatedRun(run=comparison.trial_runs[0], evaluate=EvaluateConfig())
    assert comparison.tune is not None
    with pytest.raises(Stopped):
        tuning.tune(comparison, comparison.tune, evaluated, stages, train, board)
    assert events == ["training ended"]
