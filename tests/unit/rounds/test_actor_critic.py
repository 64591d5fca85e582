"""PPO on rounds, without Ray: what its critic says of them and when, both models after a kill, and skipped passes.

On several workers, and with an adapter: ``test_critic_teams.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from critics import (
    GAMMA,
    KL_COEF,
    LAM,
    PLAN,
    Interrupted,
    checkpoint,
    columns,
    first_critic,
    interrupt_after,
    opened,
    ppo,
    rows,
    same_end,
)
from safetensors.torch import load_file
from tiny_rollouts import InProcess, OnPolicyRun
from tiny_runs import objective, store, synthetic_groups, train_with_critic
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rayalign.config.model import ModelConfig
from rayalign.config.training import OptimConfig
from rayalign.data.store import TokenStore
from rayalign.engine.checkpoint.checkpoint import step_of
from rayalign.engine.model.pretrained import ModelSpec, load_policy, save_pretrained
from rayalign.engine.model.scalar import ScalarHead
from rayalign.engine.state import CriticSpec
from rayalign.engine.step import NonFiniteStep
from rayalign.errors import Stopped
from rayalign.rounds.columns import RoundPreparation, prepare_columns
from rayalign.rounds.plan import RoundPlan
from rayalign.rounds.service import serve_rounds
from rayalign.storage.manifest import read_manifest, verify


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, file: Path) -> OnPolicyRun:
    run = ppo(tmp_path_factory.mktemp("run"), model, file)
    run.train(InProcess())
    return run


@torch.no_grad()
def values_of(critic: PreTrainedModel, group: Any) -> list[np.ndarray]:
    """Per candidate: the head on the state before each token, one plain sequence at a time."""
    found = []
    for candidate in group.candidates:
        ids = torch.from_numpy(np.concatenate([group.prompt_ids, candidate.ids])).long()
        said = critic.score(critic.base_model(input_ids=ids[None]).last_hidden_state)[0, :, 0]
        found.append(said[len(group.prompt_ids) - 1 : -1].double().numpy())
    return found


def gae_by_loops(reward: np.ndarray, value: np.ndarray) -> np.ndarray:
    advantage, after, following = np.zeros(len(reward)), 0.0, 0.0
    for t in reversed(range(len(reward))):
        advantage[t] = reward[t] + GAMMA * following - value[t] + GAMMA * LAM * after
        after, following = advantage[t], value[t]
    return advantage


def test_a_round_is_valued_by_the_critic_that_opens_it_and_prepared_with_that(
    trained: OnPolicyRun, model: Path
) -> None:
    """The second round by the critic of the checkpoint at its first step, as transformers reads it."""
    later = AutoModelForSequenceClassification.from_pretrained(checkpoint(trained, 4) / "critic").eval()
    for number, critic in enumerate([first_critic(model), later]):
        store = opened(trained, number)
        raw: list[np.ndarray] = []
        for group in (store[row] for row in range(len(store))):
            values = values_of(critic, group)
            assert group.per_token["old_value"] == pytest.approx(np.concatenate(values), abs=1e-5)
            ends = np.cumsum([candidate.num_predicted for candidate in group.candidates])[:-1]
            kl = group.per_token["behavior_token_logp"].astype(float) - group.per_token["ref_token_logp"]
            for k, part in enumerate(np.split(-KL_COEF * kl, ends)):
                part[-1] += group.per_candidate["reward"][k]
                raw.append(gae_by_loops(part, values[k]))
                assert np.split(group.per_token["return"], ends)[k] == pytest.approx(raw[-1] + values[k], abs=1e-5)
        whole = np.concatenate(raw)
        white = (whole - whole.mean()) / np.sqrt(whole.var(ddof=1) + 1e-8)
        found = np.concatenate([store[row].per_token["advantage"] for row in range(len(store))])
        assert found == pytest.approx(white, abs=1e-4)


def test_the_critic_has_moved_between_two_rounds_and_predicts_better(trained: OnPolicyRun, model: Path) -> None:
    before = load_file(checkpoint(trained, 4) / "critic" / "model.safetensors")
    start = first_critic(model).state_dict()
    assert all(not torch.equal(before[name], start[name]) for name in before if name.endswith("weight"))
    found = rows(trained)
    assert found[0]["critic/loss"] > 0 and found[0]["critic/grad_norm"] > 0
    # The same groups in both passes over the first round.
    assert found[2]["critic/squared_error"] < found[0]["critic/squared_error"]
    assert found[3]["critic/squared_error"] < found[1]["critic/squared_error"]


def test_rows_say_what_both_models_did(trained: OnPolicyRun) -> None:
    found = rows(trained)
    assert [row["round"] for row in found] == [0] * 4 + [1] * 4
    assert [row["critic/learning_rate"] for row in found] == pytest.approx([3 * row["learning_rate"] for row in found])
    assert "skipped_steps" not in found[0]
    store = opened(trained, 0)
    value, returns = (
        np.concatenate([store[row].per_token[name] for row in range(len(store))]).astype(float)
        for name in ("old_value", "return")
    )
    explained = 1 - (returns - value).var() / returns.var()
    assert [row["critic/explained_variance"] for row in found[:4]] == pytest.approx([explained] * 4, abs=1e-5)
    moved = [row["kl/behavior_k3"] for row in found]
    assert max(moved[0], moved[4]) < 1e-6 < min(moved[1:4] + moved[5:])


def test_policy_and_critic_are_exported_apart(trained: OnPolicyRun) -> None:
    final = trained.directory / "final_critic"
    verify(final)
    critic, said = AutoModelForSequenceClassification.from_pretrained(final, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and critic.config.num_labels == 1
    last = checkpoint(trained, 8)
    assert (last / "critic" / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    assert (last / "model.safetensors").read_bytes() == (trained.directory / "final" / "model.safetensors").read_bytes()
    assert "lm_head.weight" in load_file(trained.directory / "final" / "model.safetensors")


@pytest.mark.parametrize("last_step", [1, 3, 4, 5])
def test_a_killed_trainer_ends_in_the_same_two_models(
    trained: OnPolicyRun, tmp_path: Path, model: Path, file: Path, last_step: int
) -> None:
    """Before the first checkpoint, inside the first round, right before the second, at its opening and inside it."""
    run = ppo(tmp_path, model, file)
    with pytest.raises(Interrupted):
        run.train(on_step=interrupt_after(last_step))
    committed = {path: (path / "MANIFEST.json").stat().st_mtime_ns for path in run.rounds()}
    run.train()
    assert all((path / "MANIFEST.json").stat().st_mtime_ns == at for path, at in committed.items())
    same_end(run, trained)
    # Inside a round its values are read again; from before a round on it is valued by the new attempt.
    assert len(columns(run, run.rounds()[0])) == (2 if last_step == 1 else 1)
    assert len(columns(run, run.rounds()[1])) == (2 if last_step == 5 else 1)


def test_a_stopped_trainer_ends_in_the_same_two_models(
    trained: OnPolicyRun, tmp_path: Path, model: Path, file: Path
) -> None:
    """Asked in the third step, inside the first round: both models are saved after it."""
    run = ppo(tmp_path, model, file)
    with pytest.raises(Stopped, match="stopped after step 3 of"):
        run.train(stop=lambda: (tmp_path / "metrics.jsonl").exists() and len(rows(run)) == 2)
    assert (checkpoint(run, 3) / "critic" / "model.safetensors").exists()
    run.train()
    same_end(run, trained)


def test_a_micro_batch_of_each_group_says_the_same_of_a_round(
    trained: OnPolicyRun, tmp_path: Path, model: Path, file: Path
) -> None:
    run = ppo(tmp_path, model, file, plan=replace(PLAN, steps=1))
    run.scenario = replace(run.scenario, tokens_per_micro_batch=128, row_tokens=64, layout="concatenated")
    run.train()
    mine, theirs = opened(run, 0), opened(trained, 0)
    for row in range(len(mine)):
        assert mine[row].per_token["old_value"] == pytest.approx(theirs[row].per_token["old_value"], abs=1e-5)


# Skipped passes.

THRICE = RoundPlan(steps=12, refresh_every=6, lag=0, groups_per_step=4, passes=3)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, model: Path, file: Path) -> OnPolicyRun:
    """A limit that lies above what the second step of a round moves the policy to, and below the third."""
    free = ppo(tmp_path_factory.mktemp("free"), model, file, plan=THRICE)
    free.train()
    moved = [row["kl/behavior_k3"] for row in rows(free)]
    assert moved[1] < moved[2] / 2
    run = ppo(tmp_path_factory.mktemp("stopped"), model, file, plan=THRICE, target_kl=(moved[1] + moved[2]) / 2)
    run.train()
    assert [row["loss"] for row in rows(run)[:4]] == [row["loss"] for row in rows(free)[:4]]
    return run


def test_passes_after_the_one_that_moved_too_far_are_skipped_and_counted(stopped: OnPolicyRun) -> None:
    """The third step of the first round, of its second pass, is too far: that pass is finished, the third left out."""
    found = rows(stopped)
    limit = stopped.scenario.objectives[0].config.model_dump()["target_kl"]
    expected, skipped = [], 0
    for number in range(2):
        over: int | None = None
        for inside in range(6):
            row = found[6 * number + inside]
            if over is not None and inside // 2 > over:
                skipped += 1
                assert row == {
                    "step": 6 * number + inside + 1,
                    "num_tokens": found[6 * number + inside - 1]["num_tokens"],
                    "step_tokens": 0,
                    "workers": 1,
                    "skipped_steps": skipped,
                }
            else:
                assert row["skipped_steps"] == skipped
                if over is None and row["kl/behavior_k3"] > limit:
                    over = inside // 2
        expected.append(over)
    assert expected[0] == 1 and skipped >= 2
    assert found[-1]["skipped_steps"] == skipped


def test_a_skipped_step_moves_neither_model(stopped: OnPolicyRun, tmp_path: Path, model: Path, file: Path) -> None:
    run = ppo(
        tmp_path,
        model,
        file,
        plan=THRICE,
        target_kl=stopped.scenario.objectives[0].config.model_dump()["target_kl"],
    )
    with pytest.raises(Interrupted):
        run.train(on_step=interrupt_after(7))
    for folder in (Path(), Path("critic")):
        before, after = (load_file(checkpoint(run, step) / folder / "model.safetensors") for step in (4, 6))
        assert all(torch.equal(before[name], after[name]) for name in before)


class Notice:
    """Heard after step 4, behind which two steps are skipped."""

    def __init__(self) -> None:
        self.asked = 0

    def due(self) -> bool:
        return True

    def heard(self) -> str | None:
        self.asked += 1
        return "the cluster takes back the node of worker 0" if self.asked == 4 else None


def test_a_notice_is_answered_once_before_skipped_steps(
    stopped: OnPolicyRun, tmp_path: Path, model: Path, file: Path
) -> None:
    limit = stopped.scenario.objectives[0].config.model_dump()["target_kl"]
    run = ppo(tmp_path, model, file, plan=THRICE, target_kl=limit)
    spec = run.spec(checkpoint_every=12, checkpoint_keep=9, checkpoint_at=())
    with serve_rounds(run.job, InProcess(), run.notes.append):
        train_with_critic(spec, run.scenario, notices=Notice())
    assert sorted(step_of(path) for path in (run.directory / "checkpoints").glob("step_*")) == [4, 12]


@pytest.mark.parametrize("last_step", [5, 7])
def test_a_stop_survives_a_kill(stopped: OnPolicyRun, tmp_path: Path, model: Path, file: Path, last_step: int) -> None:
    """Killed among skipped steps, and in the next round."""
    limit = stopped.scenario.objectives[0].config.model_dump()["target_kl"]
    run = ppo(tmp_path, model, file, plan=THRICE, target_kl=limit)
    with pytest.raises(Interrupted):
        run.train(on_step=interrupt_after(last_step))
    run.train()
    assert rows(run) == rows(stopped)
    for place in ("final", "final_critic"):
        mine, theirs = (load_file(each.directory / place / "model.safetensors") for each in (run, stopped))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# What a critic starts from, and beside what it trains.


def test_a_critic_starts_from_a_reward_models_folder(tmp_path: Path, model: Path, file: Path) -> None:
    reward_model, tokenizer = load_policy(ModelSpec(config=ModelConfig(name=str(model)), head=ScalarHead(), seed=5))
    with torch.no_grad():
        reward_model.score.weight.mul_(0.5)
    save_pretrained(reward_model, tokenizer, tmp_path / "rm")
    run = ppo(tmp_path / "run", model, file, plan=replace(PLAN, steps=1))
    spec = run.spec()
    critic = CriticSpec(
        model=ModelSpec(config=ModelConfig(name=str(tmp_path / "rm")), head=ScalarHead()), optim=spec.optim
    )
    with serve_rounds(run.job, InProcess(), run.notes.append):
        train_with_critic(replace(spec, critic=critic), run.scenario)
    store = opened(run, 0)
    for group in (store[row] for row in range(len(store))):
        assert group.per_token["old_value"] == pytest.approx(
            np.concatenate(values_of(reward_model.eval(), group)), abs=1e-5
        )


def test_further_data_train_the_policy_and_not_the_critic(tmp_path: Path, model: Path, file: Path) -> None:
    """PPO with a likelihood of other data beside it (Ouyang et al. 2022 call it PPO-ptx)."""
    ends = []
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        run = ppo(folder, model, file, plan=replace(PLAN, steps=2))
        desk = store(folder / "desk", synthetic_groups([1] * 6, seed=1), name="desk", groups_per_step=2)
        likelihood = objective("sft", stream="desk", weight=weight)
        run.scenario = replace(
            run.scenario,
            streams=(*run.scenario.streams, desk),
            objectives=(*run.scenario.objectives, likelihood),
            max_grad_norm=0.0,
        )
        run.train()
        ends.append([load_file(folder / place / "model.safetensors") for place in ("final", "final_critic")])
        assert "loss/desk/sft" in rows(run)[0]
    (policy, critic), (other_policy, other_critic) = ends
    assert all(torch.equal(critic[name], other_critic[name]) for name in critic)
    assert not torch.equal(policy["lm_head.weight"], other_policy["lm_head.weight"])


def test_where_the_critics_gradient_is_not_finite_neither_model_moves(tmp_path: Path, model: Path, file: Path) -> None:
    run = ppo(tmp_path, model, file, plan=replace(PLAN, steps=2))
    spec = run.spec(checkpoint_every=1)
    broken, tokenizer = load_policy(ModelSpec(config=ModelConfig(name=str(model)), head=ScalarHead()))
    with torch.no_grad():
        broken.score.weight.fill_(3e38)  # finite, and what it computes is not
    save_pretrained(broken, tokenizer, tmp_path / "broken")
    critic = CriticSpec(
        model=ModelSpec(config=ModelConfig(name=str(tmp_path / "broken")), head=ScalarHead()),
        optim=OptimConfig(lr=1e-3, warmup=0),
    )
    with pytest.raises(NonFiniteStep, match="step 1: loss"), serve_rounds(run.job, InProcess(), run.notes.append):
        train_with_critic(replace(spec, critic=critic), run.scenario)
    assert rows(run) == [] and not (tmp_path / "checkpoints").exists()


def test_where_the_critic_is_not_finite_both_models_skip(tmp_path: Path, model: Path, file: Path) -> None:
    run = ppo(tmp_path, model, file, plan=replace(PLAN, steps=2))
    broken, tokenizer = load_policy(ModelSpec(config=ModelConfig(name=str(model)), head=ScalarHead()))
    with torch.no_grad():
        broken.score.weight.fill_(3e38)  # finite, and what it computes is not
    save_pretrained(broken, tokenizer, tmp_path / "broken")
    critic = CriticSpec(
        model=ModelSpec(config=ModelConfig(name=str(tmp_path / "broken")), head=ScalarHead()),
        optim=OptimConfig(lr=1e-3, warmup=0),
    )
    with serve_rounds(run.job, InProcess(), run.notes.append):
        train_with_critic(run.spec(critic=critic, optim={"on_nonfinite": "skip"}), run.scenario)
    assert [row["skipped_steps"] for row in rows(run)] == [1, 2]
    start, end = (load_file(path / "model.safetensors") for path in (model, tmp_path / "final"))
    assert start.keys() == end.keys() and all(torch.equal(start[name], end[name]) for name in start)


def test_columns_name_the_values_that_they_were_made_with(tmp_path: Path, trained: OnPolicyRun) -> None:
    """Other values, other columns; the values themselves lie beside them, bit for bit."""
    path = trained.rounds()[0]
    drawn = TokenStore.open(path)
    main = trained.scenario.objectives[0]
    preparation = RoundPreparation(method=main.method, config=main.config, key="")
    [overlay] = columns(trained, path)
    said = [drawn.with_columns(overlay)[row].per_token for row in range(len(drawn))]
    values = torch.from_numpy(np.concatenate([group["old_value"] for group in said]))
    again = prepare_columns(drawn, tmp_path / "again", preparation, old_value=values)
    assert (tmp_path / "again" / "prepared.columns").read_bytes() == (overlay / "prepared.columns").read_bytes()
    assert len(again) == len(drawn)
    prepare_columns(drawn, tmp_path / "other", preparation, old_value=values + 0.5)
    other, mine = (read_manifest(tmp_path / name) for name in ("other", "again"))
    assert other is not None and mine is not None and other["digest"] != mine["digest"]
