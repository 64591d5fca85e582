"""On-policy training and generation from the command line, with a real pool of actors that die."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
import safetensors.numpy
from workspaces import Workspace, metrics, rayalign, wait_until, weights

from rayalign.config.candidates import Drawing
from rayalign.config.policy import OnPolicyConfig, RolloutConfig
from rayalign.data.store import TokenStore
from rayalign.engine.batches import Weights
from rayalign.errors import UserError
from rayalign.placement import Share
from rayalign.rounds.service import RolloutJob
from rayalign.rounds.weights import WeightsGone
from rayalign.runtime.pool import Pool
from rayalign.runtime.session import Session
from rayalign.runtime.trainer import Trainer
from rayalign.runtime.weights import ObjectStore
from rayalign.storage.manifest import read_manifest

pytestmark = pytest.mark.ray

REWARDS = '''
import os
import signal
import time
from pathlib import Path

HERE = Path(__file__).parent


def vowels(prompt, reply):
    return sum(character in "aeiou" for character in reply) / max(1, len(reply))


def kill_the_actor():
    """It is the parent of the process that rewards run in."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)


def dies(prompt, reply, *, times, name):
    """Takes its actor with it, on each of the first calls."""
    deaths = HERE / f"deaths_{name}"
    deaths.mkdir(exist_ok=True)
    number = len(list(deaths.iterdir()))
    if number < times and "e" in reply:
        (deaths / str(number)).touch()
        kill_the_actor()
    return vowels(prompt, reply)


def dies_of(prompt, reply, *, prompt_of_death):
    if prompt == prompt_of_death:
        kill_the_actor()
    return vowels(prompt, reply)
'''


def on_policy(scorer: dict[str, Any], **blocks: Any) -> dict[str, Any]:
    return {
        "data_policy": {"name": "on_policy", "refresh_every": 2},
        "rollout": {"engine": "hf", "samples": 2, "max_new_tokens": 12},
        "scorer": {"name": "rule", **scorer},
        "optim": {"lr": 1e-3, "steps": 4, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
        "checkpoint": {"every": 2},
        **blocks,
    }


@pytest.fixture(scope="module", autouse=True)
def rewards(workspace: Workspace) -> None:
    (workspace.folder / "rewards.py").write_text(REWARDS)


@pytest.fixture(scope="module")
def undisturbed(workspace: Workspace, session: Session) -> Path:
    done = rayalign("train", workspace.run("on-policy", **on_policy({"function": "rewards:vowels"})))
    assert done.code == 0, done.printed
    return workspace.directory("on-policy")


def rounds(directory: Path) -> list[Path]:
    return sorted((directory / "rounds").glob("round_*"))


def test_a_run_trains_on_its_own_samples(undisturbed: Path) -> None:
    rows = metrics(undisturbed)
    assert [row["round"] for row in rows] == [0, 0, 1, 1]
    assert abs(rows[0]["loss"] - 0.693147) < 1e-5
    assert len(rounds(undisturbed)) == 2
    assert not (undisturbed / "rounds" / "weights").exists()  # they came through the object store
    assert rows[2]["refresh/bytes"] == sum(
        array.nbytes for array in safetensors.numpy.load(weights(undisturbed)).values()
    )
    assert "refresh/bytes" not in rows[0]  # an engine that starts is not refreshed
    assert rows[2]["refresh/bytes_per_second"] == pytest.approx(rows[2]["refresh/bytes"] / rows[2]["refresh/seconds"])
    facts = json.loads((undisturbed / "run.json").read_text())
    assert facts["status"] == "finished" and len(facts["data"]) == 3  # the prompts and two rounds
    for path in rounds(undisturbed):
        manifest = read_manifest(path)
        assert manifest is not None
        ledger = manifest["meta"]["ledger"]
        assert ledger["prompts"] == 16 and ledger["completions"] == ledger["scorer_calls"] == 32


@pytest.mark.slow
def test_what_a_dead_actor_left_is_drawn_again_bit_for_bit(
    workspace: Workspace, session: Session, undisturbed: Path
) -> None:
    scorer = {"function": "rewards:dies", "arguments": {"times": 2, "name": "twice"}}
    done = rayalign("train", workspace.run("killed", **on_policy(scorer)))
    assert done.code == 0, done.printed
    assert len(list((workspace.folder / "deaths_twice").iterdir())) == 2
    assert weights(workspace.directory("killed")) == weights(undisturbed)
    for killed, whole in zip(rounds(workspace.directory("killed")), rounds(undisturbed), strict=True):
        assert TokenStore.open(killed).digest == TokenStore.open(whole).digest


@pytest.mark.slow
def test_trainer_and_actor_take_turns(workspace: Workspace, session: Session, undisturbed: Path) -> None:
    """The same run on the same cores: each has them all while the other waits."""
    blocks = on_policy({"function": "rewards:vowels"})
    blocks["rollout"] |= {"placement": "shared", "actors": [0, 2]}
    done = rayalign("train", workspace.run("turns", **blocks))
    assert done.code == 0, done.printed
    facts = json.loads((workspace.directory("turns") / "run.json").read_text())
    assert facts["threads_per_worker"] == max(1, int(session.num_cpus))
    ours, theirs = metrics(workspace.directory("turns")), metrics(undisturbed)
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=2e-4)


@pytest.mark.slow
def test_a_prompt_that_kills_every_actor_is_left_out_and_told(workspace: Workspace, session: Session) -> None:
    rows = [{"prompt": f"question {n}"} for n in range(16)]
    (workspace.folder / "sixteen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks = on_policy({"function": "rewards:dies_of", "arguments": {"prompt_of_death": "question 11"}})
    blocks["optim"] |= {"steps": 2}
    blocks["data"] = {"train": ["pairs.jsonl"], "max_prompt_tokens": 48, "max_tokens": 96, "max_bad_fraction": 0.1}
    blocks["data_policy"]["prompts"] = "sixteen.jsonl"
    done = rayalign("train", workspace.run("poisoned", **blocks))
    assert done.code == 0, done.printed
    directory = workspace.directory("poisoned")
    (told,) = [json.loads(line) for line in (directory / "quarantine.jsonl").read_text().splitlines()]
    assert (Path(told["file"]).name, told["line"]) == ("sixteen.jsonl", 12)
    assert told["reason"] == "every process that worked on it died"
    assert len(metrics(directory)) == 2


@pytest.mark.slow
def test_what_kills_every_actor_ends_the_run_with_a_message(workspace: Workspace, session: Session) -> None:
    scorer = {"function": "rewards:dies", "arguments": {"times": 999, "name": "always"}}
    done = rayalign("train", workspace.run("always-killed", **on_policy(scorer)))
    assert done.code == 2
    assert "a process died in each of 4 attempts" in done.printed and "Traceback" not in done.printed


@pytest.mark.slow
def test_the_set_that_wpo_was_published_with(workspace: Workspace, session: Session) -> None:
    """Five of its own at T 0.7 and top-p 0.95 beside a stored one, all scored, then labelled (2406.11827, §4.1)."""
    rows = [{"prompt": f"question {n}", "completion": "aeiou" if n % 2 else "xyz"} for n in range(24)]
    (workspace.folder / "stored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    threshold, gap = 0.3, 0.2
    path = workspace.run(
        "published",
        data={"train": ["stored.jsonl"], "max_prompt_tokens": 48, "max_tokens": 96},
        method={"name": "wpo"},
        data_policy={"name": "hybrid", "mix": "candidates", "refresh_every": "never"},
        rollout={"engine": "hf", "samples": 5, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 12},
        label={"name": "wpo", "threshold": threshold, "gap": gap},
        scorer={"name": "rule", "function": "rewards:vowels"},
        optim={"lr": 1e-3, "steps": 3, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
    )
    done = rayalign("train", path)
    assert done.code == 0, done.printed
    (artifact,) = (workspace.storage / "artifacts").glob("rollouts-*")
    manifest = read_manifest(artifact)
    assert manifest is not None
    ledger, inputs = manifest["meta"]["ledger"], manifest["meta"]["inputs"]
    assert (ledger["prompts"], ledger["completions"], ledger["scorer_calls"]) == (24, 24 * 5, 24 * 6)
    assert (inputs["sampling"]["temperature"], inputs["sampling"]["top_p"]) == (0.7, 0.95)
    store = TokenStore.open(artifact)
    pairs = [store[row] for row in range(len(store)) if len(store[row].candidates) == 2]
    assert len(pairs) == ledger["labels"] >= 12  # every prompt whose stored completion is "aeiou" has one
    for group in pairs:
        chosen, rejected = group.per_candidate["reward"]
        assert chosen >= threshold and rejected <= chosen - gap + 1e-6
    assert len(metrics(workspace.directory("published"))) == 3


@pytest.mark.slow
def test_generated_and_scored_files_are_data_again(workspace: Workspace, session: Session) -> None:
    few = workspace.folder / "few.jsonl"
    few.write_text("".join((workspace.folder / "pairs.jsonl").read_text().splitlines(keepends=True)[:12]))
    data = {"train": ["few.jsonl"], "max_prompt_tokens": 48, "max_tokens": 96}
    rollout = {"engine": "hf", "samples": 3, "max_new_tokens": 12}
    path = workspace.run("made", data=data, rollout=rollout, scorer={"name": "rule", "function": "rewards:vowels"})
    out = workspace.folder / "completions.jsonl"
    done = rayalign("generate", path, "--out", str(out))
    assert done.code == 0, done.printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        assert len(row["completions"]) == len(row["rewards"]) == len(row["behavior_logps"]) == 3
        assert row["sampling"]["num_samples"] == 3 and len(row["model"]) == 64
        vowels = [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in row["completions"]]
        assert row["rewards"] == pytest.approx(vowels, abs=1e-6)
    again = rayalign("generate", path, "--out", str(out))
    assert "making" not in again.printed

    best = workspace.folder / "best.jsonl"
    done = rayalign("generate", path, "--best", "--out", str(best))
    assert done.code == 0, done.printed
    kept = [json.loads(line) for line in best.read_text().splitlines()]
    assert [row["completion_score"] for row in kept] == [max(row["rewards"]) for row in rows]
    for row, whole in zip(kept, rows, strict=True):
        assert row["prompt"] == whole["prompt"] and row["completion"] in whole["completions"]
    tuning = workspace.run("on-best", data={**data, "train": [str(best)]}, method="sft", optim={"steps": 2})
    assert rayalign("train", tuning).code == 0
    both = rayalign("generate", path, "--best", "--pairs", "--out", str(best))
    assert both.code == 2 and "--pairs and --best: a file has one of the two" in both.printed

    pairs = workspace.folder / "new_pairs.parquet"
    scoring = workspace.run(
        "scored", data={**data, "train": [str(out)]}, scorer={"name": "rule", "function": "rewards:vowels"}
    )
    done = rayalign("score", scoring, "--pairs", "--out", str(pairs))
    assert done.code == 0, done.printed
    training = workspace.run("on-pairs", data={**data, "train": [str(pairs)]}, optim={"steps": 2, "groups_per_step": 4})
    assert rayalign("train", training).code == 0
    refused = rayalign("train", workspace.run("on-ranked", data={**data, "train": [str(out)]}))
    assert refused.code == 2 and "does not say which is preferred" in refused.printed


def test_a_pool_that_no_node_can_hold_is_refused_at_once(session: Session) -> None:
    pool = Pool("giants", attrgetter, "real", share=Share(cpus=1000, gpus=0, threads=1), most=1)
    with pytest.raises(UserError, match="giants needs a node with 1000 CPUs and 0 GPUs for each of its processes"):
        pool.call(1)


@pytest.mark.slow
def test_a_pool_answers_every_item_once(session: Session) -> None:
    with Pool("identity", attrgetter, "real", share=Share(cpus=0.1, gpus=0, threads=1), most=2) as pool:
        assert list(pool.map(range(20))) == list(range(20))


@pytest.mark.slow
def test_an_elastic_pool_uses_the_room_there_is_and_gives_it_back(session: Session, monkeypatch) -> None:
    """Four actors of two thirds of the cluster each: one has a place, the others never get one."""
    cpus = session.num_cpus * 2 / 3
    with Pool("elastic", attrgetter, "real", share=Share(cpus=cpus, gpus=0, threads=1), most=4, least=0) as pool:
        assert list(pool.map(range(20))) == list(range(20))
        assert len(pool.actors) == 1
        pool.release()
        assert len(pool.actors) == 1  # it has had work just now
        monkeypatch.setattr("rayalign.runtime.pool.IDLE_SECONDS", 0.0)
        pool.release()
        assert (pool.actors, pool.idle, pool.pending) == ([], [], [])
        assert pool.call(7) == 7


@pytest.mark.slow
def test_a_trainer_that_ends_leaves_another_its_weights(session: Session, tmp_path: Path) -> None:
    """Cells of a comparison are trained side by side, and one trainer runs out of them first."""
    nothing = cast(Any, SimpleNamespace(engine="hf", policy=None))
    job = RolloutJob(
        spec=nothing,
        plan=nothing,
        folder=tmp_path,
        most=1,
        least=0,
        share=Share(cpus=1, gpus=0, threads=1),
        drawing=Drawing(policy=OnPolicyConfig(), rollout=RolloutConfig(engine="hf"), labelling=nothing),
        max_bad_fraction=0.0,
    )
    version = Weights(step=0, attempt="a", digest="0" * 64, directory=None, canary=(), num_bytes=0)
    with Trainer() as other:
        with Trainer() as first:
            for trainer in (first, other):
                trainer.rollout_pool(job)
                assert ray.get(ray.get_actor(trainer.board_name).get.remote(version.version)) is None
        gone = ObjectStore(board=first.board_name)
        wait_until(lambda: not is_there(gone.board), "the end of the first trainer's board")
        with pytest.raises(WeightsGone):  # which were never sent: the board is there, and says so
            ObjectStore(board=other.board_name).fetch(version)


def is_there(actor: str) -> bool:
    try:
        ray.get_actor(actor)
    except ValueError:
        return False
    return True
