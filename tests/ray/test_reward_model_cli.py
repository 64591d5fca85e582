"""A reward model from its pairs to the run that it scores: trained, measured, and used by the pool unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from workspaces import Workspace, metrics, rayalign

from rayalign.data.store import TokenStore
from rayalign.data.texts import Prompts
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.judge import make_scorer
from rayalign.rounds.answers import reply_text
from rayalign.runtime.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OPTIM = {"lr": 3e-3, "steps": 12, "warmup": 1, "groups_per_step": 12, "tokens_per_micro_batch": 2048}
VOWELS = ("aeiou", "ae io", "ou ae", "iou a", "eio u")
OTHERS = ("xyz", "bcd f", "gh jk", "mn p", "qr st")


def pairs(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {n}", "chosen": VOWELS[n % 5], "rejected": OTHERS[n // 5 % 5]}
        for n in range(first, first + count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def final(workspace: Workspace, session: Session) -> Path:
    ranked = [
        {"prompt": f"rank {n}", "completions": [OTHERS[n % 5], VOWELS[n % 5], "aei xyz"], "rewards": [0.0, 1.0, 0.5]}
        for n in range(12)
    ]
    write(workspace.folder / "order.jsonl", [*pairs(0, 36), *ranked])
    write(workspace.folder / "held.jsonl", pairs(100, 20))
    data = {"train": ["order.jsonl"], "eval": ["held.jsonl"], "max_prompt_tokens": 24, "max_tokens": 48}
    run = workspace.run("rm", method={"name": "reward_model", "center": 0.01}, data=data, optim=OPTIM)
    done = rayalign("train", run, "evaluate.every=6")
    assert done.code == 0, done.printed
    return workspace.directory("rm") / "final"


def test_it_learns_and_is_measured_on_the_way(final: Path, workspace: Workspace) -> None:
    rows = metrics(workspace.directory("rm"))
    assert [row["step"] for row in rows] == list(range(1, 13))
    measured = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in measured] == [6, 12]
    assert measured[-1]["eval_rewards/accuracies"] > 0.9
    assert measured[-1]["eval_rewards/brier"] < 0.15 and measured[-1]["eval_rewards/margins"] > 1
    assert AutoModelForSequenceClassification.from_pretrained(final).config.num_labels == 1


def test_the_command_measures_the_same_pairs(final: Path, workspace: Workspace) -> None:
    held = str(workspace.folder / "held.jsonl")
    done = rayalign("evaluate", final, "--pairs", held, "--json")
    assert done.code == 0, done.printed
    found = json.loads(done.printed[done.printed.index("{") :])
    (row,) = (row for row in metrics(workspace.directory("rm")) if row["step"] == 12)
    assert found["accuracy"]["mean"] == pytest.approx(row["eval_rewards/accuracies"])
    assert found["margin_mean"] == pytest.approx(row["eval_rewards/margins"], abs=1e-5)
    assert found["brier"] == pytest.approx(row["eval_rewards/brier"], abs=1e-6)


def test_the_pool_scores_with_it_unchanged(final: Path, workspace: Workspace) -> None:
    run = workspace.run(
        "scored",
        data={"train": ["order.jsonl"], "max_prompt_tokens": 24, "max_tokens": 48},
        data_policy={"name": "on_policy", "refresh_every": 2},
        rollout={"engine": "hf", "samples": 3, "max_new_tokens": 8},
        scorer={"name": "reward_model", "model": str(final)},
        optim={"lr": 1e-3, "steps": 2, "groups_per_step": 4, "tokens_per_micro_batch": 2048},
    )
    done = rayalign("train", run)
    assert done.code == 0, done.printed
    assert [row["step"] for row in metrics(workspace.directory("scored"))] == [1, 2]
    (folder,) = sorted((workspace.directory("scored") / "rounds").glob("round_*"))
    store = TokenStore.open(folder)
    scorer, prompts = make_scorer("reward_model", model=str(final)), Prompts(store)
    tokenizer = load_tokenizer(workspace.folder / "model")
    for index in range(len(store)):
        group = store[index]
        replies = [reply_text(tokenizer, own.ids.tolist()) for own in group.candidates]
        expected = scorer.score([prompts[index]] * len(replies), replies)
        np.testing.assert_allclose(group.per_candidate["reward"], expected, atol=1e-5)


def test_an_adapter_beside_a_head_is_one_model_in_the_end(final: Path, workspace: Workspace) -> None:
    """Two workers in shards, and the command that measures it, which knows of no adapter."""
    run = workspace.run(
        "adapter",
        method={"name": "reward_model", "center": 0.01},
        model={"name": "model", "lora": {"rank": 4, "alpha": 8}},
        data={"train": ["order.jsonl"], "eval": ["held.jsonl"], "max_prompt_tokens": 24, "max_tokens": 48},
        strategy={"name": "fsdp2", "workers": 2},
        optim=OPTIM,
    )
    done = rayalign("train", run, "evaluate.every=12")
    assert done.code == 0, done.printed
    (row,) = (row for row in metrics(workspace.directory("adapter")) if "eval_loss" in row)
    assert row["eval_rewards/accuracies"] > 0.9
    found = workspace.directory("adapter") / "final"
    assert "score.weight" in " ".join(load_file(found / "adapter" / "adapter_model.safetensors"))
    done = rayalign("evaluate", found, "--pairs", str(workspace.folder / "held.jsonl"), "--json")
    assert done.code == 0, done.printed
    said = json.loads(done.printed[done.printed.index("{") :])
    assert said["accuracy"]["mean"] == pytest.approx(row["eval_rewards/accuracies"])
    assert said["margin_mean"] == pytest.approx(row["eval_rewards/margins"], abs=1e-5)


def test_stored_answers_are_ordered_by_a_scorer(final: Path, workspace: Workspace) -> None:
    (workspace.folder / "vowels.py").write_text(
        "def vowels(prompt, reply):\n    return sum(c in 'aeiou' for c in reply)\n"
    )
    run = workspace.run(
        "relabelled",
        method="reward_model",
        model={"name": str(final)},  # goes on from the trained head
        data={"train": ["order.jsonl"], "max_prompt_tokens": 24, "max_tokens": 48},
        label={"name": "rewards", "relabel": True},
        scorer={"name": "rule", "function": "vowels:vowels"},
        optim={**OPTIM, "steps": 2},
    )
    done = rayalign("train", run)
    assert done.code == 0, done.printed
    first, _ = metrics(workspace.directory("relabelled"))
    assert first["rewards/accuracies"] > 0.9 and first["loss"] < 0.5
