"""Every method under every data policy, from one YAML: what runs, and what is refused with its reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from workspaces import Workspace, rayalign

from rayalign.runtime.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TERM = [{"name": "sft", "data": [{"path": "answers.jsonl"}], "weight": 0.1, "groups_per_step": 2}]
METHODS: list[dict[str, Any]] = [
    *({"name": name} for name in ("dpo", "robust_dpo", "ipo", "hinge", "simpo", "orpo", "exo_pref", "wpo", "kto")),
    {"name": "slic"},
    {"name": "mpo", "auxiliary": TERM},
    {"name": "exo_rw", "label": {"name": "rewards"}, "as": "exo_rw"},
    {"name": "dpo_rw", "label": {"name": "rewards"}, "as": "dpo_rw"},
    {"name": "sft", "as": "sft", "label": {"name": "best"}},
    *({"name": name, "as": name} for name in ("rloo", "reinforce_pp", "grpo", "ppo")),
]
POLICIES: list[dict[str, Any]] = [
    {"name": "off_policy", "as": "off"},
    {"name": "on_policy", "refresh_every": "never", "as": "once"},
    {"name": "on_policy", "refresh_every": 1, "as": "on"},
    {"name": "hybrid", "refresh_every": 1, "as": "groups"},
    {"name": "hybrid", "refresh_every": 1, "mix": "candidates", "as": "candidates"},
]
NO_REWARDS = "`rewards`"
NO_BEHAVIOR = "`behavior_logps`"
NO_SCORER = "off_policy trusts the stored labels"
NO_PAIRS = "needs one completion"
NO_TOKENS = "which stored rows lack"
REFUSED: Mapping[tuple[str, str], str] = {
    ("exo_rw", "off"): NO_SCORER,
    ("dpo_rw", "off"): NO_SCORER,
    ("exo_rw", "groups"): NO_BEHAVIOR,
    ("dpo_rw", "groups"): NO_REWARDS,
    ("exo_rw", "candidates"): NO_BEHAVIOR,  # nobody knows who wrote the stored ones
    ("sft", "off"): NO_SCORER,
    ("sft", "groups"): NO_PAIRS,
    **{
        (method, policy): NO_TOKENS
        for method in ("rloo", "reinforce_pp", "grpo", "ppo")
        for policy in ("off", "groups", "candidates")
    },
    ("ppo", "once"): "values each round again",
}


@pytest.fixture(scope="module")
def cells(workspace: Workspace, session: Session) -> dict[tuple[str, str], dict[str, Any]]:
    folder = workspace.folder
    rows = [{"prompt": f"question {n}", "chosen": "aeiou", "rejected": "xyz"} for n in range(8)]
    (folder / "eight.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"prompt": f"question {n}", "completion": "an answer"} for n in range(4)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (folder / "vowels.py").write_text("def vowels(prompt, reply):\n    return sum(c in 'aeiou' for c in reply)\n")
    scorer = {"name": "rule", "function": "vowels:vowels"}
    comparison = {
        "name": "policies",
        "base": {
            "storage_path": str(workspace.storage),
            "model": {"name": "model"},
            "data": {"train": ["eight.jsonl"], "max_prompt_tokens": 24, "max_tokens": 48},
            "method": {"name": "dpo"},
            "rollout": {"engine": "hf", "samples": 3, "max_new_tokens": 8},
            "scorer": scorer,
            "optim": {"lr": 1e-3, "steps": 2, "groups_per_step": 4, "tokens_per_micro_batch": 2048},
            "evaluate": {
                "prompts": ["eight.jsonl"],
                "scorers": [scorer],
                "sampling": {"samples": 1, "max_new_tokens": 8},
            },
            "track": [],
        },
        "grid": {"method": METHODS, "data_policy": POLICIES},
    }
    path = folder / "policies.yaml"
    path.write_text(yaml.safe_dump(comparison, sort_keys=False))
    done = rayalign("compare", path)
    assert "Traceback" not in done.printed
    record = json.loads((workspace.storage / "policies" / "comparison.json").read_text())
    return {tuple(cell["id"].split("__")): cell for cell in record["cells"]}


@pytest.mark.parametrize("policy", [policy["as"] for policy in POLICIES])
@pytest.mark.parametrize("method", [method["name"] for method in METHODS])
def test_a_cell_runs_or_says_why_not(
    cells: dict[tuple[str, str], dict[str, Any]], workspace: Workspace, method: str, policy: str
) -> None:
    cell = cells[method, policy]
    reason = REFUSED.get((method, policy))
    if reason is None:
        assert cell["status"] == "done", cell["reason"]
        folder: Path = workspace.storage / "policies" / "cells" / cell["id"]
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    else:
        assert cell["status"] in ("failed", "skipped") and reason in cell["reason"]
