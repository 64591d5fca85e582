"""On-policy training and generation from the command line, with a real pool of actors that die."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from workspaces import Workspace, metrics, rayalign, weights

from rayalign.data.store import TokenStore
from rayalign.errors import UserError
from rayalign.manifest import read_manifest
from rayalign.runtime.placement import Share
from rayalign.runtime.pool import Pool
from rayalign.runtime.session import Session

pytestmark = pytest.mark.ray

REWARDS = '''
import os
import signal
from pathlib import Path

HERE = Path(__file__).parent


def vowels(prompt, reply):
    return sum(character in "aeiou" for character in reply) / max(1, len(reply))


def dies(prompt, reply, *, times, name):
    """Takes its process with it, on each of the first calls."""
    deaths = HERE / f"deaths_{name}"
    deaths.mkdir(exist_ok=True)
    number = len(list(deaths.iterdir()))
    if number < times and "e" in reply:
        (deaths / str(number)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
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
    facts = json.loads((undisturbed / "run.json").read_text())
    assert facts["status"] == "finished" and len(facts["data"]) == 3  # the prompts and two rounds
    for path in rounds(undisturbed):
        manifest = read_manifest(path)
        assert manifest is not None
        ledger = manifest["meta"]["ledger"]
        assert ledger["prompts"] == 16 and ledger["completions"] == ledger["scorer_calls"] == 32


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
def test_what_kills_every_actor_ends_the_run_with_a_message(workspace: Workspace, session: Session) -> None:
    scorer = {"function": "rewards:dies", "arguments": {"times": 99, "name": "always"}}
    done = rayalign("train", workspace.run("always-killed", **on_policy(scorer)))
    assert done.code == 2
    assert "a process died in each of 4 attempts" in done.printed and "Traceback" not in done.printed


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
    pool = Pool("giants", attrgetter, "real", share=Share(cpus=1000, gpus=0, threads=1), count=1)
    with pytest.raises(UserError, match="giants needs a node with 1000 CPUs and 0 GPUs for each of its processes"):
        pool.call(1)


def test_a_pool_answers_every_item_once(session: Session) -> None:
    with Pool("identity", attrgetter, "real", share=Share(cpus=0.1, gpus=0, threads=1), count=2) as pool:
        assert list(pool.map(range(20))) == list(range(20))
