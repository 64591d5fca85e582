"""A run whose rounds label nothing says so, and ends by the rule that its documentation states."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_rollouts import SCORER, InProcess, OnPolicyRun
from tiny_runs import objective

from rayalign.config.policy import LabelConfig, OnPolicyConfig
from rayalign.config.scoring import RuleScorerConfig
from rayalign.engine.metrics import read_metrics
from rayalign.errors import UserError
from rayalign.rollout.base import SamplingParams
from rayalign.rounds.chunk import PromptChunk
from rayalign.rounds.ledger import Ledger
from rayalign.rounds.plan import RoundPlan
from rayalign.rounds.service import Unlabelled
from rayalign.storage.manifest import MANIFEST

PLAN = RoundPlan(steps=5, refresh_every=1, lag=0, groups_per_step=3)
EVERY = "scorer constant gave every completion 0.35"
RULE = "label best_worst found no preference"
WORTH = "the completions of each prompt are worth the same"


def scorer(function: str) -> RuleScorerConfig:
    return RuleScorerConfig(function=f"{SCORER}:{function}")


def make(
    directory: Path, model: Path, file: Path, method: str, *, alone: bool = False, **overrides: Any
) -> OnPolicyRun:
    parameters = {"kl_coef": 0} if method in ("grpo", "rloo", "reinforce_pp") else {}
    shape = {"kto": {"shape": "labelled"}, "sft": {"shape": "one"}}.get(method, {})
    settings = {"scorer": scorer("constant"), "plan": PLAN, **shape, **overrides}
    run = OnPolicyRun(directory, model, file, method=objective(method, **parameters), **settings)
    run.job = replace(run.job, alone=alone)
    return run


@pytest.mark.parametrize(("method", "why"), [("dpo", RULE), ("kto", RULE), ("grpo", WORTH), ("sft", WORTH)])
def test_three_rounds_in_a_row_end_the_run(tmp_path: Path, model: Path, file: Path, method: str, why: str) -> None:
    run = make(tmp_path, model, file, method)
    expected = (
        f"round 3/5: no prompt is labelled: {EVERY}, and {why}, in 3 rounds in a row: the run learns nothing. "
        "Start one of another name with more rollout.samples, a higher rollout.temperature, a finer scorer or another "
        "label rule; or allow more such rounds: data_policy.max_unlabelled_rounds"
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        run.train()
    told = [note for note in run.notes if "chunks" not in note]
    assert told == [f"round {n}/5: no prompt is labelled: {EVERY}, and {why}; its steps teach nothing" for n in (1, 2)]
    assert not (tmp_path / "final").exists()
    refused = run.rounds()[2]
    assert not (refused / MANIFEST).exists()  # or its steps would be done
    if method != "sft":  # whose completions are their own label
        assert [row["grad_norm"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0.0, 0.0]
    patient = replace(run.job.drawing, policy=OnPolicyConfig(max_unlabelled_rounds=9))
    run.job = replace(run.job, drawing=patient)  # as the message says; the round that was drawn is not drawn again
    pool = InProcess()
    with pytest.raises(UserError, match="round 5/5: .* in 5 rounds in a row"):
        run.train(pool)
    assert (refused / MANIFEST).exists() and not any(name.startswith(refused.name) for name in pool.made)


def test_a_run_of_fewer_rounds_ends_at_its_last(tmp_path: Path, model: Path, file: Path) -> None:
    run = make(tmp_path, model, file, "dpo", plan=RoundPlan(steps=4, refresh_every=2, lag=0, groups_per_step=2))
    with pytest.raises(UserError, match="round 2/2: .* in 2 rounds in a row"):
        run.train()
    plan = RoundPlan(steps=2, refresh_every=2, lag=0, groups_per_step=2)
    once = make(tmp_path / "once", model, file, "dpo", plan=plan)
    with pytest.raises(UserError, match=r"round 1/1: .* found no preference: the run learns nothing"):
        once.train()


def test_stored_groups_beside_the_fresh_ones_teach(tmp_path: Path, model: Path, file: Path) -> None:
    run = make(tmp_path, model, file, "dpo")
    notes: list[str] = []
    idle = Unlabelled(replace(run.job, plan=replace(PLAN, fresh_fraction=0.5)), notes.append)
    for number in range(PLAN.num_rounds):
        idle.see(number, Ledger.of([report(0.35, 0.35)]))
    told = f"no prompt is labelled: {EVERY}, and {RULE}; only the stored groups of its steps teach"
    assert notes == [f"round {number}/5: {told}" for number in range(1, 6)]


def test_rewards_that_come_late_let_the_run_go_on(tmp_path: Path, model: Path, file: Path) -> None:
    """Two rounds earn nothing; then the policy is lucky, and unlucky again."""
    run = make(tmp_path, model, file, "grpo", scorer=scorer("lucky"), plan=replace(PLAN, steps=4))
    luck = tmp_path / "luck.txt"

    def draw(chunk: PromptChunk) -> None:
        luck.write_text("1" if chunk.positions.start == 2 * PLAN.groups_per_step else "0")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUCK", str(luck))
        run.train(InProcess(before=draw))
    told = [note.partition(":")[0] for note in run.notes if "no prompt" in note]
    assert told == ["round 1/4", "round 2/4", "round 4/4"]
    assert [row["grad_norm"] > 0 for row in read_metrics(tmp_path / "metrics.jsonl")] == [False, False, True, False]


def report(low: float, high: float, *, completions: int = 8, distinguishing: int | None = None) -> dict[str, Any]:
    told = distinguishing if distinguishing is not None else int(low < high)
    sums = dict.fromkeys(Ledger.__slots__, 0) | {"completions": completions, "distinguishing": told}
    return {**sums, "quarantined": [], "rewards": (low, high)}


@pytest.mark.parametrize(
    ("reports", "in_groups", "alone"),
    [
        ([report(0, 1, distinguishing=2)], True, True),
        ([report(0, 1, distinguishing=0)], False, True),  # by prompt: a critic, or the round's mean, learns from that
        ([report(1, 1, distinguishing=0)], False, False),
        ([report(1, 1, distinguishing=0), report(2, 2, distinguishing=0)], False, True),
        ([report(1, 1, completions=1, distinguishing=1)], True, True),
        ([{**report(0, 0), "rewards": None}], False, False),
    ],
)
def test_what_teaches(reports: list[dict[str, Any]], in_groups: bool, alone: bool) -> None:
    ledger = Ledger.of(reports)
    assert (ledger.teaches(alone=False), ledger.teaches(alone=True)) == (in_groups, alone)


@pytest.mark.parametrize(("method", "alone"), [("reinforce_pp", True), ("grpo", False)])
def test_rewards_of_the_prompt_teach_what_compares_over_the_round(
    tmp_path: Path, model: Path, file: Path, method: str, alone: bool
) -> None:
    plan = RoundPlan(steps=1, refresh_every=1, lag=0, groups_per_step=4)
    run = make(tmp_path, model, file, method, alone=alone, scorer=scorer("of_the_prompt"), plan=plan)
    if not alone:
        with pytest.raises(UserError, match="scorer of_the_prompt gave 1 to 4, and the completions of each prompt"):
            run.train()
        return
    run.train()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["grad_norm"] > 0


def test_ties_alone_move_no_weight_and_count_nowhere(tmp_path: Path, model: Path, file: Path) -> None:
    """On-policy KTO, where a rule has no preference for most prompts: what is labelled is all that there is."""
    sampling = SamplingParams(max_new_tokens=12, num_samples=2, stop_ids=(4,))
    plan = RoundPlan(steps=1, refresh_every=1, lag=0, groups_per_step=8)
    label = LabelConfig(name="wpo", threshold=0.2, gap=0.1)
    run = make(tmp_path, model, file, "kto", scorer=scorer("vowels"), plan=plan, label=label, sampling=sampling)
    run.train()
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    assert 0 < row["rollout/labels"] < 8 and row["loss"] == pytest.approx(0.5, abs=1e-6) and row["grad_norm"] > 0
