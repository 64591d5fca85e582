"""A grid becomes cells: which, called what, with what in them, and which are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayalign.config import Comparison, ConfigError, load_compare, load_run, started_from
from rayalign.config.grid import SECTIONS
from rayalign.methods import METHODS, resolve

BASE = """\
base:
  storage_path: results
  model: {name: gpt2, dtype: float32}
  data: {train: [pairs.jsonl]}
  method: {name: dpo, beta: 0.3, label_smoothing: 0.1}
  optim: {steps: 100, lr: 1.0e-5}
"""


def load(tmp_path: Path, text: str, *overrides: str, base: str = BASE) -> Comparison:
    path = tmp_path / "compare.yaml"
    path.write_text(base + text)
    return load_compare(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str, base: str = BASE) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides, base=base)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_cells_are_the_product_of_the_axes(tmp_path: Path) -> None:
    text = """\
name: quick
grid:
  method: [dpo, {name: exo_pref, label_smoothing: 0.1, optim: {lr: 1.0e-4}}]
  seed: [0, 1]
"""
    comparison = load(tmp_path, text)
    assert (comparison.name, comparison.storage_path, comparison.initial) == ("quick", "results", None)
    assert [(cell.id, cell.label, dict(cell.coordinates)) for cell in comparison.cells] == [
        ("dpo__seed-0", "dpo, seed=0", {"method": "dpo", "seed": "seed=0"}),
        ("dpo__seed-1", "dpo, seed=1", {"method": "dpo", "seed": "seed=1"}),
        (
            "exo_pref-label_smoothing-0.1__seed-0",
            "exo_pref label_smoothing=0.1, seed=0",
            {"method": "exo_pref label_smoothing=0.1", "seed": "seed=0"},
        ),
        (
            "exo_pref-label_smoothing-0.1__seed-1",
            "exo_pref label_smoothing=0.1, seed=1",
            {"method": "exo_pref label_smoothing=0.1", "seed": "seed=1"},
        ),
    ]
    dpo, _, _, exo = [cell.run for cell in comparison.cells]
    assert dpo is not None and exo is not None
    assert (dpo.name, dpo.storage_path, dpo.data.train[0].path) == (
        "quick.dpo__seed-0",
        "results",
        f"{tmp_path}/pairs.jsonl",
    )
    assert dpo.method.config == resolve("dpo").config(beta=0.3, label_smoothing=0.1)
    assert (exo.optim.lr, exo.optim.steps, exo.seed, dpo.optim.lr) == (1e-4, 100, 1, 1e-5)


def test_a_block_that_is_named_anew_keeps_what_still_holds_and_any_other_is_merged(tmp_path: Path) -> None:
    text = """\
grid:
  method:
    - {beta: 0.5}
    - {name: ipo, tau: 0.5}
    - {as: other model, model: {name: other}}
"""
    merged, replaced, moved = [cell.run for cell in load(tmp_path, text).cells]
    assert merged is not None and replaced is not None and moved is not None
    assert merged.method.config.model_dump(exclude={"logit_temperature"}) == {"beta": 0.5, "label_smoothing": 0.1}
    assert replaced.method.config == resolve("ipo").config(tau=0.5)
    assert (moved.model.name, moved.model.dtype, moved.method.config) == (
        "other",
        "float32",
        resolve("dpo").config(beta=0.3, label_smoothing=0.1),
    )


CARRIED = """\
  data_policy: {name: on_policy, refresh_every: 2, lag: 1, passes: 1}
  rollout: {engine: hf}
  scorer: {name: rule, function: "m:f", arguments: {k: 1}}
  label: {name: wpo, threshold: 3}
  strategy: {name: fsdp2, workers: 4, cpu_offload: true, timeout_seconds: 50}
"""


def test_settings_of_the_base_hold_for_entries_that_mean_the_same_by_them(tmp_path: Path) -> None:
    """β is one thing to DPO, WPO, KTO and hinge, another to SimPO, and nothing to IPO."""
    text = "grid:\n  method: [dpo, wpo, kto, hinge, simpo, ipo, {name: wpo, beta: 0.01, alignment: none}]\n"
    comparison = load(tmp_path, text)
    configs = [cell.run.method.config.model_dump() for cell in comparison.cells if cell.run is not None]
    assert [config.get("beta") for config in configs] == [0.3, 0.3, 0.3, 0.3, 2.0, None, 0.01]
    assert [config.get("label_smoothing") for config in configs] == [0.1, 0.1, None, None, 0.0, None, 0.1]
    assert configs[-1]["alignment"] == "none"
    assert list(comparison.notes) == [
        "base.method.beta: 0.3 holds for dpo, wpo, kto, hinge; not for simpo, whose beta is another setting; "
        "ipo, which has none",
        "base.method.label_smoothing: 0.1 holds for dpo, wpo; not for kto, which has none; hinge, which has none; "
        "simpo, whose label_smoothing is another setting; ipo, which has none",
    ]
    assert load(tmp_path, "grid: {method: [dpo, wpo]}\n").notes == ()


def test_so_do_those_of_every_other_named_block_but_a_scorer(tmp_path: Path) -> None:
    text = """\
grid:
  data_policy: [hybrid, off_policy]
  label: [best_worst, {name: wpo, gap: 2}, {name: bradley_terry, relabel: false}]
  strategy: [ddp, fsdp2, single]
  scorer: [{name: rule, function: "m:g"}]
"""
    runs = [cell.run for cell in load(tmp_path, text, base=BASE + CARRIED).cells if cell.run is not None]
    hybrid = next(run for run in runs if run.data_policy.name == "hybrid")
    assert (hybrid.data_policy.refresh_every, hybrid.data_policy.lag) == (2, 1)
    rules = {run.label.name: run.label for run in runs if run.label is not None}
    assert (rules["wpo"].threshold, rules["wpo"].gap, rules["best_worst"].threshold) == (3, 2, 5)
    strategies = {run.strategy.name: run.strategy for run in runs}
    assert [strategies[name].workers for name in ("ddp", "fsdp2", "single")] == [4, 4, "auto"]
    assert [strategies[name].cpu_offload for name in ("ddp", "fsdp2")] == [False, True]
    assert {run.strategy.timeout_seconds for run in runs} == {50}
    assert {str(run.scorer.arguments) for run in runs if run.scorer is not None} == {"{}"}


def test_so_they_do_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: m}\ndata: {train: t.jsonl}\nmethod: {name: dpo, beta: 0.3}\n")
    assert load_run(path, ["method=wpo"]).method.config == resolve("wpo").config(beta=0.3)
    assert load_run(path, ["method={name: wpo, beta: 0.2}"]).method.config == resolve("wpo").config(beta=0.2)
    assert load_run(path, ["method=simpo"]).method.config == resolve("simpo").config()


def test_axes_may_be_dotted_null_and_lists(tmp_path: Path) -> None:
    text = """\
grid:
  optim.lr: [1e-6, 1.0e-5]
  weighting: [null, {name: wpo, clamp: each}]
  data.train: [[a.jsonl, b.jsonl], c.jsonl]
"""
    cells = load(tmp_path, text).cells
    assert [cell.id for cell in cells] == [
        f"lr-{lr}__{weighting}__train-{train}"
        for lr in ("1e-6", "1e-05")
        for weighting in ("no-weighting", "wpo-clamp-each")
        for train in ("a.jsonl-b.jsonl", "c.jsonl")
    ]
    last = cells[-1].run
    assert last is not None and last.weighting is not None
    assert (last.optim.lr, last.weighting.clamp, len(last.data.train)) == (1e-5, "each", 1)


def test_a_filter_is_an_axis_or_an_entrys_and_tells_cells_apart(tmp_path: Path) -> None:
    text = "grid: {method: [dpo, ipo], filter: [null, {policy_logp_quantile: 0.7}]}\n"
    cells = load(tmp_path, text).cells
    assert [(cell.id, cell.run.display_name) for cell in cells if cell.run is not None] == [
        ("dpo__no-filter", "dpo"),
        ("dpo__policy_logp_quantile-0.7", "dpo + filter 0.7"),
        ("ipo__no-filter", "ipo"),
        ("ipo__policy_logp_quantile-0.7", "ipo + filter 0.7"),
    ]
    entries = """\
grid:
  method:
    - dpo
    - {name: dpo, filter: {policy_logp_quantile: 0.7}}
    - {name: dpo, filter: {policy_logp_quantile: 0.9}}
    - {name: dpo, filter: {policy_logp_quantile: 0.7}, as: likely}
"""
    cells = load(tmp_path, entries).cells
    assert [(cell.id, cell.label, cell.run.display_name) for cell in cells if cell.run is not None] == [
        ("dpo", "dpo", "dpo"),
        ("dpo-filter-0.7", "dpo + filter 0.7", "dpo + filter 0.7"),
        ("dpo-filter-0.9", "dpo + filter 0.9", "dpo + filter 0.9"),
        ("likely", "likely", "dpo + filter 0.7"),
    ]
    assert [cell.run.filter for cell in cells[:1] if cell.run is not None] == [None]


def test_a_filter_of_the_base_is_left_out_of_cells_that_only_draw(tmp_path: Path) -> None:
    base = BASE + "  filter: {policy_logp_quantile: 0.7}\n"
    base += "  rollout: {engine: hf, samples: 2}\n  scorer: {name: rule, function: 'm:f'}\n"
    stored, fresh, both = load(tmp_path, "grid: {data_policy: [off_policy, on_policy, hybrid]}\n", base=base).cells
    names = [cell.run.display_name for cell in (stored, fresh, both) if cell.run is not None]
    assert names == ["dpo + filter 0.7", "dpo", "dpo + filter 0.7"]
    skipped = "grid: {data_policy: [off_policy, on_policy], filter: [{policy_logp_quantile: 0.5}]}\n"
    cells = load(tmp_path, skipped, base=base).cells
    assert [cell.skipped_reason.partition(":")[0] for cell in cells] == ["", "filter"]
    assert refusal(tmp_path, "grid: {data_policy: [on_policy]}\n", base=base) == [
        "compare.yaml:7: filter: is used by no cell; remove it"
    ]


def test_illegal_cells_are_skipped_with_the_reason(tmp_path: Path) -> None:
    text = "grid: {method: [dpo, sft, mpo], weighting: [null, wpo]}\n"
    cells = {cell.id: cell for cell in load(tmp_path, text).cells}
    assert [name for name, cell in cells.items() if cell.run is None] == [
        "sft__wpo",
        "mpo__no-weighting",
        "mpo__wpo",
    ]
    assert cells["sft__wpo"].skipped_reason == (
        "weighting: WPO weighs preference pairs or KTO's examples, and method 'sft' learns from neither"
    )
    assert cells["mpo__no-weighting"].skipped_reason.startswith("auxiliary: mpo's protection against drift")
    assert cells["dpo__wpo"].skipped_reason == ""


def test_mpo_without_auxiliary_data_is_called_so_whatever_its_name(tmp_path: Path) -> None:
    text = "grid: {method: [{name: mpo, auxiliary: []}, {name: mpo, as: ours, auxiliary: []}]}\n"
    assert [(cell.id, cell.label) for cell in load(tmp_path, text).cells] == [
        ("mpo", "mpo (no KL)"),
        ("ours", "ours (no KL)"),
    ]


def test_blocks_for_rollouts_go_only_to_cells_that_draw(tmp_path: Path) -> None:
    shared = BASE + "  rollout: {samples: 4}\n  scorer: {name: rule, function: 'm:f'}\n  label: best_worst\n"
    off, on, relabelled = [
        cell.run
        for cell in load(
            tmp_path,
            "grid: {data_policy: [off_policy, on_policy, {as: again, name: off_policy, label: {relabel: true}}]}\n",
            base=shared,
        ).cells
    ]
    assert off is not None and on is not None and relabelled is not None
    assert (off.rollout, off.scorer, off.label) == (None, None, None)
    assert on.rollout is not None and on.rollout.samples == 4 and on.scorer is not None
    assert relabelled.rollout is None and relabelled.scorer is not None and relabelled.label is not None
    assert refusal(tmp_path, "grid: {seed: [0]}\n", base=shared) == [
        "compare.yaml:7: rollout: is used by no cell; remove it",
        "compare.yaml:9: label: is used by no cell; remove it",
        "compare.yaml:8: scorer: is used by no cell; remove it",
    ]


def test_an_initial_run_is_shared_by_every_cell(tmp_path: Path) -> None:
    base = "base:\n  storage_path: results\n  model: {dtype: float32}\n  data: {train: [pairs.jsonl]}\n"
    initial = "initial: {model: {name: ./tiny, from_scratch: true}, data: {train: sft.jsonl}, method: sft}\n"
    comparison = load(tmp_path, initial + "name: quick\ngrid: {method: [dpo, ipo]}\n", base=base)
    assert comparison.initial is not None
    assert (comparison.initial.name, comparison.initial.storage_path) == ("quick.initial", "results")
    assert (comparison.initial.model.name, comparison.initial.seed) == (f"{tmp_path}/tiny", 0)
    run = comparison.cells[0].run
    assert run is not None and run.model.name == "(initial)"
    started = started_from(run, "/somewhere/final")
    assert (started.model.name, started.model.dtype, started.method) == ("/somewhere/final", "float32", run.method)
    named = base.replace("{dtype: float32}", "{name: gpt2}")
    assert refusal(tmp_path, initial + "grid: {seed: [0, 1]}\n", base=named) == [
        "compare.yaml:3: model.name: is the initial run's final model; remove it"
    ]


def test_a_base_in_its_own_file_resolves_beside_it(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "dpo.yaml").write_text("model: {name: gpt2}\ndata: {train: p.jsonl}\nmethod: dpo\n")
    text = "base: runs/dpo.yaml\ngrid: {seed: [3]}\n"
    run = load(tmp_path, text, "base.optim.steps=7", "grid.seed=[4]", base="").cells[0].run
    assert run is not None
    assert (run.data.train[0].path, run.optim.steps, run.seed) == (f"{tmp_path}/runs/p.jsonl", 7, 4)
    (tmp_path / "runs" / "dpo.yaml").write_text("model: {name: gpt2}\ndata: {trian: p.jsonl}\nmethod: dpo\n")
    assert refusal(tmp_path, text, base="") == [
        "runs/dpo.yaml:2: data.train: missing; say what to train on: train: [pairs.jsonl]",
        "runs/dpo.yaml:2: data.trian: unknown key; did you mean data.train?",
    ]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "grid:\n  method:\n    - dpo\n    - {name: ipo, tua: 1}\n",
            ["compare.yaml:10: method.tua: unknown key of ipo; did you mean method.tau?"],
        ),
        (
            "grid:\n  data_policy:\n    - {name: off_policy, as: off}\n    - {name: off_policy, as: 'off'}\n",
            ["compare.yaml:9: grid.data_policy[0]: as: YAML reads on, off, yes, no and null as values; "
             "write the name in quotes"],
        ),
        (
            "grid: {method: [dpo, dpo]}\n",
            ["compare.yaml:7: grid.method[1]: two entries are called 'dpo'; remove one, "
             "or give it another name with as: …"],
        ),
        (
            "grid: {method: [{optim: {lr: 1}}]}\n",
            ["compare.yaml:7: grid.method[0]: has no name; give it one with as: …"],
        ),
        (
            "grid: {seed.low: [1]}\n",
            ["compare.yaml:7: seed.low: seed is 5, which has no keys; override it as a whole"],
        ),
        ("grid: {seed: 3}\n", ["compare.yaml:7: grid.seed: 3 is not a list"]),
        ("grid: {seed: []}\n", ["compare.yaml:7: grid.seed: is empty; name at least one"]),
        ("grid: {beta: [1]}\n", ["compare.yaml:7: grid.beta: is no setting of a run; did you mean method.beta?"]),
        ("grid: {seeds: [1]}\n", ["compare.yaml:7: grid.seeds: is no setting of a run; did you mean seed?"]),
        ("gird: {seed: [1]}\n", ["compare.yaml: grid: missing; say what is compared: grid: {method: [dpo, exo_pref]}",
                                 "compare.yaml:7: gird: unknown key; did you mean grid?"]),
        (
            "grid: {method: [sft], weighting: [wpo]}\n",
            ["compare.yaml: grid: no cell can be run",
             "compare.yaml: cell sft__wpo: skipped, because weighting: WPO weighs preference pairs or KTO's examples, "
             "and method 'sft' learns from neither"],
        ),
    ],
)  # fmt: skip
def test_a_malformed_grid_is_refused(tmp_path: Path, text: str, messages: list[str]) -> None:
    assert refusal(tmp_path, text, "base.seed=5") == messages


@pytest.mark.parametrize(
    ("base", "messages"),
    [
        ("base: {}\n", ["model: missing", "data: missing", "method: missing"]),
        ("base: null\n", ["compare.yaml:1: base: nothing is given where a block of keys is expected"]),
        ("base: 3\n", ["compare.yaml:1: base: 3 is given where a block of keys is expected"]),
        ("base: none.yaml\n", ["none.yaml: cannot be read: No such file or directory"]),
    ],
)
def test_a_base_that_is_no_run_is_refused(tmp_path: Path, base: str, messages: list[str]) -> None:
    found = refusal(tmp_path, "grid: {optim.lr: [1]}\n", base=base)
    assert len(found) == len(messages)
    assert all(message in line for message, line in zip(messages, found, strict=True))


def test_an_unknown_axis_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (message,) = refusal(tmp_path, "grid: {flavours: [dpo]}\n")
    assert message.startswith("compare.yaml:7: grid.flavours: is no setting of a run; an axis is in one of auxiliary, ")


def test_run_and_comparison_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(BASE + "grid: {seed: [0]}\n")
    with pytest.raises(ConfigError, match=f"^{path}: is a comparison; start it with: rayalign compare {path}$"):
        load_run(path)
    path.write_text("model: {name: gpt2}\nmethod: dpo\n")
    with pytest.raises(ConfigError, match=f"^{path}: is a single run; start it with: rayalign train {path}$"):
        load_compare(path)


def test_no_methods_parameter_is_called_like_a_section() -> None:
    parameters = {key for name in METHODS for key in resolve(name).config.model_fields}
    assert parameters & (SECTIONS | {"as", "name"}) == set()


def test_a_comparison_is_not_called_after_the_stages_folder(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text("name: artifacts\nbase: {model: {name: m}, data: {train: t.jsonl}}\ngrid: {method: [dpo]}\n")
    with pytest.raises(ConfigError, match="compare.yaml:1: name: artifacts is the folder of the stages"):
        load_compare(path)


def test_a_reward_model_is_no_cell(tmp_path: Path) -> None:
    """Whether or not its evaluation could be sampled: a comparison samples what it has trained."""
    reason = "method: reward_model trains no policy, and a comparison samples what it has trained"
    dpo, reward = load(tmp_path, "grid: {method: [dpo, reward_model]}\n").cells
    assert dpo.run is not None and reward.run is None
    assert reward.skipped_reason is not None and reward.skipped_reason.startswith(reason)
    sampled = BASE + "  evaluate: {prompts: p.jsonl, scorers: [{name: rule, function: 'm:f'}]}\n"
    reward = load(tmp_path, "grid: {method: [dpo, reward_model]}\n", base=sampled).cells[1]
    assert reward.skipped_reason is not None and "reward_model trains no policy" in reward.skipped_reason
    messages = refusal(tmp_path, "grid: {method: [reward_model]}\n")
    assert "no cell can be run" in messages[0] and "reward_model trains no policy" in messages[1]
    initial = "initial: {model: {name: gpt2}, data: {train: [pairs.jsonl]}, method: reward_model}\n"
    (message,) = refusal(tmp_path, "grid: {method: [dpo, ipo]}\n" + initial)
    assert "initial.method: reward_model trains no policy" in message
