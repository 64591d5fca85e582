"""Runs on rounds whose workspace is lost: they go on from their copies, in another place, with the very same rounds."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mirrors
import pytest
import torch
from mirrors import Lost, There, found_again, lost_after
from safetensors.torch import load_file
from tiny_rollouts import InProcess, OnPolicyRun
from tiny_runs import CPU, objective, same_optimizer, source_maker, store, synthetic_groups

from rayalign.comparison.record import cell_cost
from rayalign.config.training import StrategyConfig
from rayalign.engine.batches import State, Weights
from rayalign.engine.checkpoint.checkpoint import step_of
from rayalign.engine.checkpoint.mirror import rounds_of, send_rounds, upload
from rayalign.engine.loop import train_policy
from rayalign.engine.metrics import read_metrics
from rayalign.engine.objective import MAIN_STREAM
from rayalign.engine.strategy.base import make_strategy
from rayalign.errors import Stopped
from rayalign.rounds.chunk import ChunkMaker, PromptChunk
from rayalign.rounds.client import RoundsClient
from rayalign.rounds.plan import RoundPlan
from rayalign.rounds.service import serve_rounds
from rayalign.rounds.streams import MixedStream
from rayalign.rounds.weights import WeightsGone
from rayalign.rounds.workers import PoolClosed
from rayalign.runtime.worker import TrainJob
from rayalign.storage.copies import Copies, Mirror, open_mirror
from rayalign.storage.manifest import MANIFEST, manifest_digest, verify

mirror, server = mirrors.mirror, mirrors.server
PLAN = RoundPlan(steps=6, refresh_every=2, lag=0, groups_per_step=4)
TWICE = RoundPlan(steps=8, refresh_every=4, lag=0, groups_per_step=4, passes=2)
PLANS = {
    "synchronous": PLAN,
    "lag 1": replace(PLAN, lag=1),
    "lag 2": replace(PLAN, lag=2),
    "half of it stored": replace(PLAN, lag=1, fresh_fraction=0.5),
    "two passes of RLOO": replace(TWICE, lag=1),
    "two passes of PPO": TWICE,
}
Make = Callable[..., OnPolicyRun]


@pytest.fixture(scope="module")
def make(model: Path, file: Path) -> Make:
    """``make(kind, directory, **settings)``: a checkpoint after every step, unless ``settings`` say otherwise."""

    def make(kind: str, directory: Path, **settings: Any) -> OnPolicyRun:
        method = {"two passes of RLOO": "rloo", "two passes of PPO": "ppo"}.get(kind, "dpo")
        run = OnPolicyRun(
            directory,
            model,
            file,
            plan=PLANS[kind],
            method=objective(method),
            settings={"checkpoint_every": 1, **settings},
        )
        if kind == "half of it stored":
            stored = store(directory / "pairs", synthetic_groups([2] * 10), reference=model, groups_per_step=4)
            (fresh,) = run.scenario.streams
            mixed = MixedStream(name=MAIN_STREAM, fresh=fresh, stored=stored, fresh_fraction=0.5, groups_per_step=4)
            run.scenario = replace(run.scenario, streams=(mixed,))
        return run

    return make


@pytest.fixture(scope="module")
def undisturbed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OnPolicyRun]:
    """``undisturbed(kind)``: a run that nothing happened to."""

    @functools.cache
    def finished(kind: str) -> OnPolicyRun:
        run = make(kind, tmp_path_factory.mktemp("whole") / "run")
        run.train()
        return run

    return finished


def same_end(one: OnPolicyRun, other: OnPolicyRun) -> None:
    """Weights and optimizer, every bit, those of a critic too, and every row."""
    critic = (other.directory / "final_critic").exists()
    for place in ("final", *(("final_critic",) if critic else ())):
        mine, theirs = (load_file(each.directory / place / "model.safetensors") for each in (one, other))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for folder in ("", *(("critic",) if critic else ())):
        assert same_optimizer(*(newest(each) / folder for each in (one, other)))
    assert rows(one) == rows(other)
    assert [row["step"] for row in rows(one)] == list(range(1, other.plan.steps + 1))


def newest(run: OnPolicyRun) -> Path:
    return max((run.directory / "checkpoints").glob("step_*"), key=step_of)


def rows(run: OnPolicyRun) -> list[dict[str, Any]]:
    clocks = ("seconds", "rollout/seconds", "refresh/")
    found = read_metrics(run.directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in found]


def committed(run: OnPolicyRun) -> set[str]:
    return {path.name for path in run.rounds() if (path / MANIFEST).exists()}


def copied(mirror: Mirror) -> set[str]:
    """Folders of rounds, weights and columns, without what is random in their names."""
    found = {name.removeprefix("rounds/").rpartition("/")[0] for name in There(mirror).names() if "rounds/" in name}
    return {name.partition("-")[0] for name in found}


def never(number: int) -> InProcess:
    """A pool that is gone before it draws this round."""

    def leave(chunk: PromptChunk) -> None:
        if chunk.directory.name.startswith(f"round_{number:06d}"):
            raise PoolClosed

    return InProcess(leave)


@pytest.mark.parametrize(
    "kind", [own if own in ("synchronous", "lag 2") else pytest.param(own, marks=pytest.mark.slow) for own in PLANS]
)
def test_a_workspace_that_is_lost_after_every_step_changes_no_bit(
    kind: str, undisturbed: Callable[[str], OnPolicyRun], make: Make, mirror: Mirror, tmp_path: Path
) -> None:
    """Each attempt, in a place of its own, gets one step further; rounds that came back are not drawn again."""
    whole = undisturbed(kind)
    for step in range(2, whole.plan.steps + 2):
        run, pool = make(kind, tmp_path / f"{step}" / "run", mirror=mirror), InProcess()
        place, notes = found_again(run.spec())
        assert (step_of(place) if place is not None else 0) == step - 2 and not any("skip" in note for note in notes)
        found = committed(run)
        if step <= whole.plan.steps:
            with pytest.raises(Lost):
                run.train(pool, on_step=lost_after(step))
            shutil.rmtree(run.directory)
        else:
            run.train(pool)
        assert not found & {name.partition("/")[0] for name in pool.made}
        inside = (step - 2) % whole.plan.refresh_every != 0
        assert bool(found) or not inside
    same_end(run, whole)


def test_a_round_that_was_not_drawn_yet_is_drawn_with_its_own_weights(
    undisturbed: Callable[[str], OnPolicyRun], make: Make, mirror: Mirror, tmp_path: Path
) -> None:
    """The second round is asked for before the first step, and nobody draws it before the workspace is lost."""
    run = make("lag 1", tmp_path / "first", mirror=mirror)
    with pytest.raises(Lost):
        run.train(never(1), on_step=lost_after(2))
    shutil.rmtree(run.directory)
    assert copied(mirror) == {"round_000000", "weights/step_000000"}
    run, pool = make("lag 1", tmp_path / "second", mirror=mirror), InProcess()
    place, _ = found_again(run.spec())
    assert place is not None and step_of(place) == 1
    assert [path.name[:12] for path in run.rounds()] == ["round_000000"]
    [weights] = (run.directory / "rounds" / "weights").iterdir()
    assert verify(weights)["step"] == 0
    run.train(pool)
    assert {name[:12] for name in pool.made} == {"round_000001", "round_000002"}
    same_end(run, undisturbed("lag 1"))


class Memory:
    """A way for weights that ends with its process."""

    def __init__(self) -> None:
        self.held: dict[str, State] = {}

    def send(self, weights: Weights, state: State) -> None:
        self.held[weights.version] = {name: tensor.clone() for name, tensor in state.items()}

    def fetch(self, weights: Weights) -> State | None:
        if weights.version not in self.held and weights.directory is None:
            raise WeightsGone(weights)
        return self.held.get(weights.version)


def train_through_memory(run: OnPolicyRun, pool: InProcess, **arguments: Any) -> None:
    memory = Memory()
    pool.maker = ChunkMaker(memory)

    rounds = RoundsClient(run.scenario.source, channel=memory)
    make = source_maker(run.scenario, rounds=rounds)
    with serve_rounds(run.job, pool, run.notes.append):
        train_policy(run.spec(), make, make_strategy("single", CPU), rounds=rounds, **arguments)


def test_a_stop_before_a_round_whose_weights_were_in_memory_alone(
    undisturbed: Callable[[str], OnPolicyRun], make: Make, mirror: Mirror, tmp_path: Path
) -> None:
    """The checkpoint that the stop writes, at a boundary, needs no round: the next attempt sends the weights again."""
    run, asked = make("synchronous", tmp_path / "first", mirror=mirror, checkpoint_every=4), threading.Event()

    def leave(chunk: PromptChunk) -> None:
        if chunk.directory.name.startswith("round_000001"):
            asked.set()
            raise PoolClosed

    with pytest.raises(Stopped, match="stopped after step 2 of 6"):
        train_through_memory(run, InProcess(leave), stop=asked.is_set)
    assert not (run.directory / "rounds" / "weights").exists()
    shutil.rmtree(run.directory)
    assert There(mirror).checkpoints() == [2] and copied(mirror) == set()
    run = make("synchronous", tmp_path / "second", mirror=mirror, checkpoint_every=4)
    place, _ = found_again(run.spec())
    assert place is not None and step_of(place) == 2
    train_through_memory(run, InProcess())
    same_end(run, undisturbed("synchronous"))


@pytest.mark.parametrize(
    ("kind", "every", "kept"),
    [
        ("synchronous", 2, set()),  # no checkpoint is inside a round
        ("synchronous", 3, {"round_000001"}),
        ("lag 1", 2, {"round_000002"}),  # asked for at step 2, needed from step 4 on; its weights are not, any more
        ("two passes of RLOO", 3, {"round_000001", "prepared/round_000001"}),
        ("two passes of PPO", 3, {"round_000001", "prepared/round_000001"}),
    ],
)
def test_copies_are_of_the_rounds_that_kept_checkpoints_need(
    kind: str, every: int, kept: set[str], make: Make, mirror: Mirror, tmp_path: Path
) -> None:
    run = make(kind, tmp_path / "run", mirror=mirror, checkpoint_every=every)
    run.train()
    assert copied(mirror) == kept
    there = There(mirror)
    for name in there.names():
        if name.startswith("rounds/"):
            assert there.read(name) == (run.directory / name).read_bytes()


@pytest.fixture(scope="module")
def lost(make: Make, tmp_path_factory: pytest.TempPathFactory) -> OnPolicyRun:
    """Checkpoints 1 to 5: the third is inside the second round, the fifth inside the third."""
    run = make("synchronous", tmp_path_factory.mktemp("lost") / "run", checkpoint_keep=9)
    with pytest.raises(Lost):
        run.train(on_step=lost_after(6))
    return run


@pytest.mark.parametrize("damage", ["altered", "a file is missing", "missing", "another round", "another manifest"])
def test_a_checkpoint_whose_round_is_not_whole_is_skipped(
    damage: str, lost: OnPolicyRun, make: Make, mirror: Mirror, tmp_path: Path
) -> None:
    upload(mirror, lost.directory, step=5)
    there, (_, second, third) = There(mirror), lost.rounds()
    base = f"rounds/{third.name}"
    if damage == "altered":
        content = bytearray(there.read(f"{base}/0000000016.tokens"))
        content[3] ^= 1
        there.write(f"{base}/0000000016.tokens", bytes(content))
        told = "does not have the digest"
    elif damage == "a file is missing":
        there.files.delete_file(f"{there.root}/{base}/0000000016.columns")
        told = "0000000016.columns is missing"
    elif damage == "missing":
        there.files.delete_file(f"{there.root}/{base}/{MANIFEST}")
        told = f"{base} is missing"
    elif damage == "another round":
        for path in second.iterdir():
            there.write(f"{base}/{path.name}", path.read_bytes())
        told = "is not the one that was trained on"
    else:
        there.write(f"{base}/{MANIFEST}", b"{}")
        told = "is not what was written"
    run = make("synchronous", tmp_path / "again", mirror=mirror, checkpoint_keep=9)
    place, notes = found_again(run.spec())
    assert place is not None and step_of(place) == 4
    assert "/checkpoints/step_000005-" in notes[-1] and "not whole" in notes[-1] and told in notes[-1]
    assert [path.name for path in run.rounds()] == [path.name for path in lost.rounds()[:2]]
    if damage == "another round":
        run.train()
        assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
        assert there.checkpoints() == [1, 2, 3, 4, 5, 6]
        assert there.read(f"{base}/{MANIFEST}") == (run.rounds()[2] / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "rounds/../final",
        "rounds/..",
        "final",
        "checkpoints/step_000001-a0",
        "/tmp/escaped",
        "rounds/failure.txt",
        "rounds/requests",
        "rounds/weights",
        "rounds/prepared",
    ],
)
def test_a_checkpoint_that_needs_what_is_no_round_fetches_nothing(
    name: str, lost: OnPolicyRun, mirror: Mirror, tmp_path: Path
) -> None:
    """Its digests are right: whoever may write there made them."""
    upload(mirror, lost.directory, step=5)
    there = There(mirror)
    place = there.of(5, MANIFEST)
    manifest = json.loads(there.read(place))
    manifest["facts"]["rounds"]["begun"] = {name: "0" * 64}
    del manifest["manifest_sha256"]
    there.write(place, json.dumps({**manifest, "manifest_sha256": manifest_digest(manifest)}).encode())
    spec = replace(lost.spec(), directory=tmp_path / "deep" / "again", mirror=mirror)
    found, notes = found_again(spec)
    assert found is not None and step_of(found) == 4
    assert f"names {name!r}, which is no round" in notes[-1]
    assert sorted(path.name for path in spec.directory.iterdir()) == ["checkpoints", "metrics.jsonl", "rounds"]


def test_a_checkpoint_that_does_not_name_its_rounds_is_not_fetched(
    lost: OnPolicyRun, mirror: Mirror, tmp_path: Path
) -> None:
    upload(mirror, lost.directory, step=5)
    there = There(mirror)
    place = there.of(5, MANIFEST)
    manifest = json.loads(there.read(place))
    del manifest["facts"]["rounds"], manifest["manifest_sha256"]
    there.write(place, json.dumps({**manifest, "manifest_sha256": manifest_digest(manifest)}).encode())
    found, notes = found_again(replace(lost.spec(), directory=tmp_path / "again", mirror=mirror))
    assert found is not None and step_of(found) == 4 and "does not name the rounds that it needs" in notes[-1]


@pytest.mark.parametrize("kind", ["synchronous", "lag 1"])
def test_rounds_that_are_lost_alone_come_back(kind: str, make: Make, mirror: Mirror, tmp_path: Path) -> None:
    """The newest checkpoint is here; sending what is here takes nothing from the mirror."""
    run = make(kind, tmp_path / "run", mirror=mirror)
    with pytest.raises(Lost):
        run.train(on_step=lost_after(4))
    needed = copied(mirror)
    before = {path.name: (path / MANIFEST).read_bytes() for path in run.rounds()}
    shutil.rmtree(run.directory / "rounds")
    newest = max(step_of(path) for path in (run.directory / "checkpoints").glob("step_*"))
    upload(mirror, run.directory, step=newest)
    assert copied(mirror) == needed
    assert found_again(run.spec()) == (None, [])
    rounds = {path.name: (path / MANIFEST).read_bytes() for path in run.rounds()}
    assert rounds and rounds.items() <= before.items()


def test_a_round_of_another_run_is_not_taken_for_one_that_is_still_to_be_drawn(
    make: Make, mirror: Mirror, tmp_path: Path
) -> None:
    """Equal initial weights give it the same name; that run never committed a checkpoint there."""
    other = make("lag 1", tmp_path / "other")
    other.scenario = replace(other.scenario, lr=3e-3)
    with pytest.raises(Lost):
        other.train(on_step=lost_after(3))
    stale = other.rounds()[1]
    there = There(mirror)
    there.files.create_dir(f"{there.root}/rounds/{stale.name}", recursive=True)
    for path in stale.iterdir():
        there.write(f"rounds/{stale.name}/{path.name}", path.read_bytes())
    run = make("lag 1", tmp_path / "run", mirror=mirror)
    with pytest.raises(Lost):
        run.train(never(1), on_step=lost_after(2))
    assert f"rounds/{stale.name}/{MANIFEST}" not in there.names()
    again = make("lag 1", tmp_path / "again", mirror=mirror)
    found_again(again.spec())
    assert [path.name[:12] for path in again.rounds()] == ["round_000000"]


def test_a_checkpoint_whose_round_is_not_whole_here_is_not_copied(
    lost: OnPolicyRun, mirror: Mirror, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To a mirror that is new to the run; the checkpoints that do not need that round are copied."""
    directory = tmp_path / "run"
    shutil.copytree(lost.directory, directory)
    (directory / "rounds" / lost.rounds()[2].name / "0000000016.tokens").unlink()
    upload(mirror, directory, step=5)
    assert There(mirror).checkpoints() == [1, 2, 3, 4] and copied(mirror) == {"round_000000", "round_000001"}
    assert "0000000016.tokens is missing" in caplog.text and "not copied to" in caplog.text


def test_weights_that_go_while_they_are_sent_leave_their_round(
    undisturbed: Callable[[str], OnPolicyRun], make: Make, mirror: Mirror, tmp_path: Path
) -> None:
    """The driver commits the round, and removes them, at the worst moment: after the first file was sent."""
    run = make("lag 1", tmp_path / "run")
    with pytest.raises(Lost):
        run.train(never(1), on_step=lost_after(2))
    drawn, (weights,) = undisturbed("lag 1").rounds()[1], (run.directory / "rounds" / "weights").iterdir()

    class Raced(Copies):
        def send(self, source: Path, name: str) -> None:
            super().send(source, name)
            if source.parent == weights:
                shutil.copytree(drawn, run.directory / "rounds" / drawn.name)
                shutil.rmtree(weights)

    with open_mirror(mirror) as copies:
        send_rounds(Raced(copies.files, copies.root), run.directory, rounds_of(verify(newest(run))["facts"]))
        assert copies.holds(drawn, f"rounds/{drawn.name}")
        assert not copies.has(f"rounds/weights/{weights.name}/{MANIFEST}")


def test_the_cost_of_a_lost_round_is_known_from_its_rows(lost: OnPolicyRun, tmp_path: Path) -> None:
    """Tokens, labels and calls of the scorer: as the rounds' own ledgers say."""
    folder = tmp_path / "rounds"
    shutil.copytree(lost.job.folder, folder)
    job = TrainJob(
        spec=lost.spec(),
        source=lost.scenario.source,
        held_out=None,
        strategy=StrategyConfig(name="single"),
        workers=1,
        share=lost.job.share,
        run="",
        rollouts=replace(lost.job, folder=folder),
    )
    found = read_metrics(lost.directory / "metrics.jsonl")
    whole = cell_cost(job, found)
    assert whole.scorer_calls == 3 * 8 * 3 and 0 < whole.labels_used <= 24 < whole.tokens_generated
    shutil.rmtree(folder / lost.rounds()[0].name)
    assert cell_cost(job, found) == whole
