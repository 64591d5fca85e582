"""The plan of a comparison: stages by key before any is made, and what a run will use; no Ray, nothing written."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tiny_runs import save_tiny

from rayalign.comparison.compare import compare
from rayalign.comparison.forecast import estimate_step_time, read_pilot
from rayalign.comparison.plan import Plan, Planned, plan, stage_state
from rayalign.config import load_compare, load_run
from rayalign.config.dump import dump
from rayalign.config.errors import ConfigError
from rayalign.data.chat import make_chat
from rayalign.data.shard import write_shard
from rayalign.data.store import TokenStore, commit_store
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.data.tokenize_rows import Unit, read_chunks, shape_group
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.errors import UserError
from rayalign.placement import Node
from rayalign.run.stages import Stages
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import Artifacts
from rayalign.storage.lease import lease
from rayalign.storage.manifest import commit

SESSION = Session(started_here=True, nodes=(Node(id="", name="", cpus=2, gpus=0),))
BASE = {
    "model": {"name": "tiny"},
    "data": {"train": ["pairs.jsonl"], "max_prompt_tokens": 64, "max_tokens": 128},
    "method": {"name": "dpo"},
    "optim": {"steps": 5, "groups_per_step": 2},
    "evaluate": {
        "prompts": [{"function": "rewards.py:prompts", "name": "made"}],
        "scorers": [{"name": "rule", "function": "rewards.py:length"}],
        "sampling": {"samples": 1, "max_new_tokens": 4},
    },
    "track": [],
}
DRAWS = {
    "rollout": {"engine": "hf", "samples": 3, "max_new_tokens": 8},
    "scorer": {"name": "rule", "function": "rewards.py:length"},
}
SFT = {"model": {"name": "tiny"}, "data": {"train": ["pairs.jsonl"]}, "method": "sft", "optim": {"steps": 3}}
PAIRS = [("Why?", "So.", "No."), ("Who?", "We.", "You, I think."), ("When?", "Now.", "Later.")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_tiny(tmp_path / "tiny")
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(
        "def length(prompt, reply):\n    return len(reply)\n\n\ndef prompts():\n    yield {'prompt': 'Why?'}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    return tmp_path


def write(folder: Path, **parts: object) -> Path:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({"name": "planned", "base": BASE} | parts))
    return path


def planned(folder: Path, *, fresh: frozenset[str] = frozenset(), **parts: object) -> Planned:
    comparison = load_compare(write(folder, **parts))
    evaluated = next(cell.run.evaluated for cell in comparison.cells if cell.run is not None)
    assert evaluated is not None
    return plan(comparison, evaluated, Plan(root=folder / "runs" / "artifacts", fresh=fresh), SESSION)


def users(found: Planned) -> list[tuple[str, list[str]]]:
    return sorted((stage.name, list(names)) for stage, names in found.stages.items())


def make_tokens(folder: Path, **parts: object) -> TokenStore:
    """The token store of the first cell, without Ray."""
    comparison = load_compare(write(folder, **parts))
    run = comparison.cells[0].run
    assert run is not None

    def build(directory: Path) -> None:
        chat = make_chat(load_tokenizer(Path(run.model.name)), template=run.data.template, stop=run.data.end)
        [rows] = read_chunks(Unit(path=str(folder / "pairs.jsonl")))
        groups = [
            group
            for outcome in rows_to_groups(rows, chat, run.data)
            if isinstance(outcome, Tokenized)
            for group in shape_group(outcome.group, "pair")
        ]
        commit_store(directory, [write_shard(directory, "0000000000", groups)], meta={})

    class Makes:
        asked: list[Path] = []
        note = staticmethod(lambda line: None)

        def stage(self, name: str, inputs: object, ignored: object) -> Path:
            return Artifacts(root=folder / "runs" / "artifacts", note=self.note).stage(name, inputs, build)  # type: ignore[arg-type]

        def pending(self, directory: Path) -> str:
            return ""

    return TokenStore.open(Stages(artifacts=Makes(), session=SESSION).tokens(run.data.train[0], run, "pair"))


def test_cells_share_stages_before_any_is_made(folder: Path) -> None:
    grid = {
        "method": [
            "dpo",
            "ipo",
            "simpo",
            "kto",
            {"name": "dpo", "beta": 0.5, "filter": {"policy_logp_quantile": 0.5}, "as": "few"},
        ]
    }
    found = planned(folder, grid=grid)
    pairs, labelled = ["dpo", "ipo", "simpo", "few"], ["kto"]
    assert users(found) == sorted(
        [
            ("tokens", pairs),
            ("reference", ["dpo", "ipo", "few"]),
            ("filter", ["few"]),
            ("tokens", labelled),
            ("mismatched", labelled),
            ("reference", labelled),
            ("rows", ["evaluation"]),
        ]
    )
    unknown = {stage.name for stage in found.stages if stage.waits_for}
    assert unknown == {"reference", "filter", "mismatched"}
    assert not (folder / "runs").exists()


def test_what_is_made_before_makes_more_keys_known(folder: Path) -> None:
    grid = {"method": ["dpo", "simpo"]}
    before = {stage.name: stage for stage in planned(folder, grid=grid).stages}
    store = make_tokens(folder, grid=grid)
    found = planned(folder, grid=grid)
    after = {stage.name: stage for stage in found.stages}
    assert after["tokens"].directory == before["tokens"].directory
    assert (before["tokens"].made, after["tokens"].made) == (False, True)
    assert before["reference"].waits_for == (before["tokens"].directory.name,)
    assert after["reference"].waits_for == () and not after["reference"].made
    assert stage_state(after["reference"], found, frozenset()) == "to make"
    with lease(after["reference"].directory):
        assert stage_state(after["reference"], found, frozenset()).startswith("in progress: process ")
    assert stage_state(after["reference"], found, frozenset()) == "begun, to resume"
    # simpo has no reference, so all of it is there: five steps of two of the three pairs, in the plan's order
    dpo, simpo = found.runs
    assert dpo.job is None and simpo.job is not None
    assert simpo.job.spec.steps == 5
    assert len(store) == 3
    again = planned(folder, grid=grid, fresh=frozenset({"tokens"}))
    states = {stage.name: stage_state(stage, again, frozenset({"tokens"})) for stage in again.stages}
    assert states["tokens"] == "to make again (--fresh)"
    assert states["reference"].startswith("to make; its key depends on tokens-")


def test_tokens_are_exact_where_the_stores_are_there(folder: Path) -> None:
    grid = {"method": ["simpo"]}
    store = make_tokens(folder, grid=grid)
    printed = shown(folder, grid=grid)
    # 10 draws of 3 rows: each thrice, and the tenth is the first of the fourth epoch
    lengths = [store.lengths(row).packed for row in range(3)]
    [total] = [word for word in printed.split() if word.isdigit() and int(word) >= 3 * sum(lengths)]
    assert int(total) - 3 * sum(lengths) in lengths
    assert "2 stages for 1 cells, 0 of them shared, 1 cached" in printed


def shown(folder: Path, *overrides: str, pilot: Path | None = None, **parts: object) -> str:
    path, text = write(folder, **parts), StringIO()
    console = Console(file=text, width=250)
    compare(path, overrides, dry_run=True, fresh=frozenset(), console=console, pilot=pilot)
    return text.getvalue()


def refused_plan(folder: Path, **parts: object) -> str:
    """What is printed of a plan that ends in an error."""
    path, text = write(folder, **parts), StringIO()
    with pytest.raises(UserError, match="1 of . runs would fail; the reasons are above"):
        compare(path, (), dry_run=True, fresh=frozenset(), console=Console(file=text, width=80))
    return text.getvalue()


def test_what_is_drawn_has_a_bound_and_what_is_unknown_is_said(folder: Path) -> None:
    grid = {
        "data_policy": [
            "off_policy",
            {"name": "on_policy", "refresh_every": 2, "as": "on"},
            {"name": "on_policy", "refresh_every": "never", "as": "once"},
        ]
    }
    printed = shown(folder, base=BASE | DRAWS, grid=grid)
    lines = [line.split() for line in printed.splitlines() if "to train" in line]
    cells = {words[0]: words[-3:] for words in lines}
    assert cells["off_policy"] == ["5", "?", "0"]
    # 5 steps of 2 prompts, 3 samples of at most 8 tokens
    assert cells["on"] == ["5", "~", "240"]
    assert cells["once"] == ["5", "?", "?"]
    assert "?: known once the data are prepared" in printed and "~: depends on what is drawn" in printed
    assert not (folder / "runs").exists()


def test_before_the_initial_run_nothing_of_its_model_has_a_key(folder: Path) -> None:
    base = {**BASE, "model": {}}
    found = planned(folder, base=base, initial=SFT, grid={"method": ["dpo", "simpo"]})
    waits = {(stage.name, tuple(names)): stage.waits_for for stage, names in found.stages.items()}
    [tokens] = [stage for stage, names in found.stages.items() if stage.name == "tokens" and "dpo" in names]
    assert waits[("tokens", ("initial",))] == ()
    assert waits[("tokens", ("dpo", "simpo"))] == ("initial",)
    assert waits[("reference", ("dpo",))] == (tokens.directory.name, "initial")
    assert "its key depends on the initial run" in shown(folder, base=base, initial=SFT, grid={"method": ["dpo"]})


def test_what_would_fail_is_said_with_its_reason(folder: Path) -> None:
    grid = {"data.train": [["pairs.jsonl"], ["absent*.jsonl"]]}
    assert "will fail, because no file matches" in refused_plan(folder, grid=grid)
    with pytest.raises(UserError, match="--fresh tokens2: there is no such stage"):
        compare(write(folder, grid=grid), [], dry_run=True, fresh=frozenset({"tokens2"}), console=Console())


def test_of_cells_that_tune_settles_nothing_is_said_to_be_there_or_to_fail(folder: Path) -> None:
    """What was picked before may be another configuration than the one that is planned, and may be picked again."""
    grid = {"method": ["simpo"]}
    make_tokens(folder, grid=grid)
    final = folder / "runs" / "planned" / "cells" / "simpo" / "final"
    final.mkdir(parents=True)
    commit(final, {"identity": {"optim": "another"}})
    assert "will fail" in refused_plan(folder, grid=grid)
    printed = shown(folder, grid=grid, tune={"over": {"optim.lr": [1e-5, 1e-6]}, "trials": 2, "seeds": [7, 8]})
    assert "will fail" not in printed and "tuned: with the values that tune picks" in printed
    assert "tune: its 4 runs are counted neither in stages nor in tokens and hours" in printed


def pilot_run(
    folder: Path, name: str, seconds: list[float], *settings: str, workers: int = 1, threads: int = 1
) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(BASE))
    directory = folder / "pilot" / name
    directory.mkdir(parents=True)
    facts = {
        "configuration": dump(load_run(folder / "run.yaml", settings)),
        "workers": workers,
        "threads_per_worker": threads,
    }
    (directory / "run.json").write_text(json.dumps(facts))
    rows = [{"step": step, "seconds": value} for step, value in enumerate(seconds, start=1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_pilot_says_how_long_a_step_takes(folder: Path) -> None:
    pilot_run(folder, "near", [9.0, 2.0, 2.0, 4.0])
    pilot_run(folder, "far", [100.0], "optim.groups_per_step=64")
    pilot_run(folder, "other-shape", [50.0], "method=sft")
    pilots = read_pilot(folder / "pilot")
    run = load_run(folder / "run.yaml")
    found = estimate_step_time(run, pilots, workers=1, threads=1)
    assert found is not None
    assert (found.seconds_per_step, found.differences) == (3.0, ())  # the median of 2, 2, 4 and 9
    slower = load_run(folder / "run.yaml", ["optim.groups_per_step=32"])
    found = estimate_step_time(slower, pilots, workers=2, threads=1)
    assert found is not None
    assert found.differences == (
        "optim.groups_per_step: 64 → 32",
        "workers: 1 → 2",
        "optim.groups_per_step: 2 → 32",
    )
    assert estimate_step_time(load_run(folder / "run.yaml", ["method=kto"]), pilots, workers=1, threads=1) is None


def test_time_and_money_are_steps_times_the_pilots_seconds(folder: Path) -> None:
    pilot_run(folder, "a", [7200.0, 7200.0, 3600.0])
    parts = {"grid": {"method": ["dpo", "ipo", "kto"]}, "prices": {"device_hour": 2.5, "currency": "USD"}}
    printed = shown(folder, "base.optim.steps=3", pilot=folder / "pilot", **parts)
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    # two cells of one core each at the same time, and the evaluator: 3 processes on 2 cores have one thread each
    assert ["dpo", "7.2e+03", "3", "6.00", "6.00", "15.00"] in rows
    assert ["ipo", "7.2e+03", "3", "6.00", "6.00", "15.00"] in rows
    assert ["kto", "no such run in the pilot", "", "", "", ""] in rows
    assert ["all but 1", "", "", "", "12.00", "30.00"] in rows
    assert "USD" in printed
    assert "--pilot with the folder" in shown(folder, **parts)
    without = shown(folder, pilot=folder / "pilot", grid={"method": ["dpo"]})
    assert "write prices: {device_hour: …}" in without


def test_a_pilot_without_a_run_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="--pilot .*empty: there is no run with metrics"):
        read_pilot(folder / "empty")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"prices": {"device_hour": -1}}, "prices.device_hour"),
        ({"prices": {}}, "prices.device_hour"),
        ({"budget": {}}, "a budget names device_hours, seconds or tokens_trained"),
        ({"budget": {"tokens": 5}}, "budget.tokens"),
    ],
)
def test_prices_and_budgets_are_checked(folder: Path, parts: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_compare(write(folder, grid={"method": ["dpo"]}, **parts))
