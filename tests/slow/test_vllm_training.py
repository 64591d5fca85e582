"""On-policy training with the real vLLM in the pool: from the command line, through refreshes and a killed actor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import save_tiny
from workspaces import Workspace, metrics, rayalign

from rayalign.data.store import TokenStore
from rayalign.runtime.session import Session, connect
from rayalign.storage.manifest import read_manifest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm installs it into an environment of its own")

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
REWARDS = """
import os, signal
from pathlib import Path

MARK = Path(__file__).with_name("died")


def vowels(prompt, reply):
    return sum(character in "aeiou" for character in reply) / max(1, len(reply))


def dies_once(prompt, reply):
    if not MARK.exists():
        MARK.touch()
        os.kill(os.getppid(), signal.SIGKILL)
    return vowels(prompt, reply)
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    save_tiny(folder / "model", "llama_tied", max_position_embeddings=256, **SHAPE)
    rows = [{"prompt": f"question {n}", "chosen": "aeiou", "rejected": "xyz"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    return Workspace(folder=folder)


@pytest.fixture(scope="module")
def session(workspace: Workspace) -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        with connect(import_paths=[workspace.folder]) as session:
            yield session


def train(workspace: Workspace, name: str, function: str, **rollout: Any) -> Path:
    path = workspace.run(
        name,
        data_policy={"name": "on_policy", "refresh_every": 2},
        rollout={"engine": "vllm", "samples": 3, "max_new_tokens": 12, **rollout},
        scorer={"name": "rule", "function": function},
        optim={"lr": 1e-3, "steps": 6, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
    )
    done = rayalign("train", path)
    assert done.code == 0, done.printed
    return workspace.directory(name)


def rounds(directory: Path) -> list[Path]:
    return sorted((directory / "rounds").glob("round_*"))


def test_rounds_through_two_refreshes(workspace: Workspace, session: Session) -> None:
    directory = train(workspace, "vllm", "rewards:vowels")
    rows = metrics(directory)
    assert [row["round"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert abs(rows[0]["loss"] - 0.693147) < 1e-5
    steps = []
    for path in rounds(directory):
        manifest = read_manifest(path)
        assert manifest is not None
        steps.append(manifest["meta"]["request"]["step"])
        assert manifest["meta"]["ledger"]["completions"] == 48
    assert steps == [0, 2, 4]
    first = TokenStore.open(rounds(directory)[0])
    for row in range(len(first)):  # drawn from the reference itself: two engines, one policy
        group = first[row]
        assert group.per_token["behavior_token_logp"] == pytest.approx(group.per_token["ref_token_logp"], abs=1e-4)


def test_a_killed_engine_is_replaced_and_nothing_is_lost_or_doubled(workspace: Workspace, session: Session) -> None:
    directory = train(workspace, "vllm-killed", "rewards:dies_once")
    assert (workspace.folder / "died").exists()
    for path in rounds(directory):
        store = TokenStore.open(path)
        assert len(store) == 16
        manifest = read_manifest(path)
        assert manifest is not None and manifest["meta"]["ledger"]["prompts"] == 16


def test_one_engine_on_two_devices(workspace: Workspace, session: Session) -> None:
    """Each of its processes reads its part of the weights from a folder; the canary compares the whole."""
    directory = train(workspace, "vllm-parallel", "rewards:vowels", tensor_parallel=2)
    assert [row["round"] for row in metrics(directory)] == [0, 0, 1, 1, 2, 2]
    first = TokenStore.open(rounds(directory)[0])
    for row in range(len(first)):
        group = first[row]
        assert group.per_token["behavior_token_logp"] == pytest.approx(group.per_token["ref_token_logp"], abs=1e-4)


def test_checkpoints_are_sampled_by_it_too(workspace: Workspace, session: Session) -> None:
    """The run needs no rollouts; hf, which samples with the same seeds otherwise, measures much the same KL."""
    found = {}
    for engine in ("vllm", "hf"):
        path = workspace.run(
            "vllm-evaluated",
            optim={"lr": 2e-2, "steps": 4, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
            evaluate={
                "prompts": "pairs.jsonl",
                "scorers": [{"name": "rule", "function": "rewards:vowels"}],
                "sampling": {"engine": engine, "samples": 4, "max_new_tokens": 12},
            },
        )
        for verb in ("train", "evaluate"):
            done = rayalign(verb, path)
            assert done.code == 0, done.printed
        kept = workspace.directory("vllm-evaluated") / "evaluation"
        points = {step: json.loads((kept / f"step_00000{step}.json").read_text())["points"][0] for step in (0, 4)}
        assert np.abs(points[0]["kl"]["kl_rb"]).max() == 0
        found[engine] = float(np.mean(points[4]["kl"]["kl_rb"]))
    assert found["vllm"] > 0.05 and found["vllm"] == pytest.approx(found["hf"], rel=0.3)
