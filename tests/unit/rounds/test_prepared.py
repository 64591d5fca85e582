"""Policy gradients on rounds, without Ray: what is prepared of a round, that it is made once, and after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_rollouts import SCORER, STOP_ID, OnPolicyRun
from tiny_runs import objective

from rayalign.config.scoring import RuleScorerConfig
from rayalign.data.store import TokenStore
from rayalign.engine.metrics import read_metrics
from rayalign.functional.advantages import rloo_advantage
from rayalign.rollout.base import SamplingParams
from rayalign.rounds.plan import RoundPlan

PLAN = RoundPlan(steps=6, refresh_every=2, lag=0, groups_per_step=4)


class Interrupted(Exception):
    """Stands for whatever ends a process between two steps."""


@pytest.fixture(scope="module", params=["rloo", "reinforce_pp", "grpo"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path, file: Path):
    run = OnPolicyRun(
        tmp_path_factory.mktemp("run"), model, file, plan=PLAN, method=objective(request.param, kl_coef=0.1)
    )
    run.train()
    return run


def method_of(run: OnPolicyRun) -> str:
    return run.scenario.objectives[0].method.name


def prepared(run: OnPolicyRun) -> dict[str, Path]:
    """Name of the round → its columns."""
    found = sorted((run.directory / "rounds" / "prepared").iterdir())
    return {path.name.removesuffix("-prepared"): path for path in found}


def advantages(run: OnPolicyRun, path: Path) -> list[list[np.ndarray]]:
    """Per group and candidate: its tokens' advantages."""
    store = TokenStore.open(path).with_columns(prepared(run)[path.name])
    return [
        np.split(group.per_token["advantage"], np.cumsum([c.num_predicted for c in group.candidates])[:-1])
        for group in (store[row] for row in range(len(store)))
    ]


def test_every_round_has_its_advantages_and_keeps_every_candidate(trained: OnPolicyRun) -> None:
    assert list(prepared(trained)) == [path.name for path in trained.rounds()] and len(trained.rounds()) == 3
    for path in trained.rounds():
        store = TokenStore.open(path)
        assert (store.index.whole().num_candidates == 3).all() and len(store) == 8
        for group, found in zip((store[row] for row in range(8)), advantages(trained, path), strict=True):
            kl = group.per_token["behavior_token_logp"].astype(float) - group.per_token["ref_token_logp"]
            ends = np.cumsum([candidate.num_predicted for candidate in group.candidates])[:-1]
            reward = group.per_candidate["reward"].astype(float)
            if method_of(trained) == "rloo":
                shaped = reward - 0.1 * np.array([part.sum() for part in np.split(kl, ends)])
                expected = [shaped[k] - (shaped.sum() - shaped[k]) / 2 for k in range(3)]
            elif method_of(trained) == "grpo":
                expected = [0.0] * 3 if np.ptp(reward) == 0 else (reward - reward.mean()) / (reward.std(ddof=1) + 1e-6)
            else:
                continue
            for k in range(3):
                assert found[k] == pytest.approx(np.full(len(found[k]), expected[k]), abs=1e-5)


def test_reinforce_pp_is_whitened_over_the_tokens_of_its_round(tmp_path: Path, model: Path, file: Path) -> None:
    """With one sample of each prompt, and by arithmetic of its own: reward to go, minus mean, over deviation."""
    one = SamplingParams(max_new_tokens=12, num_samples=1, stop_ids=(STOP_ID,))
    method = objective("reinforce_pp", kl_coef=0.1)
    run = OnPolicyRun(tmp_path, model, file, plan=PLAN, method=method, sampling=one)
    run.train()
    for path in run.rounds():
        store = TokenStore.open(path)
        to_go: list[float] = []
        for group in (store[row] for row in range(len(store))):
            kl = group.per_token["behavior_token_logp"].astype(float) - group.per_token["ref_token_logp"]
            ends = np.cumsum([candidate.num_predicted for candidate in group.candidates])[:-1]
            for reward, own in zip(group.per_candidate["reward"], np.split(kl, ends), strict=True):
                to_go += [float(reward) - 0.1 * own[t:].sum() for t in range(len(own))]
        white = (np.array(to_go) - np.mean(to_go)) / np.sqrt(np.var(to_go, ddof=1) + 1e-8)
        found = np.concatenate([part for group in advantages(run, path) for part in group])
        assert found == pytest.approx(white, abs=1e-5)


def test_metrics_say_how_far_the_policy_has_moved_since_the_round(trained: OnPolicyRun) -> None:
    rows = read_metrics(trained.directory / "metrics.jsonl")
    fresh, later = rows[0::2], rows[1::2]  # every round serves two steps
    for row in fresh:  # the trainer scores what the engine drew, with the same weights
        assert row["ratio/mean"] == pytest.approx(1, abs=1e-4) and row["clip_ratio"] == 0
        assert row["kl/behavior_k3"] == pytest.approx(0, abs=1e-6)
    assert all(row["kl/behavior_k3"] > 1e-7 and row["ratio/max"] > 1 for row in later)
    assert rows[0]["kl/ref_k1"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl/ref_k3"] > 0
    store = TokenStore.open(trained.rounds()[0])
    rewards = np.array([store[row].per_candidate["reward"] for row in range(4)])  # of the first step
    assert rows[0]["reward"] == pytest.approx(rewards.mean(), rel=1e-6)
    assert rows[0]["reward_std"] == pytest.approx(rewards.std(axis=1, ddof=1).mean(), rel=1e-5)
    assert rows[0]["frac_reward_zero_std"] == np.mean(np.ptp(rewards, axis=1) == 0)
    first = advantages(trained, trained.rounds()[0])[:4]
    spread = np.mean([np.std(np.concatenate(group)) for group in first])
    assert rows[0]["advantage_std"] == pytest.approx(spread, rel=1e-5)


def test_a_killed_trainer_goes_on_with_the_same_advantages(
    trained: OnPolicyRun, tmp_path: Path, model: Path, file: Path
) -> None:
    for last_step in (1, 3, 5) if method_of(trained) == "rloo" else (3,):
        kill_and_resume(trained, tmp_path / str(last_step), model, file, last_step)


def kill_and_resume(trained: OnPolicyRun, folder: Path, model: Path, file: Path, last_step: int) -> None:
    run = OnPolicyRun(folder, model, file, plan=PLAN, method=trained.scenario.objectives[0])

    def interrupt(row: Mapping[str, Any]) -> None:
        if row["step"] == last_step:
            raise Interrupted

    with pytest.raises(Interrupted):
        run.train(on_step=interrupt)
    committed = {name: (path / "MANIFEST.json").stat().st_mtime_ns for name, path in prepared(run).items()}
    run.train()
    after = {name: (path / "MANIFEST.json").stat().st_mtime_ns for name, path in prepared(run).items()}
    assert committed.items() <= after.items() and after.keys() == prepared(trained).keys()
    mine, theirs = (load_file(each.directory / "final" / "model.safetensors") for each in (run, trained))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    rows = [read_metrics(each.directory / "metrics.jsonl") for each in (run, trained)]
    # A restarted engine is started and not refreshed, and no clock runs twice alike.
    told = [[{k: v for k, v in row.items() if "seconds" not in k} for row in part] for part in rows]
    same = [[{k: v for k, v in row.items() if not k.startswith("refresh/")} for row in part] for part in told]
    assert same[0] == same[1]


def test_columns_that_a_killed_driver_did_not_commit_are_made_again(
    trained: OnPolicyRun, tmp_path: Path, model: Path, file: Path
) -> None:
    """The round is there and its columns are not: the same bytes come again, and nothing is drawn anew."""
    shutil.copytree(trained.directory / "rounds", tmp_path / "rounds")
    run = OnPolicyRun(tmp_path, model, file, plan=PLAN, method=trained.scenario.objectives[0])
    first = trained.rounds()[0].name
    (prepared(run)[first] / "MANIFEST.json").unlink()
    drawn = (tmp_path / "rounds" / first / "MANIFEST.json").stat().st_mtime_ns
    run.train()
    assert (tmp_path / "rounds" / first / "MANIFEST.json").stat().st_mtime_ns == drawn
    mine, theirs = ((prepared(each)[first] / "prepared.columns").read_bytes() for each in (run, trained))
    assert mine == theirs


def test_several_passes_train_on_one_round_by_its_recorded_log_probs(tmp_path: Path, model: Path, file: Path) -> None:
    plan = RoundPlan(steps=8, refresh_every=4, lag=0, groups_per_step=4, passes=2)
    run = OnPolicyRun(tmp_path, model, file, plan=plan, method=objective("rloo"))
    run.train()
    assert [len(TokenStore.open(path)) for path in run.rounds()] == [8, 8]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["round"] for row in rows] == [0] * 4 + [1] * 4
    assert [row["reward"] for row in rows[:2]] == [row["reward"] for row in rows[2:4]]  # the same groups again
    moved = [row["kl/behavior_k3"] for row in rows]
    assert max(moved[0], moved[4]) < 1e-6 < min(moved[1:4] + moved[5:])


def test_a_prompt_that_the_scorer_fails_on_teaches_nothing(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "poison" if n == 2 else f"question {n}"} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer = RuleScorerConfig(function=f"{SCORER}:poisoned")
    plan = RoundPlan(steps=1, refresh_every=1, lag=0, groups_per_step=4)
    for name in ("rloo", "reinforce_pp", "grpo"):
        method = objective(name)
        run = OnPolicyRun(tmp_path / name, model, file, plan=plan, method=method, scorer=scorer, max_bad_fraction=0.5)
        run.train()
        [path] = run.rounds()
        store = TokenStore.open(path)
        [lone] = [row for row in range(4) if not store[row].candidates]
        found = advantages(run, path)
        assert [len(part) for part in found[lone]] == [0]
        assert all(np.isfinite(part).all() for group in found for part in group)
        [row] = read_metrics(run.directory / "metrics.jsonl")
        known = [store[other].per_candidate["reward"] for other in range(4) if other != lone]
        assert row["reward"] == pytest.approx(np.concatenate(known).mean(), rel=1e-6)


def test_leave_one_out_is_not_disturbed_by_a_missing_reward() -> None:
    reward = torch.tensor([[1.0, 3.0, torch.nan]])
    found = rloo_advantage(reward, candidate_mask=~reward.isnan())
    assert found.tolist() == [[-2.0, 2.0, 0.0]]
