"""A comparison whose wins a model behind an endpoint decides, from the command line to the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from endpoints import KEY, Endpoint, serving
from parrots import parrot
from workspaces import Workspace, rayalign

from rayalign.runtime.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPTS = ["Why?", "Who is it?", "What is the sky?", "And then?", "Do not answer this."]

BETWEEN = "\n---\n"
"""Stands in no reply of eight tokens."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    """Prefers the reply with more vowels wherever it stands, fails once, and has no verdict on one prompt."""

    def answer(question: str) -> str:
        prompt, first, second = question.split(BETWEEN)
        if prompt == PROMPTS[-1]:
            return "I would rather not."
        return f"Verdict: {'A' if vowels(first) > vowels(second) else 'B' if vowels(first) < vowels(second) else 'tie'}"

    with pytest.MonkeyPatch.context() as patch, serving(patch) as server:
        server.answer = answer
        server.script = [500]
        yield server


def vowels(text: str) -> int:
    return sum(letter in "aeiou" for letter in text)


@pytest.fixture(scope="module")
def compared(endpoint: Endpoint, workspace: Workspace, session: Session) -> Path:
    """The YAML of the comparison, which has run; the key was set before Ray started its processes."""
    folder = workspace.folder
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "rewards.py").write_text("def length(prompt, reply):\n    return len(reply)\n")
    base = yaml.safe_load(workspace.run("base").read_text()) | {
        "optim": {"lr": 3e-2, "steps": 3, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
        "evaluate": {
            "prompts": "prompts.jsonl",
            "scorers": [{"name": "rule", "function": "rewards.py:length"}],
            "judge": {
                "name": "llm",
                "model": "careful",
                "base_url": endpoint.url,
                "api_key_env": "TEST_KEY",
                "template": BETWEEN.join(("{{ prompt }}", "{{ first }}", "{{ second }}")),
            },
            "max_missing_fraction": 0.2,
            "sampling": {"samples": 2, "max_new_tokens": 8},
        },
    }
    base.pop("name")
    path = folder / "judged.yaml"
    path.write_text(yaml.safe_dump({"name": "judged", "base": base, "grid": {"method": ["dpo", "ipo"]}}))
    finished = rayalign("compare", path)
    assert finished.code == 0, finished.printed
    assert KEY not in finished.printed
    return path


def read(workspace: Workspace, *parts: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(workspace.directory("judged").joinpath(*parts).read_text())
    return found


def test_verdicts_are_those_of_the_judge(workspace: Workspace, compared: Path) -> None:
    comparison = read(workspace, "comparison.json")
    reference, (point,) = comparison["reference"][0], comparison["cells"][0]["points"]
    assert comparison["judge"]["name"] == "careful"
    assert reference["verdicts"] == [[0.5, 0.5]] * len(PROMPTS) and reference["answers"] == []
    first = {reply["prompt"]: reply["text"] for reply in point["replies"]}
    theirs = {reply["prompt"]: reply["text"] for reply in reference["replies"]}
    for prompt, row in enumerate(point["verdicts"]):
        expected = (np.sign(vowels(first[prompt]) - vowels(theirs[prompt])) + 1) / 2
        if prompt == len(PROMPTS) - 1 and first[prompt] != theirs[prompt]:
            expected = None
        assert row[0] == expected


def test_the_report_shows_the_win_rate_and_what_was_asked(
    workspace: Workspace, endpoint: Endpoint, compared: Path
) -> None:
    comparison, results = read(workspace, "comparison.json"), read(workspace, "report", "results.json")
    for cell in ("dpo", "ipo"):
        (point,) = next(row["points"] for row in comparison["cells"] if row["id"] == cell)
        verdicts = np.array(point["verdicts"], dtype=float)
        (found,) = [row["judged"] for row in results["points"] if row["cell"] == cell]
        known = verdicts[~np.isnan(verdicts).all(axis=1)]
        assert found["mean"] == pytest.approx(np.nanmean(known, axis=1).mean(), abs=1e-5)
        assert found["n"] == len(known)
    asked = {row["cell"]: row for row in results["answers"]}
    assert set(asked) == {"dpo", "ipo"}
    # The script's 500 is waited out inside of one call.
    assert sum(row["calls"] for row in asked.values()) == len(endpoint.seen) - 1
    missing = sum(row["missing"] for row in asked.values())
    assert 0 < missing <= 4
    # Both orders of what is missing fail in each of four attempts.
    assert sum(row["failures"] for row in asked.values()) == 8 * missing
    report = workspace.directory("judged") / "report"
    for text in ((report / "report.md").read_text(), (report / "report.html").read_text()):
        assert "judged by careful" in text and "gave no verdict in 4 attempts" in text
    assert not [path for path in workspace.storage.rglob("*.json") if KEY in path.read_text()]


@pytest.mark.slow
def test_wins_against_a_cell_of_an_earlier_comparison(workspace: Workspace, endpoint: Endpoint, compared: Path) -> None:
    before = len(endpoint.seen)
    baseline = workspace.directory("judged") / "cells" / "dpo"
    finished = rayalign("compare", compared, f"base.evaluate.baseline={baseline}")
    assert finished.code == 0, finished.printed
    results = read(workspace, "report", "results.json")
    points = {row["cell"]: row for row in results["points"]}
    assert results["baseline"] == "dpo" and set(points) == {"reference", "(baseline)", "dpo", "ipo"}
    # The cell says what the baseline says: equal replies tie unasked, and samples win as often as they lose.
    assert points["dpo"]["judged"]["mean"] == points["dpo"]["win_rates"]["length"]["mean"] == 0.5
    asked = {row["cell"]: row["calls"] for row in results["answers"]}
    assert asked["dpo"] == 0 and sum(asked.values()) == len(endpoint.seen) - before > 0
    assert points["(baseline)"]["scores"] == points["dpo"]["scores"]
    assert points["(baseline)"]["kl"] == points["dpo"]["kl"]


@pytest.mark.slow
def test_a_judge_that_leaves_too_much_open_fails_the_cells_and_says_so(
    workspace: Workspace, endpoint: Endpoint, compared: Path
) -> None:
    finished = rayalign("compare", compared, "base.evaluate.max_missing_fraction=0")
    assert finished.code == 2
    assert "Traceback" not in finished.printed
    message = " ".join(finished.printed.split())
    assert "2 of 2 cells failed" in message
    cells = read(workspace, "comparison.json")["cells"]
    assert all(f"first: careful at {endpoint.url}" in cell["reason"] for cell in cells)


@pytest.mark.slow
def test_evaluate_with_a_judge_that_is_loaded_here(workspace: Workspace, session: Session, compared: Path) -> None:
    """A judge that always says A, and wins counted against the run's own end: a half everywhere, there unasked."""
    judge = parrot(workspace.folder / "judge", "A", "<|im_end|>", max_position_embeddings=4096)
    evaluate = {
        "prompts": "prompts.jsonl",
        "scorers": [{"name": "rule", "function": "rewards.py:length"}],
        "judge": {"name": "llm", "engine": "hf", "model": str(judge), "max_new_tokens": 4},
        "baseline": "runs/single",
        "sampling": {"samples": 2, "max_new_tokens": 8},
    }
    optim = {"lr": 3e-2, "steps": 2, "groups_per_step": 8, "tokens_per_micro_batch": 2048}
    path = workspace.run("single", optim=optim)
    assert rayalign("train", path).code == 0
    finished = rayalign("evaluate", workspace.run("single", optim=optim, evaluate=evaluate))
    assert finished.code == 0, finished.printed
    words = " ".join(finished.printed.split())
    assert "judge judge: 10 replies, 0 calls, 0 failures, 10 ties, 0 disagreements, 0 missing" in words
    folder = workspace.directory("single") / "evaluation"
    points = {path.stem: json.loads(path.read_text())["points"][0] for path in folder.glob("*.json")}
    assert set(points) == {"baseline", "step_000000", "step_000002"}
    assert all(point["verdicts"] == [[0.5, 0.5]] * len(PROMPTS) for point in points.values())
    (asked,) = points["step_000000"]["answers"]
    assert asked["disagreements"] > 0 and asked["calls"] == 2 * asked["disagreements"] and asked["missing"] == 0
    assert points["step_000002"]["kl"] == points["baseline"]["kl"]
