"""A comparison that tunes, from the command line to the report; started again, it repeats nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from workspaces import Workspace, rayalign

from rayalign.report.statistics import half_of
from rayalign.runtime.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPTS = [f"Why {word}?" for word in ("not", "here", "so", "him", "us", "now", "me", "then")]


@pytest.fixture(scope="module")
def compared(workspace: Workspace, session: Session) -> Path:
    """The YAML; of the trials of each method one or two fail, their data not being there."""
    folder = workspace.folder
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "rewards.py").write_text("def length(prompt, reply):\n    return len(reply)\n")
    base = yaml.safe_load(workspace.run("base").read_text()) | {
        "optim": {"lr": 3e-2, "steps": 3, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
        "evaluate": {
            "at": [3],
            "prompts": "prompts.jsonl",
            "scorers": [{"name": "rule", "function": "rewards.py:length"}],
            "sampling": {"samples": 2, "max_new_tokens": 8},
        },
    }
    base.pop("name")
    tune = {
        "over": {"optim.lr": [3e-2, 1e-5], "data.train": [["pairs.jsonl"], ["absent.jsonl"]], "method.beta": [0.1]},
        "trials": 3,
    }
    path = folder / "tuned.yaml"
    document = {"name": "tuned", "base": base, "tune": tune, "grid": {"method": ["dpo", "ipo"], "seed": [3]}}
    path.write_text(yaml.safe_dump(document))
    finished = rayalign("compare", path)
    assert finished.code == 0, finished.printed
    return path


def read(workspace: Workspace, *parts: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(workspace.directory("tuned").joinpath(*parts).read_text())
    return found


def test_the_picked_trial_is_the_one_that_scored_highest_on_the_select_half(
    workspace: Workspace, compared: Path
) -> None:
    results = read(workspace, "report", "results.json")
    select = sum(half_of(prompt) == "select" for prompt in PROMPTS)
    assert [row["label"] for row in results["tuning"]] == ["dpo", "ipo"]
    for row in results["tuning"]:
        assert (row["asked"], row["seeds"], len(row["trials"]), row["num_prompts"]) == (3, [1000], 3, select)
        for trial in row["trials"]:
            failed = "absent" in trial["values"]["data.train"]
            assert trial["status"] == ("failed" if failed else "done")
            assert ("absent.jsonl" in trial["reason"]) == failed
        scores = [-np.inf if trial["score"] is None else trial["score"] for trial in row["trials"]]
        assert row["picked"] == int(np.argmax(scores))
        values = row["trials"][row["picked"]]["values"]
        (cell,) = [cell for cell in results["cells"] if cell["id"] in row["cells"]]
        (folder,) = workspace.directory("tuned").glob(f"cells/{cell['id']}__*")
        assert f"optim.lr-{values['optim.lr']}" in folder.name
        run = read(workspace, "cells", folder.name, "run.json")
        assert run["configuration"]["optim"]["lr"] == float(values["optim.lr"])
        assert run["configuration"]["seed"] == 3
    dpo, ipo = results["tuning"]
    assert dpo["left_out"] == [] and ipo["left_out"] == [{"what": "method.beta", "reason": "ipo has no beta"}]


def test_a_trials_score_is_that_of_its_kept_numbers(workspace: Workspace, compared: Path) -> None:
    row = read(workspace, "report", "results.json")["tuning"][0]
    trial = row["trials"][row["picked"]]
    found = {}
    for path in workspace.directory("tuned").glob("tuning/cells/dpo/*/evaluation/step_000003.json"):
        run = json.loads((path.parents[1] / "run.json").read_text())
        (found[run["configuration"]["optim"]["lr"]],) = json.loads(path.read_text())["points"]
    point = found[float(trial["values"]["optim.lr"])]
    assert np.shape(point["scores"]["length"]) == (row["num_prompts"], 2)
    assert trial["score"] == pytest.approx(np.mean(point["scores"]["length"]), rel=1e-5)
    assert trial["kl"] == pytest.approx(np.mean(point["kl"]["kl_rb"]), rel=1e-4)


def test_the_report_prints_trials_and_what_was_picked(workspace: Workspace, compared: Path) -> None:
    report = workspace.directory("tuned") / "report"
    html, markdown = ((report / f"report.{ending}").read_text() for ending in ("html", "md"))
    for text in (html, markdown):
        assert "every configuration had 3 trials" in text and "absent.jsonl" in text
        assert "picked" in text and "ipo has no beta" in text


def test_a_second_run_repeats_nothing_but_what_failed(workspace: Workspace, compared: Path) -> None:
    directory = workspace.directory("tuned")
    finals = [*directory.glob("tuning/**/final/MANIFEST.json"), *directory.glob("cells/*/final/MANIFEST.json")]
    before = {path: path.stat().st_mtime_ns for path in (*finals, *directory.glob("**/evaluation/*.json"))}
    assert len(finals) >= 4
    finished = rayalign("compare", compared)
    assert finished.code == 0, finished.printed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert finished.printed.count("finished before") == len(finals)


def test_a_dry_run_lists_the_trials(workspace: Workspace, compared: Path) -> None:
    finished = rayalign("compare", compared, "--dry-run")
    assert finished.code == 0 and "tuned: trials" in finished.printed
