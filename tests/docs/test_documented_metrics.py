"""``docs/reference/metrics.md`` names every key of a row, and no key that no run writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import REPOSITORY
from tiny_rollouts import InProcess, OnPolicyRun
from tiny_runs import (
    Scenario,
    drawn,
    labelled,
    objective,
    run,
    save_tiny,
    source_maker,
    store,
    synthetic_groups,
    train_alone,
    train_spec,
)

from rayalign.data.rank import rank_group
from rayalign.engine.metrics import read_metrics
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.methods import METHODS, WPOWeighting, compose, resolve
from rayalign.rounds.plan import RoundPlan

PAGE = REPOSITORY / "docs" / "reference" / "metrics.md"
PLACEHOLDERS = {"<stream>": r"[\w.-]+", "<term>": r"\w+", "<key>": r".+"}


def documented() -> list[str]:
    """The keys in the first column of the page's tables."""
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return [key for row in rows for key in re.findall(r"`([^`]+)`", row)]


def pattern(key: str) -> re.Pattern[str]:
    parts = re.split(r"(<\w+>)", key)
    return re.compile("".join(PLACEHOLDERS.get(part, re.escape(part)) for part in parts))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model: Path) -> set[str]:
    """The keys of the rows of one step of every method, of a run with all extras, and of runs with rounds."""
    folder = tmp_path_factory.mktemp("metrics")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYALIGN_CACHE", str(folder / "cache"))
        rows = [row for name in METHODS for row in run(one_step(name, model, folder / name)).metrics]
        rows += [*stored_run(model, folder), *drawn_run("grpo", model, folder), *drawn_run("ppo", model, folder)]
    return {key for row in rows for key in row}


def one_step(name: str, model: Path, folder: Path) -> Scenario:
    method = resolve(name)
    main = objective(name, **({"behavior_correction": "off"} if name == "exo_rw" else {}))
    size = {"one": 1, "pair": 2, "ranking": 3, "group": 3}[method.candidates]
    groups = synthetic_groups([size] * 4)
    if method.candidates == "ranking":
        groups = [own for group in groups for own in rank_group(group, by_reward=True)]
    if "label" in method.needs:
        groups = labelled(synthetic_groups([2] * 2))
    stream = store(folder / "train", groups, reference=model, groups_per_step=4)
    stream = drawn(stream, main) if method.round_prepare is not None else stream
    return Scenario(model=model, streams=(stream,), objectives=(main,), steps=1)


def stored_run(model: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """WPO's weight, an auxiliary stream and held-out pairs."""
    dpo = resolve("dpo")
    main = Objective(stream=MAIN_STREAM, method=compose(dpo, WPOWeighting()), config=dpo.config())
    pairs = store(folder / "pairs", synthetic_groups([2] * 4), reference=model, groups_per_step=4)
    desk = store(folder / "desk", synthetic_groups([1] * 4, seed=1), name="desk", groups_per_step=4)
    scenario = Scenario(
        model=model, streams=(pairs, desk), objectives=(main, objective("sft", stream="desk", weight=0.1)), steps=1
    )
    spec = replace(train_spec(folder / "run", scenario), evaluate_at=(1,))
    train_alone(spec, scenario, make_held_out=source_maker(replace(scenario, streams=(pairs,))))
    yield from read_metrics(folder / "run" / "metrics.jsonl")


def drawn_run(name: str, model: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Two rounds; PPO's limit is so small that further passes are skipped."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(4)))
    plan = RoundPlan(steps=4, refresh_every=2, lag=0, groups_per_step=2, passes=2)
    main = objective(name, **({"target_kl": 1e-12} if name == "ppo" else {}))
    own = OnPolicyRun(folder / f"{name}-rounds", model, file, plan=plan, method=main)
    own.train(InProcess())
    yield from read_metrics(own.directory / "metrics.jsonl")


def test_every_key_that_is_written_is_documented(written: set[str]) -> None:
    patterns = [pattern(key) for key in documented()]
    assert sorted(key for key in written if not any(each.fullmatch(key) for each in patterns)) == []


def test_every_documented_key_is_written(written: set[str]) -> None:
    assert [key for key in documented() if not any(pattern(key).fullmatch(own) for own in written)] == []


def test_a_key_stands_in_one_row() -> None:
    assert len(documented()) == len(set(documented()))
