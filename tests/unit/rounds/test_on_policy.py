"""Training on rounds of the policy's own samples, without Ray: what is drawn with which weights, and after a kill."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_rollouts import SCORER, STOP_ID, InProcess, OnPolicyRun, chunk_spec, prompt_stream
from tiny_runs import objective

from rayalign.config.policy import LabelConfig
from rayalign.config.scoring import RuleScorerConfig
from rayalign.data.store import TokenStore, commit_store
from rayalign.data.tokenize_rows import Shape
from rayalign.engine.batches import Weights
from rayalign.engine.canary import RESPONSE_TOKENS
from rayalign.engine.frozen import FrozenModel
from rayalign.engine.metrics import read_metrics
from rayalign.errors import Stopped, UserError
from rayalign.rounds.chunk import ChunkMaker, PromptChunk, refuse_broken_weights
from rayalign.rounds.plan import RoundPlan
from rayalign.rounds.stored import StoredGroups
from rayalign.rounds.workers import ItemKilled, PoolClosed
from rayalign.storage.manifest import read_manifest

PLAN = RoundPlan(steps=6, refresh_every=2, lag=0, groups_per_step=4)


class Interrupted(Exception):
    """Stands for whatever ends a process between two steps."""


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["synchronous", "lag 1", "lag 2"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path, file: Path):
    run = OnPolicyRun(tmp_path_factory.mktemp("run"), model, file, plan=replace(PLAN, lag=request.param))
    run.train()
    return run


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "final" / "model.safetensors")


def asked(store: Path) -> Mapping[str, Any]:
    manifest = read_manifest(store)
    assert manifest is not None
    return manifest["meta"]["request"]


def test_rounds_come_from_the_weights_of_the_plan(undisturbed: OnPolicyRun) -> None:
    requests = [asked(store) for store in undisturbed.rounds()]
    assert [request["number"] for request in requests] == [0, 1, 2]
    assert [request["step"] for request in requests] == [undisturbed.plan.weights_step(number) for number in range(3)]
    digests = [request["digest"] for request in requests]
    assert len(set(digests)) == 3 - undisturbed.plan.lag  # the first lag + 1 rounds are the initial policy's
    assert all(len(request["canary"]) == RESPONSE_TOKENS for request in requests)


def test_a_round_holds_what_the_policy_said_and_what_the_reference_thinks_of_it(
    undisturbed: OnPolicyRun,
) -> None:
    store = TokenStore.open(undisturbed.rounds()[0])
    groups = [store[row] for row in range(len(store))]
    assert len(groups) == PLAN.refresh_every * PLAN.groups_per_step
    pairs = [group for group in groups if len(group.candidates) == 2]
    assert len(pairs) > len(groups) // 2
    for group in pairs:
        assert group.per_candidate["reward"][0] > group.per_candidate["reward"][1]
        # Drawn from the initial policy, which is the reference.
        assert group.per_token["behavior_token_logp"] == pytest.approx(group.per_token["ref_token_logp"], abs=1e-5)
    for candidate in (candidate for group in groups for candidate in group.candidates):
        assert candidate.finished == (candidate.ids[-1] == STOP_ID)
        assert STOP_ID not in candidate.ids[:-1]


def test_rounds_answer_the_prompts_of_the_stream_in_its_order(undisturbed: OnPolicyRun) -> None:
    prompts = StoredGroups(undisturbed.job.spec.prompts, undisturbed.job.spec.seed)
    for number, path in enumerate(undisturbed.rounds()):
        store = TokenStore.open(path)
        wanted = prompts.at(undisturbed.plan.round_positions(number))
        assert [store.index.name(row) for row in range(len(store))] == [drawn.name for drawn in wanted]
        for row, drawn in enumerate(wanted):
            assert store[row].prompt_ids.tolist() == drawn.read().prompt_ids.tolist()


def test_metrics_name_their_round(undisturbed: OnPolicyRun) -> None:
    rows = read_metrics(undisturbed.directory / "metrics.jsonl")
    assert [row["round"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    # At the first step policy, reference and behavior policy are one: log π/π_ref is 0 up to rounding.
    assert abs(rows[0]["rewards/chosen"]) < 0.1 * 1e-5 and abs(rows[0]["rewards/rejected"]) < 0.1 * 1e-5
    ledger = read_manifest(undisturbed.rounds()[0])["meta"]["ledger"]  # type: ignore[index]
    assert ledger["prompts"] == 8 and ledger["completions"] == ledger["scorer_calls"] == 24
    assert rows[0]["rollout/length"] == pytest.approx(ledger["tokens_generated"] / 24)


@pytest.mark.parametrize("last_step", [pytest.param(1, marks=pytest.mark.slow), 3, 5])
def test_a_killed_trainer_goes_on_with_the_same_rounds(
    undisturbed: OnPolicyRun, tmp_path: Path, model: Path, file: Path, last_step: int
) -> None:
    run = OnPolicyRun(tmp_path, model, file, plan=undisturbed.plan)

    def interrupt(row: Mapping[str, Any]) -> None:
        if row["step"] == last_step:
            raise Interrupted

    with pytest.raises(Interrupted):
        run.train(on_step=interrupt)
    committed = {path.name: (path / "MANIFEST.json").stat().st_mtime_ns for path in run.rounds()}
    run.train()
    after = {path.name: (path / "MANIFEST.json").stat().st_mtime_ns for path in run.rounds()}
    assert committed.items() <= after.items()
    assert sorted(after) == [path.name for path in undisturbed.rounds()]
    mine, theirs = weights(run.directory), weights(undisturbed.directory)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_stop_does_not_wait_for_a_round(undisturbed: OnPolicyRun, tmp_path: Path, model: Path, file: Path) -> None:
    """The second round is never drawn; the next attempt asks for it again, with weights of its own."""
    run, asked = OnPolicyRun(tmp_path, model, file, plan=undisturbed.plan), threading.Event()

    def leave(chunk: PromptChunk) -> None:
        if chunk.directory.name.startswith("round_000001"):
            asked.set()
            raise PoolClosed

    with pytest.raises(Stopped, match=r"stopped after step [0-2] of 6"):
        run.train(InProcess(leave), stop=asked.is_set)
    run.train()
    assert [path.name for path in run.rounds()] == [path.name for path in undisturbed.rounds()]
    mine, theirs = weights(run.directory), weights(undisturbed.directory)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_no_sample_of_a_revoked_version_is_trained_on(tmp_path: Path, model: Path, file: Path) -> None:
    """The newer attempt starts over and goes another way: what the older one drew with its later weights is left."""

    def interrupt(row: Mapping[str, Any]) -> None:
        if row["step"] == 5:
            raise Interrupted

    older = OnPolicyRun(tmp_path / "run", model, file, plan=PLAN)
    with pytest.raises(Interrupted):
        older.train(on_step=interrupt)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "prompts")
    runs = []
    for directory in (tmp_path / "run", tmp_path / "alone"):
        run = OnPolicyRun(directory, model, file, plan=PLAN)
        run.scenario = replace(run.scenario, lr=3e-3)
        run.train()
        runs.append(run)
    disturbed, alone = runs
    assert len(disturbed.rounds()) == 5 and len(alone.rounds()) == 3  # the first round's weights are the same
    assert {path.name for path in alone.rounds()} < {path.name for path in disturbed.rounds()}
    mine, theirs = weights(disturbed.directory), weights(alone.directory)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_killed_pool_draws_the_same_round_again(tmp_path: Path, undisturbed: OnPolicyRun, model: Path, file: Path):
    """Whatever a process left of its chunk, the chunk that is made again is the same bit for bit."""
    store = undisturbed.rounds()[0]
    spec = undisturbed.job.spec
    chunk = PromptChunk(name="0000000000", positions=range(0, 8), directory=tmp_path, weights=None)
    report = ChunkMaker()((spec, chunk))
    made = {path.name: path.read_bytes() for path in tmp_path.glob("0000000000.*")}
    for ending in ("tokens", "columns"):
        assert made[f"0000000000.{ending}"] and report.shard.has(f".{ending}")
        assert (store / f"shard-000000.{ending}").read_bytes().startswith(made[f"0000000000.{ending}"])


def test_other_weights_are_refused(tmp_path: Path, model: Path, file: Path) -> None:
    """A folder that holds another step's weights, and weights that were damaged on the way."""
    seen: list[PromptChunk] = []
    run = OnPolicyRun(tmp_path / "run", model, file, plan=replace(PLAN, steps=4))

    def keep(chunk: PromptChunk) -> None:
        if chunk.weights is not None and not seen:
            shutil.copytree(chunk.weights.directory, tmp_path / "kept")
            seen.append(replace(chunk, weights=replace(chunk.weights, directory=tmp_path / "kept")))

    run.train(InProcess(before=keep))
    (chunk,) = seen
    assert chunk.weights is not None
    job = (run.job.spec, replace(chunk, directory=tmp_path / "again"))
    assert ChunkMaker()(job).prompts == 8
    other = replace(chunk, weights=replace(chunk.weights, digest="0" * 64))
    with pytest.raises(UserError, match="does not hold the weights of step 0 that were asked for"):
        ChunkMaker()((run.job.spec, other))
    damaged = replace(
        chunk, weights=replace(chunk.weights, canary=tuple(value - 0.1 for value in chunk.weights.canary))
    )
    told = (
        r"score a fixed sequence 0\.1 nats per token away from the trainer .*: they arrived as they were sent, so that"
    )
    with pytest.raises(UserError, match=told):
        ChunkMaker()((run.job.spec, damaged))
    not_a_number = replace(chunk, weights=replace(chunk.weights, canary=(float("nan"),) * RESPONSE_TOKENS))
    with pytest.raises(UserError, match="inf nats per token"):
        ChunkMaker()((run.job.spec, not_a_number))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """An engine that scores the fixed sequence as ``value`` and holds weights of the digest ``found``."""

    value: float
    found: str | None

    def canary(self) -> tuple[float, ...]:
        return (self.value,) * RESPONSE_TOKENS

    def digest(self) -> str | None:
        return self.found


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        ("sent", "they arrived as they were sent, so that this process computes otherwise than the trainer"),
        ("other", "they were damaged on the way$"),
        (None, "either they were damaged on the way, or vLLM computes this family otherwise than transformers"),
    ],
)
def test_why_an_engine_scores_otherwise_is_said(found: str | None, cause: str) -> None:
    canary = (-3.0,) * RESPONSE_TOKENS
    weights = Weights(step=4, attempt="a", digest="sent", canary=canary, directory=None, num_bytes=0)
    refuse_broken_weights(Scored(value=-3.0, found=found), weights, torch.float32)
    with pytest.raises(UserError, match=rf"the weights of step 4 score .* 0\.5 nats .* \(limit .*\): {cause}"):
        refuse_broken_weights(Scored(value=-2.5, found=found), weights, torch.float32)


def test_a_prompt_that_the_scorer_fails_on_is_told_and_trains_nothing(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "poison" if n == 2 else f"question {n}"} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = prompt_stream(tmp_path, file, groups_per_step=4)
    scorer = RuleScorerConfig(function=f"{SCORER}:poisoned")
    spec = chunk_spec(model, prompts, scorer=scorer)
    report = ChunkMaker()((spec, PromptChunk(name="0", positions=range(4), directory=tmp_path / "out", weights=None)))
    (failure,) = report.quarantined
    assert (Path(failure["file"]).name, failure["line"]) == ("prompts.jsonl", 3)
    assert "ZeroDivisionError: the user's own mistake" in failure["reason"]
    assert report.prompts == 4 and report.labels <= 3
    store = commit_store(tmp_path / "out", [report.shard], meta={})
    # The order of the prompts is the stream's, and the poisoned one is what stays without candidates.
    alone = [row for row in range(4) if not store[row].candidates]
    assert [store[row].line for row in alone] == [3]
    spec = replace(spec, keep_unscored=True)
    report = ChunkMaker()((spec, PromptChunk(name="0", positions=range(4), directory=tmp_path / "kept", weights=None)))
    kept = commit_store(tmp_path / "kept", [report.shard], meta={})[alone[0]]
    assert len(kept.candidates) == 3 and np.isnan(kept.per_candidate["reward"]).all()


@pytest.mark.parametrize("shape", ["pair", "group", "one", "labelled"])
def test_a_prompt_that_kills_every_process_is_found_and_left_alone(
    tmp_path: Path, undisturbed: OnPolicyRun, model: Path, file: Path, shape: Shape
) -> None:
    """Positions 1 and 6 of the first round; the run goes on without them, and says which they were."""
    method = objective({"pair": "dpo", "group": "rloo", "one": "sft", "labelled": "kto"}[shape])
    run = OnPolicyRun(tmp_path, model, file, plan=undisturbed.plan, shape=shape, method=method, max_bad_fraction=0.25)

    def die(chunk: PromptChunk) -> None:
        if {1, 6} & set(chunk.positions) - set(chunk.fatal):
            raise ItemKilled("rollouts: a process died")

    run.train(InProcess(before=die))
    store = TokenStore.open(run.rounds()[0])
    assert [row for row in range(8) if not store[row].candidates] == [1, 6]
    told = [json.loads(line) for line in (run.rounds()[0] / "quarantine.jsonl").read_text().splitlines()]
    assert [f"{line['file']}:{line['line']}" for line in told] == [store.index.name(1), store.index.name(6)]
    assert {line["reason"] for line in told} == {"every process that worked on it died"}
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl"))


def test_what_no_single_prompt_is_to_blame_for_ends_the_run(tmp_path: Path, model: Path, file: Path) -> None:
    run = OnPolicyRun(tmp_path, model, file, plan=PLAN)

    def die(chunk: PromptChunk) -> None:
        if len(chunk.positions) > 4:  # as when memory runs out
            raise ItemKilled("rollouts: a process died in each of 4 attempts")

    with pytest.raises(UserError, match="a process died in each of 4 attempts"):
        run.train(InProcess(before=die))


def test_too_many_prompts_without_completions_end_the_run(tmp_path: Path, model: Path, file: Path) -> None:
    run = OnPolicyRun(tmp_path, model, file, plan=PLAN)

    def die(chunk: PromptChunk) -> None:
        if 3 in chunk.positions and 3 not in chunk.fatal:
            raise ItemKilled("rollouts: a process died")

    with pytest.raises(UserError, match="1 of 8 prompts have no scored completions, more than data.max_bad_fraction 0"):
        run.train(InProcess(before=die))


@pytest.mark.parametrize("name", ["sft", "exo_rw", "dpo", "rloo"])
def test_what_was_never_scored_is_no_part_of_any_loss(tmp_path: Path, model: Path, name: str) -> None:
    """Two runs whose one unscored prompt differs have the same loss and gradient."""
    rows_of = []
    for word in ("poison", "strong poison of another kind"):
        folder = tmp_path / word
        folder.mkdir()
        file = folder / "prompts.jsonl"
        rows = [{"prompt": word if n == 2 else f"question {n}"} for n in range(4)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        scorer = RuleScorerConfig(function=f"{SCORER}:poisoned")
        plan = RoundPlan(steps=1, refresh_every=1, lag=0, groups_per_step=4)
        method = objective(name, **({"reduction": "sequence"} if name == "sft" else {}))
        run = OnPolicyRun(folder, model, file, plan=plan, method=method, scorer=scorer, max_bad_fraction=0.5)
        run.train()
        rows_of += read_metrics(folder / "metrics.jsonl")
    for key in ("loss", "grad_norm"):
        assert rows_of[0][key] == pytest.approx(rows_of[1][key], rel=1e-4, abs=1e-5)
    assert rows_of[0]["grad_norm"] > 0.01


def test_stored_and_fresh_candidates_are_labelled_together(tmp_path: Path, model: Path, file: Path) -> None:
    """WPO's published mixture: the policy's own samples and a stored one, the same scorer for all."""
    prompts = prompt_stream(tmp_path, file, groups_per_step=4)
    spec = chunk_spec(model, prompts, keep_stored=True, label=LabelConfig(name="wpo", threshold=0.5, gap=0.1))
    report = ChunkMaker()((spec, PromptChunk(name="0", positions=range(10), directory=tmp_path / "out", weights=None)))
    assert report.scorer_calls == 10 * (3 + 2) and report.completions == 30
    assert report.labels == 10  # "aeiou 3" scores 5/7, "xyz" nothing
    store = commit_store(tmp_path / "out", [report.shard], meta={})
    for row in range(10):
        chosen, rejected = store[row].per_candidate["reward"]
        assert chosen >= 0.5 and rejected <= chosen - 0.1
        known = ~np.isnan(store[row].per_candidate["behavior_logp"])
        assert not known[0] or chosen != pytest.approx(5 / 7)  # nobody knows who wrote the stored ones


def test_stored_candidates_can_be_labelled_again(tmp_path: Path, model: Path, file: Path) -> None:
    prompts = prompt_stream(tmp_path, file, groups_per_step=4)
    spec = chunk_spec(model, prompts, sampling=None, engine="none", keep_stored=True, needs_reference=False)
    report = ChunkMaker()((spec, PromptChunk(name="0", positions=range(10), directory=tmp_path / "out", weights=None)))
    assert (report.completions, report.scorer_calls, report.labels) == (0, 20, 10)
    assert report.reward_sum == pytest.approx(10 * 5 / 7)


def test_labelled_examples_carry_another_prompts_completion(tmp_path: Path, model: Path, file: Path) -> None:
    prompts = prompt_stream(tmp_path, file, groups_per_step=4)
    spec = chunk_spec(model, prompts, shape="labelled")
    report = ChunkMaker()((spec, PromptChunk(name="0", positions=range(6), directory=tmp_path / "out", weights=None)))
    store = commit_store(tmp_path / "out", [report.shard], meta={})
    groups = [store[row] for row in range(6)]
    for row, group in enumerate(groups):
        assert group.candidates[1].ids.tolist() == groups[(row + 1) % 6].candidates[0].ids.tolist()
    reference = FrozenModel(spec.reference, torch.device("cpu"))
    for group, logps in zip(groups, reference.token_logps(groups), strict=True):
        assert group.per_token["ref_token_logp"].tolist() == logps.tolist()
