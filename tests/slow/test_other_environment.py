"""Rollout actors in an environment that is not the trainer's: real vLLM there, none here."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator

import pytest
from tiny_runs import save_tiny
from workspaces import Workspace, metrics, rayalign

from rayalign.errors import UserError
from rayalign.rollout.engines import refuse_missing_engine
from rayalign.runtime.session import Session, connect

PYTHON = os.environ.get("RAYALIGN_VLLM_PYTHON", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(not PYTHON, reason="RAYALIGN_VLLM_PYTHON names no other environment: make test-vllm makes one"),
]
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    save_tiny(folder / "model", "llama_tied", max_position_embeddings=256, **SHAPE)
    rows = [{"prompt": f"question {n}", "chosen": "aeiou", "rejected": "xyz"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(
        "def vowels(prompt, reply):\n    return sum(c in 'aeiou' for c in reply) / max(1, len(reply))\n"
    )
    return Workspace(folder=folder)


@pytest.fixture(scope="module")
def session(workspace: Workspace) -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        with connect(import_paths=[workspace.folder]) as session:
            yield session


def test_weights_and_samples_cross_between_environments(workspace: Workspace, session: Session) -> None:
    assert importlib.util.find_spec("vllm") is None, "this test is about a trainer without vLLM"
    path = workspace.run(
        "elsewhere",
        data_policy={"name": "on_policy", "refresh_every": 2},
        rollout={"engine": "vllm", "samples": 3, "max_new_tokens": 12, "python": PYTHON},
        scorer={"name": "rule", "function": "rewards:vowels"},
        optim={"lr": 1e-3, "steps": 4, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
    )
    done = rayalign("train", path)
    assert done.code == 0, done.printed
    rows = metrics(workspace.directory("elsewhere"))
    assert [row["round"] for row in rows] == [0, 0, 1, 1]
    assert abs(rows[0]["loss"] - 0.693147) < 1e-5
    assert rows[2]["refresh/bytes"] > 0  # the second round came from refreshed weights


def test_an_environment_that_cannot_serve_is_refused() -> None:
    with pytest.raises(UserError, match="has no vllm; install vllm there"):
        refuse_missing_engine("vllm", sys.executable)
    refuse_missing_engine("vllm", PYTHON)
