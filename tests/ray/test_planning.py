"""A plan names exactly the stages that the runs make, whatever they need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from workspaces import Workspace

from rayalign.comparison.compare import common_evaluation
from rayalign.comparison.forecast import tokens_to_generate, tokens_to_train
from rayalign.comparison.plan import Plan, Planned, plan
from rayalign.config import load_compare
from rayalign.run.job import make_job
from rayalign.run.stages import Stages
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import Artifacts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SFT = [{"name": "sft", "data": [{"path": "answers.jsonl"}], "weight": 0.1, "groups_per_step": 2}]
RELABELLED = {"name": "best_worst", "relabel": True}
ONCE = {"name": "on_policy", "refresh_every": "never"}
CELLS: list[dict[str, Any]] = [
    {"name": "dpo", "as": "few", "filter": {"policy_logp_quantile": 0.5}, "auxiliary": SFT},
    {"name": "kto", "as": "labelled"},
    {"name": "dpo", "as": "relabelled", "label": RELABELLED},
    {"name": "rloo", "as": "once", "data_policy": ONCE},
    {"name": "dpo", "as": "mixed", "data_policy": {"name": "hybrid", "refresh_every": "never", "on_fraction": 0.5}},
    {"name": "dpo", "as": "rounds", "data_policy": {"name": "on_policy", "refresh_every": 1}},
]


@pytest.fixture
def path(workspace: Workspace) -> Path:
    folder = workspace.folder
    rows = [{"prompt": f"question {n}", "chosen": "aeiou", "rejected": "xyz"} for n in range(8)]
    (folder / "eight.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"prompt": f"question {n}", "completion": "an answer"} for n in range(4)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (folder / "vowels.py").write_text(
        "def vowels(prompt, reply):\n    return sum(c in 'aeiou' for c in reply)\n\n\n"
        "def prompts():\n    yield {'prompt': 'question 1'}\n"
    )
    scorer = {"name": "rule", "function": "vowels:vowels"}
    base = {
        "storage_path": str(workspace.storage),
        "model": {"name": "model"},
        "data": {"train": ["eight.jsonl"], "eval": ["eight.jsonl"], "max_prompt_tokens": 24, "max_tokens": 48},
        "rollout": {"engine": "hf", "samples": 3, "max_new_tokens": 8},
        "scorer": scorer,
        "optim": {"lr": 1e-3, "steps": 2, "groups_per_step": 4},
        "evaluate": {"prompts": [{"function": "vowels:prompts", "name": "made"}], "scorers": [scorer]},
        "track": [],
    }
    path = folder / "planned.yaml"
    path.write_text(yaml.safe_dump({"name": "planned", "base": base, "grid": {"method": CELLS}}))
    return path


def shared(planned: Planned) -> list[tuple[str, list[str]]]:
    return sorted((stage.name, list(names)) for stage, names in planned.stages.items())


def test_what_is_planned_is_what_is_made(
    path: Path, workspace: Workspace, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(workspace.folder)
    comparison, root = load_compare(path), workspace.storage / "artifacts"
    runs = {cell.id: cell.run for cell in comparison.cells if cell.run is not None}
    assert list(runs) == [cell["as"] for cell in CELLS]
    evaluated = common_evaluation(comparison)
    before = plan(comparison, evaluated, Plan(root=root), session)
    assert not workspace.storage.exists()

    stages = Stages(artifacts=Artifacts(root=root, note=lambda line: None), session=session)
    jobs = {name: make_job(run, root.parent / name, stages, processes=2, label=name) for name, run in runs.items()}

    keeper = Plan(root=root)
    after = plan(comparison, evaluated, keeper, session)
    made = {stage.directory for stage in after.stages if stage.made}
    assert made == {folder for folder in root.iterdir() if folder.is_dir()}
    assert [stage.name for stage in after.stages if not stage.made] == ["rows"]  # the evaluation's own, made later
    assert shared(before) == shared(after)
    known = {stage.directory for stage in before.stages if not stage.waits_for}
    assert known < {stage.directory for stage in after.stages}
    for name, job in jobs.items():
        [planned] = [run for run in after.runs if run.name == name]
        assert {stage.directory for stage in planned.stages} == set(job.stages)
        assert planned.job is not None and planned.job.spec.identity == job.spec.identity
    plans = Stages(artifacts=keeper, session=session)
    generated = {run.name: tokens_to_generate(run, plans) for run in after.runs}
    # two rounds of four prompts, three samples of at most eight tokens; what is drawn once has been drawn
    assert generated == {"few": 0, "labelled": 0, "relabelled": 0, "once": 0, "mixed": 0, "rounds": 192}
    trained = {run.name: tokens_to_train(run) for run in after.runs}
    assert isinstance(trained["mixed"], int) and trained["rounds"] == "unknown: drawn while it trains"
