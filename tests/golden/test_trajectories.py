"""Twenty steps of every trainable method on a small model, against stored losses and gradient norms.

A change that is meant to change nothing must leave them alone. A single number may move by rounding (:data:`LARGEST`);
all of them together may not lean to one side (:data:`MEAN`), which a small mistake would make them do.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_runs import Scenario, drawn, labelled, objective, run, save_tiny, store, synthetic_groups

from rayalign.data.rank import rank_group
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.methods import METHODS, WPOWeighting, compose, resolve

REFERENCES = Path(__file__).parent / "references"
LARGEST = {"loss": 5e-5, "grad_norm": 1e-4}
MEAN = {"loss": 5e-6, "grad_norm": 1e-5}
"""Relative above 1. A processor without AVX moves the references by up to 2e-5 and 2e-5, on average by 1e-6."""
STEPS = 20

PARAMETERS = {"exo_rw": {"behavior_correction": "off"}}
CASES = (*sorted(METHODS), "ipo+wpo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("golden") / "model", initializer_range=0.05)


def scenario(case: str, model: Path, folder: Path) -> Scenario:
    name, _, weighting = case.partition("+")
    method = resolve(name)
    main = objective(name, **PARAMETERS.get(name, {}))
    if weighting:
        main = Objective(stream=MAIN_STREAM, method=compose(method, WPOWeighting()), config=method.config())
    sizes = {"one": [1], "pair": [2], "ranking": [2, 3, 4], "group": [2, 3, 4]}[method.candidates]
    groups = synthetic_groups(sizes * 24, seed=3)[:24]
    if method.candidates == "ranking":
        groups = [own for group in groups for own in rank_group(group, by_reward=True)]
    if "label" in method.needs:
        groups = labelled(synthetic_groups([2] * 12, seed=3))
    streams = [store(folder / "train", groups, reference=model)]
    if method.round_prepare is not None:
        streams = [drawn(streams[0], main)]
    objectives = [main]
    if method.requires_auxiliary:
        answers = synthetic_groups([1] * 12, seed=5)
        streams.append(store(folder / "desk", answers, name="desk", groups_per_step=3))
        objectives.append(objective("sft", stream="desk", weight=0.1, reduction="sequence"))
    return Scenario(
        model=model,
        streams=tuple(streams),
        objectives=tuple(objectives),
        lr=1e-3,
        steps=STEPS,
        tokens_per_micro_batch=256,
    )


@pytest.mark.parametrize("case", CASES)
def test_trajectory(case: str, model: Path, tmp_path: Path, update_golden: bool) -> None:
    trajectory = run(scenario(case, model, tmp_path))
    found = {"loss": trajectory.loss, "grad_norm": trajectory.grad_norm}
    path = REFERENCES / f"{case}.json"
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        rounded = {name: [float(f"{value:.9g}") for value in values] for name, values in found.items()}
        path.write_text(json.dumps({"environment": environment(), **rounded}, indent=1) + "\n")
    assert path.is_file(), f"{case} has no reference: run pytest tests/golden -k {case} --update-golden"
    golden = json.loads(path.read_text())
    for name, values in found.items():
        expected = np.array(golden[name])
        residual = (np.array(values) - expected) / np.maximum(1, np.abs(expected))
        where = f"{case}, {name}; references were made with {golden['environment']}"
        assert np.abs(residual).max() <= LARGEST[name], where
        assert abs(residual.mean()) <= MEAN[name], where


def test_every_reference_has_its_case() -> None:
    assert {path.stem for path in REFERENCES.glob("*.json")} == set(CASES)


def environment() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
