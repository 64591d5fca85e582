"""What a message advises can be done: the run continues with it, or the message says that it is another run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from settings import leaves
from tiny_runs import Scenario, save_tiny, store, synthetic_groups, train_alone

import rayalign
from rayalign.config import load_run
from rayalign.config.run import RunConfig
from rayalign.engine.checkpoint.checkpoint import IncompatibleCheckpoint
from rayalign.engine.metrics import read_metrics
from rayalign.engine.state import TrainSpec
from rayalign.errors import Stopped
from rayalign.rounds.streams import StoredStream
from rayalign.run.identity import run_identity
from rayalign.run.job import objectives
from rayalign.run.model import trained_spec

ROOMS = ("engine", "runtime", "rollout", "rounds", "judge")
"""Where a run's messages are written once it has started."""

DECIDE = {
    # They name what is wrong with it: nothing is trained before.
    *("label.name", "model.lora.target_modules", "model.from_scratch", "rollout.engine", "scorer.name", "scorer.model"),
    *("data.stop", "model.lora.dropout", "model.text_only", "reference.dtype"),
    # They say which setting says the same as one of DeepSpeed's file.
    *("model.dtype", "optim.schedule", "optim.groups_per_step"),
    # The message says that the run needs another name.
    *("optim.lr", "rollout.samples", "rollout.temperature"),
    # A context that is too short is found before the first step.
    "rollout.max_new_tokens",
}
"""Settings that make another run, and that messages name all the same."""

STEPS = 6


def test_settings_that_messages_name_may_change() -> None:
    marks = {re.sub(r"\[\w+\]", "", key): mark for key, mark in leaves(RunConfig)}
    keys = re.compile(rf"(?<![\w.])(?:{'|'.join(re.escape(key) for key in marks if '.' in key)})(?!\.?\w)")
    named = set(keys.findall("\n".join(spoken())))
    assert {key for key in named if marks[key] is None} == DECIDE
    assert {"optim.tokens_per_micro_batch", "model.gradient_checkpointing", "strategy.timeout_seconds"} <= named


def spoken() -> Iterator[str]:
    """Every string of the code that is no docstring."""
    for path in (path for room in ROOMS for path in Path(rayalign.__file__).with_name(room).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        silent = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in silent:
                yield node.value


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredStream:
    """What every run trains on; its model lies beside it."""
    folder = tmp_path_factory.mktemp("remedies")
    save_tiny(folder / "model", max_position_embeddings=256)
    return store(folder / "store", synthetic_groups([2] * 12), groups_per_step=4)


@pytest.fixture(scope="module")
def whole(stored: StoredStream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(stored, tmp_path_factory.mktemp("whole"), [])


def trained(stored: StoredStream, directory: Path, settings: list[str], **arguments: Any) -> Path:
    """What ``rayalign train`` makes of these settings and of the checkpoints in ``directory``."""
    model = stored.stores[0].with_name("model")
    base = [f"model.name={model}", "data.train=pairs.jsonl", "method=simpo", "optim.groups_per_step=4"]
    run = load_run(None, [*base, f"optim.steps={STEPS}", "optim.lr=1e-3", "checkpoint.every=1", *settings])
    scenario = Scenario(
        model=model,
        streams=(stored,),
        objectives=objectives(run),
        tokens_per_micro_batch=run.optim.tokens_per_micro_batch,
    )
    spec = TrainSpec(
        directory=directory,
        model=trained_spec(run),
        objectives=scenario.objectives,
        optim=run.optim,
        steps=STEPS,
        seed=run.seed,
        identity=run_identity(run, [stored]),
        checkpoint=run.checkpoint,
        stop_ids=(4,),
    )
    return train_alone(spec, scenario, **arguments)


@pytest.mark.parametrize(
    "settings",
    [
        ["optim.tokens_per_micro_batch=600"],
        ["model.gradient_checkpointing=true"],
        ["optim.on_nonfinite=skip", "optim.max_skipped_in_a_row=9"],
        ["checkpoint={keep: 1, every: 3, restart_optimizer: true}"],
        ["strategy.timeout_seconds=99", "data={max_bad_fraction: 0.5, train: moved.jsonl}", "name=renamed"],
    ],
)
def test_a_run_continues_with_what_a_message_advises(
    settings: list[str], stored: StoredStream, whole: Path, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(Stopped, match="stopped after step 3 of 6"):
        trained(stored, tmp_path, [], stop=lambda: metrics.exists() and len(read_metrics(metrics)) == 2)
    before = metrics.read_bytes()
    final = trained(stored, tmp_path, settings)
    assert metrics.read_bytes().startswith(before)
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, STEPS + 1))
    expected, found = load_file(whole / "model.safetensors"), load_file(final / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-5), name


def test_a_lower_rate_is_another_run(stored: StoredStream, whole: Path) -> None:
    with pytest.raises(IncompatibleCheckpoint, match=r"optim\.lr.*Give this run another name"):
        trained(stored, whole.parent, ["optim.lr=1e-4"])
