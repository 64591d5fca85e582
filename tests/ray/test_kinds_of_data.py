"""Every kind of data from its file to a trained model, three steps each, all at once on one Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from workspaces import Workspace, metrics

from rayalign.config.load import load_run
from rayalign.run.job import make_job
from rayalign.run.stages import Stages
from rayalign.runtime.session import Session
from rayalign.runtime.trainer import Trainer
from rayalign.storage.artifacts import Artifacts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RANKED = [
    {"prompt": f"Count to {number}.", "completions": ["one", "one two", "one two three"], "rewards": [0.0, 0.5, 1.0]}
    for number in range(24)
]
TURNS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "A number."}]}
    for n in range(12)
]
TEXTS = [{"text": f"The sky is blue, for the {number}th time."} for number in range(12)]


def data(*files: str) -> dict[str, Any]:
    return {"train": list(files), "max_prompt_tokens": 48, "max_tokens": 96}


REGULARISER = {"name": "sft", "data": [{"path": "turns.jsonl"}], "weight": 0.1, "groups_per_step": 4}
RUNS: dict[str, dict[str, Any]] = {
    "kto": {"method": {"name": "kto", "beta": 0.1}},
    "exo_rw": {"method": {"name": "exo_rw", "behavior": "assume_reference"}, "data": data("ranked.jsonl")},
    "sft": {"method": "sft", "data": data("turns.jsonl", "texts.jsonl")},
    "mpo": {"method": "mpo", "auxiliary": [REGULARISER]},
    "wpo-permuted": {"weighting": {"name": "wpo", "alignment": "sampled", "clamp": "product", "permute": True}},
}


@pytest.fixture(scope="module")
def trained(workspace: Workspace, session: Session) -> dict[str, Path]:
    for name, rows in (("ranked", RANKED), ("turns", TURNS), ("texts", TEXTS)):
        (workspace.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = Stages(artifacts=Artifacts(root=workspace.storage / "artifacts"), session=session)
    optim = {"lr": 1e-3, "steps": 3, "warmup": 1, "groups_per_step": 4, "tokens_per_micro_batch": 2048}
    jobs = {}
    for name, blocks in RUNS.items():
        run = load_run(workspace.run(name, optim=optim, **blocks))
        workspace.directory(name).mkdir(parents=True)
        jobs[name] = make_job(run, workspace.directory(name), stages, processes=1, label=name)
    with Trainer() as trainer:
        return {name: trainer.fit(job) for name, job in jobs.items()}


@pytest.mark.parametrize("name", RUNS)
def test_trains_to_a_model(name: str, trained: Mapping[str, Path], workspace: Workspace) -> None:
    rows = metrics(workspace.directory(name))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    AutoModelForCausalLM.from_pretrained(trained[name])


def test_kto_starts_between_its_bounds(trained: Mapping[str, Path], workspace: Workspace) -> None:
    # where policy = reference, 1 − σ(0) for either label
    assert metrics(workspace.directory("kto"))[0]["loss"] == pytest.approx(0.5, abs=1e-5)


def test_every_file_of_a_mixture_is_read(trained: Mapping[str, Path], workspace: Workspace) -> None:
    rows = metrics(workspace.directory("sft"))
    assert rows[-1]["epoch"] == pytest.approx(12 / 24)
