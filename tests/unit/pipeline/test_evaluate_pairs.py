"""``rayalign evaluate MODEL --pairs``: its numbers are Hugging Face's logits, compared by hand."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import save_tiny
from tiny_tokenizers import CHATML, byte_level
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from workspaces import rayalign

from rayalign.config.model import ModelConfig
from rayalign.engine.model.pretrained import ModelSpec, load_policy, save_pretrained
from rayalign.engine.model.scalar import WRITTEN, ScalarHead

PAIRS = [{"prompt": f"What is {n}?", "chosen": "It is the answer. " * n, "rejected": "Blue."} for n in range(1, 6)]
RANKED = [
    {"prompt": "Why?", "completions": ["So.", "Because of it.", "The sky."], "rewards": [0.0, 2.0, 1.0]},
    {"prompt": "Who?", "completions": ["You.", "Me."], "rewards": [1.0, 1.0]},
    {"prompt": "How?", "completions": ["Thus.", "So."], "rewards": [0.5, 0.5001]},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "causal")
    save_pretrained(
        *load_policy(ModelSpec(config=ModelConfig(name=str(tmp_path / "causal")), head=ScalarHead())), tmp_path / "rm"
    )
    return tmp_path


def logit(model: Path, prompt: str, reply: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(AutoModelForSequenceClassification.from_pretrained(model).eval()(input_ids=ids).logits[0, 0])


def margins(model: Path) -> list[float]:
    """Of every pair of the two files whose order is known."""
    found = [logit(model, row["prompt"], row["chosen"]) - logit(model, row["prompt"], row["rejected"]) for row in PAIRS]
    for row in RANKED:
        scored = [
            (reward, logit(model, row["prompt"], reply))
            for reply, reward in zip(row["completions"], row["rewards"], strict=True)
        ]
        for (reward, score), (other_reward, other_score) in combinations(scored, 2):
            if reward != other_reward:
                found.append((score - other_score) * np.sign(reward - other_reward))
    return found


def evaluated(model: Path, *files: str, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
    asked = [argument for file in files for argument in ("--pairs", file)]
    done = rayalign("evaluate", model, *asked, "--json", *arguments)
    assert done.code == 0, done.printed
    return json.loads(done.printed[done.printed.index("{") :])  # after the bars that transformers draws


@pytest.mark.parametrize("whose", ["ours", "another's"])
def test_its_numbers_are_hugging_faces(folder: Path, whose: str) -> None:
    model = folder / "rm"
    if whose == "another's":  # whose template writes a line end after the end token
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({key: own for key, own in config.items() if key != WRITTEN}))
        byte_level(template=CHATML).save_pretrained(model)
    files = write(folder / "pairs.jsonl", PAIRS), write(folder / "ranked.jsonl", RANKED)
    found, expected = evaluated(model, *files), margins(model)
    assert (found["pairs"], found["rows"], found["cut_answers"]) == (9, 7, 0)
    assert found["margin_mean"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert found["accuracy"]["mean"] == pytest.approx(np.mean(np.array(expected) > 0))
    assert found["brier"] == pytest.approx(np.mean(1 / (1 + np.exp(expected)) ** 2), abs=1e-6)
    assert sum(bucket["pairs"] for bucket in found["by_length"]) == 9
    table = rayalign("evaluate", model, "--pairs", files[0])
    assert table.code == 0 and "5 pairs in 5 rows" in table.printed and "by length" in table.printed
    assert evaluated(model, files[0], arguments=("--max-prompt-tokens", "20", "--max-tokens", "30"))["cut_answers"] > 0


def test_what_cannot_be_measured_is_named(folder: Path) -> None:
    pairs = write(folder / "pairs.jsonl", PAIRS)
    for arguments, message in (
        ((folder / "causal", "--pairs", pairs), "has no trained scalar head: score.weight is not in its files"),
        ((folder / "rm", "--pairs", write(folder / "tied.jsonl", RANKED[1:2])), "hold no pair in which one answer"),
        (
            (folder / "rm", "--pairs", write(folder / "single.jsonl", [{"prompt": "a", "completion": "b"}])),
            "single.jsonl:1: this method compares completions of one prompt, and this row has 1",
        ),
        (
            (folder / "rm", "--pairs", write(folder / "plain.jsonl", [{"prompt": "a", "completions": ["b", "c"]}])),
            "without `rewards` does not say which is preferred",
        ),
        ((folder / "rm", "optim.lr=1", "--pairs", pairs), "takes one reward model"),
        ((folder / "rm", "--json"), "--json goes with --pairs"),
        (
            ("model.name=m", f"data.train={pairs}", "method=reward_model"),
            "rayalign evaluate runs/run/final --pairs test.jsonl",
        ),
    ):
        done = rayalign("evaluate", *map(str, arguments))
        assert done.code == 2 and message in " ".join(done.printed.split()), done.printed


def test_answers_beyond_what_the_model_reads(folder: Path) -> None:
    """RoPE has no end of its own: scores beyond it would be numbers of a model that was never trained there."""
    path = folder / "rm" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 64}))
    pairs = write(folder / "pairs.jsonl", [*PAIRS, {"prompt": "Why?", "chosen": "So. " * 40, "rejected": "No."}])
    done = rayalign("evaluate", str(folder / "rm"), "--pairs", pairs)
    told = " ".join(done.printed.split())
    assert done.code == 2 and "pairs.jsonl:6 has" in told and "reads 64 (max_position_embeddings)" in told
    short = ("--max-tokens", "64", "--max-prompt-tokens", "32")  # as the message says
    assert evaluated(folder / "rm", pairs, arguments=short)["cut_answers"] == 1


def test_tokens_beyond_the_embedding(folder: Path) -> None:
    """The embedding would grow by rows of zeros, as it may where a reward model is trained."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "rm")
    tokenizer.add_tokens(["Zanzibar"])
    tokenizer.save_pretrained(folder / "rm")
    assert evaluated(folder / "rm", write(folder / "pairs.jsonl", PAIRS))["pairs"] == len(PAIRS)
    pairs = write(folder / "pairs.jsonl", [*PAIRS, {"prompt": "Where?", "chosen": "Zanzibar.", "rejected": "No."}])
    done = rayalign("evaluate", str(folder / "rm"), "--pairs", pairs)
    assert done.code == 2 and "pairs.jsonl:6 has the token 'Zanzibar'" in " ".join(done.printed.split())
