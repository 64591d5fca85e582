"""``tune`` becomes trials: how many, of which settings, and what a configuration does not try."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayalign.config import Comparison, ConfigError, load_compare
from rayalign.config.grid import slug
from rayalign.config.tune import Tuning

BASE = """\
base:
  storage_path: results
  model: {name: gpt2, dtype: float32}
  data: {train: [pairs.jsonl]}
  method: {name: dpo, beta: 0.3}
  optim: {steps: 100, lr: 1.0e-5}
"""
GRID = "grid: {method: [dpo, ipo], seed: [0, 1]}\n"


def load(tmp_path: Path, tune: str, grid: str = GRID) -> Comparison:
    path = tmp_path / "compare.yaml"
    path.write_text(f"{BASE}tune: {tune}\n{grid}")
    return load_compare(path)


def tunings(tmp_path: Path, tune: str, grid: str = GRID) -> dict[str, Tuning]:
    return {tuning.id: tuning for tuning in load(tmp_path, tune, grid).tuning}


def test_every_configuration_has_the_same_number_of_different_trials_on_other_seeds(tmp_path: Path) -> None:
    over = "{over: {optim.lr: [1.0e-6, 3.0e-6, 1.0e-5], optim.weight_decay: [0, 0.1]}, trials: 4, seeds: [7, 8]}"
    found = tunings(tmp_path, over)
    assert {name: tuning.cells for name, tuning in found.items()} == {
        "dpo": ("dpo__seed-0", "dpo__seed-1"),
        "ipo": ("ipo__seed-0", "ipo__seed-1"),
    }
    dpo, ipo = found.values()
    labels = [trial.label for trial in dpo.trials]
    assert len(set(labels)) == 4 and [trial.label for trial in ipo.trials] == labels
    for trial in dpo.trials:
        assert [run.seed for run in trial.runs] == [7, 8]
        assert {(run.optim.lr, run.optim.weight_decay) for run in trial.runs} == {
            (trial.values["optim.lr"], trial.values["optim.weight_decay"])
        }
        assert trial.runs[0].method.name == "dpo" and trial.runs[0].optim.steps == 100
    assert len(load(tmp_path, over).trial_runs) == 16


def test_more_trials_begin_with_those_of_fewer_and_another_draw_is_another(tmp_path: Path) -> None:
    over = "{{over: {{optim.lr: [1, 2, 3, 4, 5, 6]}}, trials: {}, sample_seed: {}}}"
    few, more, other = (
        [trial.label for trial in tunings(tmp_path, over.format(*given))["dpo"].trials]
        for given in ((2, 0), (5, 0), (5, 1))
    )
    assert more[:2] == few and other != more


def test_fewer_combinations_than_trials_are_all_tried(tmp_path: Path) -> None:
    dpo = tunings(tmp_path, "{over: {optim.lr: [1.0e-6, 3.0e-6]}, trials: 6}")["dpo"]
    assert sorted(trial.label for trial in dpo.trials) == ["optim.lr=1e-06", "optim.lr=3e-06"]
    assert dpo.asked == 6


def test_what_the_grid_sets_stays_and_what_a_method_lacks_is_left_out(tmp_path: Path) -> None:
    grid = """\
grid:
  method:
    - dpo
    - {name: simpo, optim: {lr: 2.0e-6}}
    - ipo
    - {name: dpo, beta: 0.7, optim: {lr: 1.0e-4}, as: mine}
"""
    found = tunings(tmp_path, "{over: {optim.lr: [1.0e-6, 3.0e-6], method.beta: [0.05, 0.1]}, trials: 9}", grid)
    assert [len(found[name].trials) for name in ("dpo", "simpo", "ipo", "mine")] == [4, 2, 2, 0]
    assert {trial.runs[0].optim.lr for trial in found["simpo"].trials} == {2e-6}
    assert {trial.runs[0].method.config.model_dump()["beta"] for trial in found["simpo"].trials} == {0.05, 0.1}
    reasons = {name: [(left.what, left.reason) for left in tuning.left_out] for name, tuning in found.items()}
    entry = "the grid's entry sets it"
    assert reasons == {
        "dpo": [],
        "simpo": [("optim.lr", entry)],
        "ipo": [("method.beta", "ipo has no beta")],
        "mine": [("optim.lr", entry), ("method.beta", entry)],
    }


def test_a_combination_that_is_no_run_is_left_out_with_its_reason(tmp_path: Path) -> None:
    """EXO needs a label smoothing above 0, DPO does not; a skipped cell has nothing to tune."""
    over = "{over: {method.label_smoothing: [0.0, 0.1]}}"
    found = tunings(tmp_path, over, "grid: {method: [dpo, exo_pref, mpo]}\n")
    assert set(found) == {"dpo", "exo_pref"}
    assert [trial.label for trial in found["exo_pref"].trials] == ["method.label_smoothing=0.1"]
    (left,) = found["exo_pref"].left_out
    assert left.what == "method.label_smoothing=0.0" and "must be positive" in left.reason


def test_a_block_that_an_entry_takes_away_is_not_put_back(tmp_path: Path) -> None:
    grid = "grid: {method: [dpo], filter: [null, {policy_logp_quantile: 0.5}], weighting: [null, wpo]}\n"
    found = tunings(tmp_path, "{over: {weighting.clamp: [each, product]}}", grid)
    assert {name: len(tuning.trials) for name, tuning in found.items()} == {
        "dpo__no-filter__no-weighting": 0,
        "dpo__no-filter__wpo": 2,
        "dpo__policy_logp_quantile-0.5__no-weighting": 0,
        "dpo__policy_logp_quantile-0.5__wpo": 2,
    }
    with pytest.raises(ConfigError, match=r"filter.policy_logp_quantile: is set by every entry of the grid"):
        load(tmp_path, "{over: {filter.policy_logp_quantile: [0.7]}}", grid)


def test_what_is_picked_keeps_the_cells_own_seed_and_name(tmp_path: Path) -> None:
    comparison = load(tmp_path, "{over: {optim.lr: [1.0e-6]}}")
    run = comparison.cells[1].run
    assert run is not None
    settled = comparison.tuning[0].trials[0].settled(run)
    assert (settled.seed, settled.name, settled.optim.lr) == (1, "comparison.dpo__seed-1", 1e-6)
    assert settled == run.model_copy(update={"optim": settled.optim})


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ("{over: {optim.lr: [1]}, seeds: [1, 5]}", "tune.seeds: 1 is a seed of the grid"),
        ("{over: {optim.lr: [1]}, seeds: [5, 5]}", "two tuning seeds are the same"),
        ("{over: {optim.lrr: [1]}}", "tune.over.optim.lrr: optim.lrr: unknown key; did you mean optim.lr?"),
        ("{over: {method.bta: [1]}}", "tune.over.method.bta: dpo has no bta"),
        ("{over: {optim.lr: [1.0e-5, -1]}}", "tune.over.optim.lr[1]: -1 goes with no configuration: optim.lr"),
        ("{over: {evaluate.every: [1]}}", "tune.over.evaluate.every: cannot be tuned; a setting is in one of"),
        ("{over: {seed: [5]}}", "tune.over.seed: cannot be tuned"),
        ("{over: {lr: [5]}}", "tune.over.lr: cannot be tuned; did you mean optim.lr?"),
        ("{over: {method: [{name: dpo}]}}", "tune.over.method: a value is a block; tune one setting at a time"),
        ("{over: {optim.lr: 3}}", "tune.over.optim.lr: 3 is not a list"),
        ("{over: {optim.lr: [1]}, on: report}", "tune.on"),
        ("{over: {optim.lr: [1]}, trails: 3}", "tune.trails: unknown key; did you mean tune.trials?"),
    ],
)
def test_a_malformed_tuning_is_refused(tmp_path: Path, tune: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, tune)
    assert message in str(caught.value)


def test_a_setting_that_every_entry_sets_and_too_many_combinations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune.over.optim.lr: is set by every entry of the grid"):
        load(tmp_path, "{over: {optim.lr: [1]}}", "grid: {optim.lr: [1.0e-5, 1.0e-6]}\n")
    many = ", ".join(map(str, range(1, 102)))
    with pytest.raises(ConfigError, match="10,201 combinations, more than 10,000; write fewer values"):
        load(tmp_path, f"{{over: {{optim.lr: [{many}], optim.steps: [{many}]}}}}")


def test_names_of_folders_keep_signs_and_exponents() -> None:
    labels = ("margin=-1", "margin=1", "margin=1e-3", "margin=-.5", "dpo -2", "own_method-2", "a__b")
    assert [slug(label) for label in labels] == [
        "margin-minus1",
        "margin-1",
        "margin-1e-3",
        "margin-minus.5",
        "dpo-minus2",
        "own_method-2",
        "a_b",
    ]
