"""The search for settings of reinforcement learning is even, its seeds are its own, and the gate reads means."""

from __future__ import annotations

from collections import Counter

import pytest
from lab.measure import REFERENCE, cell_runs, comparison_of, quickstart, with_seed
from lab.results import NotMeasured, Point, Results
from lab.rl import METHODS, REINFORCEMENT, SEEDS, STEP, TRIALS, TUNING_SEEDS, Gate, Means, chosen, means, trial_runs

CELLS = cell_runs(comparison_of(REINFORCEMENT))


def point(seed: int, cell: str, step: int, *, oracle: float, audit2: float, kl: float) -> Point:
    rest = {"no_valid_opening": 0.0, "grammatical": 1.0, "right_thing": 1.0, "tokens": 40.0, "ended": 1.0}
    return Point(seed=seed, cell=cell, step=step, family="shop", oracle=oracle, audit2=audit2, kl=kl, **rest)


def test_every_method_has_as_many_trials() -> None:
    assert Counter(trial.method for trial in TRIALS) == dict.fromkeys(METHODS, 4)
    assert len(trial_runs(CELLS)) == len(TRIALS)


def test_seeds_that_report_have_chosen_nothing() -> None:
    """0 to 4 made the world, 10 to 14 decide the claims."""
    assert not set(SEEDS) & {*TUNING_SEEDS, *range(5), *range(10, 15)}


def test_every_cell_and_trial_calls_the_oracle_as_often() -> None:
    runs = [*CELLS.values(), *trial_runs(CELLS).values()]
    calls = {run.optim.steps * run.optim.groups_per_step * run.rollout.samples for run in runs}
    assert calls == {50 * 16 * 4}
    assert {STEP in run.evaluate.at for run in runs} == {True}


def test_a_trial_changes_what_it_names() -> None:
    for trial, run in zip(TRIALS, trial_runs(CELLS).values(), strict=True):
        assert (run.method.name, run.optim.lr, run.method.config.kl_coef) == (trial.method, trial.lr, trial.kl_coef)
        cell = CELLS[trial.method]
        assert run.evaluate.at == (STEP,)
        assert run.model_copy(update={name: getattr(cell, name) for name in ("method", "optim", "evaluate")}) == cell


def test_the_yaml_has_settings_that_were_searched() -> None:
    searched = {(trial.method, trial.lr, trial.kl_coef) for trial in TRIALS}
    assert {(name, CELLS[name].optim.lr, CELLS[name].method.config.kl_coef) for name in METHODS} < searched


def test_controls_differ_from_rloo_in_one_thing() -> None:
    rloo = CELLS["rloo"]
    for lag in (1, 4):
        late = CELLS[f"rloo lag {lag}"]
        assert late.data_policy.lag == lag
        assert late.model_copy(update={"name": rloo.name, "data_policy": rloo.data_policy}) == rloo
    free = CELLS["rloo without KL"]
    assert free.method.config == rloo.method.config.model_copy(update={"kl_coef": 0.0})
    assert free.model_copy(update={"name": rloo.name, "method": rloo.method}) == rloo


def test_both_comparisons_begin_at_the_same_model() -> None:
    ours, theirs = comparison_of(REINFORCEMENT).initial, quickstart().initial
    assert with_seed(ours, 3).model_copy(update={"name": theirs.name}) == with_seed(theirs, 3)


def test_means_over_seeds_by_hand() -> None:
    measured = Results(
        points=(
            point(1, REFERENCE, 0, oracle=0.5, audit2=0.5, kl=0.0),
            point(1, "rloo", STEP, oracle=0.7, audit2=0.6, kl=2.0),
            point(2, REFERENCE, 0, oracle=0.5, audit2=0.4, kl=0.0),
            point(2, "rloo", STEP, oracle=0.9, audit2=0.6, kl=5.0),
        )
    )
    found = means(measured, "rloo")
    assert (found.oracle, found.kl, found.audit2_gain) == pytest.approx((0.8, 3.5, 0.15))
    with pytest.raises(NotMeasured):
        means(measured, "grpo")


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        (Means(oracle=0.77, kl=4.0, audit2_gain=0.05), True),
        (Means(oracle=0.76, kl=1.0, audit2_gain=0.3), False),
        (Means(oracle=0.95, kl=4.1, audit2_gain=0.3), False),
        (Means(oracle=0.95, kl=1.0, audit2_gain=0.04), False),
    ],
)
def test_a_gate_wants_all_three(found: Means, passed: bool) -> None:
    assert Gate(oracle=0.77, kl=4.0, audit2_gain=0.05).passed(found) is passed


def test_the_search_takes_the_highest_oracle_that_is_not_bought() -> None:
    first, second, third, fourth = (trial for trial in TRIALS if trial.method == "grpo")

    def results(*rows: tuple[float, float, float]) -> Results:
        cells = zip((first, second, third, fourth), rows, strict=True)
        trained = [point(1, t.label, STEP, oracle=o, audit2=a, kl=kl) for t, (o, a, kl) in cells]
        return Results(points=(point(1, REFERENCE, 0, oracle=0.5, audit2=0.5, kl=0.0), *trained))

    assert chosen(results((0.7, 0.6, 2.0), (0.8, 0.6, 2.0), (0.9, 0.6, 5.0), (0.9, 0.5, 2.0)), "grpo") == second
    assert chosen(results((0.7, 0.51, 2.0), (0.8, 0.4, 2.0), (0.9, 0.3, 5.0), (0.9, 0.5, 2.0)), "grpo") == first
