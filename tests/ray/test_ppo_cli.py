"""PPO from the command line: two workers, a pool, a critic from a reward model's folder, and a kill in the middle."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import save_tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from workspaces import Workspace, kill_workers, metrics, num_rows, rayalign, wait_until, weights

from rayalign.config.model import ModelConfig
from rayalign.engine.model.pretrained import ModelSpec, load_policy, save_pretrained
from rayalign.engine.model.scalar import ScalarHead
from rayalign.runtime.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.slow]

VOWELS = "def vowels(prompt, reply):\n    return sum(c in 'aeiou' for c in reply) / max(1, len(reply))\n"


@pytest.fixture(scope="module", autouse=True)
def inputs(workspace: Workspace) -> None:
    rows = [{"prompt": f"question {n}"} for n in range(16)]
    (workspace.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workspace.folder / "vowels.py").write_text(VOWELS)
    reward_model, tokenizer = load_policy(
        ModelSpec(config=ModelConfig(name=str(workspace.folder / "model")), head=ScalarHead(), seed=7)
    )
    save_pretrained(reward_model, tokenizer, workspace.folder / "rm")


def ppo(**blocks: Any) -> dict[str, Any]:
    return {
        "data": {"train": ["prompts.jsonl"], "max_prompt_tokens": 24, "max_tokens": 48},
        "method": {"name": "ppo", "kl_coef": 0.1},
        "critic": {"model": "rm", "lr": 3e-3},
        "data_policy": {"name": "on_policy", "refresh_every": 4, "passes": 2},
        "rollout": {"engine": "hf", "samples": 2, "max_new_tokens": 12},
        "scorer": {"name": "rule", "function": "vowels:vowels"},
        "optim": {"lr": 1e-3, "steps": 8, "groups_per_step": 4, "tokens_per_micro_batch": 1024},
        "checkpoint": {"every": 3},
        **blocks,
    }


@pytest.fixture(scope="module")
def undisturbed(workspace: Workspace, session: Session) -> Path:
    done = rayalign("train", workspace.run("ppo", **ppo()))
    assert done.code == 0, done.printed
    return workspace.directory("ppo")


def critic_weights(directory: Path) -> bytes:
    return (directory / "final_critic" / "model.safetensors").read_bytes()


def test_a_run_leaves_two_models_and_says_what_both_did(undisturbed: Path, workspace: Workspace) -> None:
    rows = metrics(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, 9)) and [row["round"] for row in rows] == [0] * 4 + [1] * 4
    assert rows[2]["critic/squared_error"] < rows[0]["critic/squared_error"]  # the same groups again
    assert rows[0]["critic/learning_rate"] == pytest.approx(3 * rows[0]["learning_rate"])
    facts = json.loads((undisturbed / "run.json").read_text())
    assert facts["configuration"]["critic"] == {"model": str(workspace.folder / "rm"), "lr": 3e-3}
    assert "critic" in facts["identity"]
    assert AutoModelForCausalLM.from_pretrained(undisturbed / "final").generation_config.eos_token_id is not None
    critic = AutoModelForSequenceClassification.from_pretrained(undisturbed / "final_critic")
    start = AutoModelForSequenceClassification.from_pretrained(workspace.folder / "rm")
    moved = (critic.score.weight - start.score.weight).abs().max()
    assert critic.config.num_labels == 1 and 0 < moved < 0.1


def test_a_killed_worker_is_replaced_and_ends_in_the_same_two_models(
    undisturbed: Path, workspace: Workspace, session: Session
) -> None:
    path, directory = workspace.run("killed", **ppo()), workspace.directory("killed")

    def kill() -> None:
        wait_until(lambda: num_rows(directory) >= 6, "6 steps")
        kill_workers("RayTrainWorker")

    killer = threading.Thread(target=kill)
    killer.start()
    done = rayalign("train", path)
    killer.join()
    assert done.code == 0, done.printed
    assert weights(directory) == weights(undisturbed) and critic_weights(directory) == critic_weights(undisturbed)
    assert [row["critic/value"] for row in metrics(directory)] == [row["critic/value"] for row in metrics(undisturbed)]


def test_two_workers_and_a_limit(undisturbed: Path, workspace: Workspace, session: Session) -> None:
    """The critic starts from the policy; a limit that every second step exceeds leaves one pass of each round."""
    blocks = ppo(method={"name": "ppo", "kl_coef": 0.1, "target_kl": 1e-9}, strategy={"name": "ddp", "workers": 2})
    blocks["critic"] = {"lr": 3e-3}
    done = rayalign("train", workspace.run("two", **blocks))
    assert done.code == 0, done.printed
    rows = metrics(workspace.directory("two"))
    assert ["loss" in row for row in rows] == [True, True, False, False] * 2
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 2, 2, 2, 3, 4]
    assert torch.isfinite(torch.tensor([row["loss"] for row in rows if "loss" in row])).all()


def test_a_policy_with_an_adapter(workspace: Workspace, session: Session) -> None:
    """The base is as it was, but for the adapted layers; the critic, which starts from it, is trained whole."""
    lora = {"name": "model", "lora": {"rank": 4, "alpha": 8}}
    blocks = ppo(model=lora, critic={"lr": 3e-3}, strategy={"name": "ddp", "workers": 2})
    done = rayalign("train", workspace.run("adapter", **blocks))
    assert done.code == 0, done.printed
    directory = workspace.directory("adapter")
    start, end, critic = (
        load_file(path / "model.safetensors")
        for path in (workspace.folder / "model", directory / "final", directory / "final_critic")
    )
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved and all("_proj." in name for name in moved)
    assert all(".lora_" in name for name in load_file(directory / "final" / "adapter" / "adapter_model.safetensors"))
    shared = start.keys() & critic.keys()
    assert "score.weight" in critic and len(shared) > len(moved)
    assert all(not torch.equal(start[name], critic[name]) for name in shared)


def test_what_a_critic_cannot_be_is_refused(workspace: Workspace, session: Session) -> None:
    run = workspace.run("refused", **ppo())
    save_tiny(workspace.folder / "other")
    vocabulary = workspace.folder / "other" / "tokenizer.json"
    facts = json.loads(vocabulary.read_text())
    first, second = list(facts["model"]["vocab"])[40:42]
    ids = facts["model"]["vocab"]
    ids[first], ids[second] = ids[second], ids[first]
    vocabulary.write_text(json.dumps(facts))
    done = rayalign("train", run, "critic.model=other")
    assert done.code == 2 and "reads other tokens than the policy: 2 of" in done.printed, done.printed
    done = rayalign("train", run, "critic.model=./nowhere")
    assert done.code == 2 and "critic.model: there is no directory" in done.printed, done.printed
    done = rayalign("train", run, "method={name: rloo}")
    assert done.code == 2 and "rloo trains no critic; remove it" in done.printed
