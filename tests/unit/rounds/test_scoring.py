"""What a scorer is given of a chunk, and what becomes of prompts that it fails on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import odd_rewards
import pytest
from endpoints import KEY_VARIABLE, Endpoint, serving
from tiny_models import tiny
from tiny_rollouts import OnPolicyRun, chunk_spec, prompt_stream
from tiny_tokenizers import CHATML, byte_level

from rayalign.config.scoring import LlmScorerConfig, RuleScorerConfig, ScorerConfig
from rayalign.data.group import Candidate, Group
from rayalign.data.shard import write_shard
from rayalign.data.store import commit_store
from rayalign.engine.model.pretrained import save_pretrained
from rayalign.errors import UserError
from rayalign.judge.base import ScorerUnusable
from rayalign.rounds.chunk import ChunkMaker, ChunkReport, PromptChunk
from rayalign.rounds.plan import RoundPlan
from rayalign.rounds.streams import StoredStream

ODD = Path(odd_rewards.__file__)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as server:
        yield server


def rule(function: str, **parameters: Any) -> RuleScorerConfig:
    return RuleScorerConfig(function=f"{ODD}:{function}", **parameters)


def poisoned_prompts(folder: Path, *, places: tuple[int, ...], count: int = 8) -> Path:
    file = folder / "prompts.jsonl"
    rows = [{"prompt": f"poison {n}" if n in places else f"question {n}"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def made(folder: Path, model: Path, scorer: ScorerConfig, *, most_bad: int | None = None) -> ChunkReport:
    """The chunk of eight prompts of which the third is poison."""
    prompts = prompt_stream(folder, poisoned_prompts(folder, places=(2,)), groups_per_step=4)
    chunk = PromptChunk(name="0", positions=range(8), directory=folder / "out", weights=None, most_bad=most_bad)
    report = ChunkMaker()((chunk_spec(model, prompts, scorer=scorer, needs_reference=False), chunk))
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (
            rule("hangs_on_poison", timeout_seconds=0.5),
            "did not return within 0.5 s (scorer.timeout_seconds; it was at ",
        ),
        (rule("exits_on_poison"), "ended its process with exit code 3 for row 0 (reply "),
    ],
    ids=["hangs", "exits"],
)
def test_a_reward_that_hangs_or_exits_costs_its_prompt(
    tmp_path: Path, model: Path, scorer: ScorerConfig, expected: str
) -> None:
    report = made(tmp_path, model, scorer, most_bad=1)
    (told,) = report.quarantined
    assert (Path(told["file"]).name, told["line"], told["prompt"]) == ("prompts.jsonl", 3, "poison 2")
    assert f"{scorer.function!r} {expected}" in told["reason"]
    store = commit_store(tmp_path / "out", [report.shard], meta={})
    assert [store[row].line for row in range(8) if not store[row].candidates] == [3]
    assert report.reward_sum > 0


def test_one_prompt_too_many_ends_the_chunk_and_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError, match=r"1 of \d prompts have no scored completions, more than data.max_b") as caught:
        made(tmp_path, model, rule("exits_on_poison"), most_bad=0)
    assert "prompts.jsonl:3: scorer.function: " in str(caught.value) and "exit code 3" in str(caught.value)


def test_a_run_ends_with_the_prompt_and_the_scorer_named(tmp_path: Path, model: Path) -> None:
    """Half of the prompts hang: the third one ends it, two of eight being allowed."""
    plan = RoundPlan(steps=2, refresh_every=2, lag=0, groups_per_step=4)
    file = poisoned_prompts(tmp_path, places=(0, 2, 4, 6))
    run = OnPolicyRun(tmp_path, model, file, plan=plan, scorer=rule("exits_on_poison"), max_bad_fraction=0.25)
    with pytest.raises(UserError, match=r"3 of [3-7] prompts have no scored completions, more than data.max_bad_frac"):
        run.train()


def test_a_run_says_which_prompts_it_does_without(tmp_path: Path, model: Path) -> None:
    plan = RoundPlan(steps=2, refresh_every=2, lag=0, groups_per_step=4)
    file = poisoned_prompts(tmp_path, places=(2,))
    run = OnPolicyRun(tmp_path, model, file, plan=plan, scorer=rule("exits_on_poison"), max_bad_fraction=0.25)
    run.train()
    (said,) = [note for note in run.notes if "no scored" in note]
    assert said.startswith(f"round 1/1: 1 of 8 prompts have no scored completions; first {file}:3: scorer.function: ")
    assert said.endswith(f"; see quarantine.jsonl in {run.rounds()[0]}")


def test_what_a_reward_prints_is_said_once(tmp_path: Path, model: Path) -> None:
    plan = RoundPlan(steps=4, refresh_every=2, lag=0, groups_per_step=4)
    file = poisoned_prompts(tmp_path, places=())
    run = OnPolicyRun(tmp_path, model, file, plan=plan, scorer=rule("hangs_on_poison"))
    run.train()
    said = [note for note in run.notes if "printed" in note]
    printed = "round 1/2: odd_rewards.py:hangs_on_poison printed: asked about question"
    assert sorted(said) == [f"{printed} {number}" for number in range(8)]


def test_an_endpoint_that_is_gone_ends_the_run_and_not_its_prompts(
    tmp_path: Path, model: Path, endpoint: Endpoint
) -> None:
    scorer = LlmScorerConfig(model="judge", base_url=endpoint.url, api_key_env=KEY_VARIABLE)
    endpoint.answer = lambda question: 503
    with pytest.raises(ScorerUnusable, match="gives no answer: it answers 503"):
        made(tmp_path, model, scorer)
    endpoint.answer = lambda question: 400 if "poison" in question else "Rating: 7"
    (tmp_path / "again").mkdir()
    (told,) = made(tmp_path / "again", model, scorer).quarantined
    assert "judge at http" in told["reason"] and "gave no verdict: it answers 400 no, Bearer (key)" in told["reason"]


def test_a_scorer_sees_whole_thoughts_and_special_tokens(tmp_path: Path) -> None:
    """Stored completions behind a prompt that opens a thought; one of them was cut."""
    tokenizer = byte_level(template=CHATML)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    model = tmp_path / "model"
    save_pretrained(tiny("llama", vocab_size=len(tokenizer)), tokenizer, model)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    texts = [("the sky</think> is blue<|im_end|>", True), (" it is</think>\nso<|im_end|> and", False)]
    group = Group(
        prompt_ids=np.array(ids("<|im_start|>assistant\n<think>\n"), np.int32),
        candidates=tuple(
            Candidate(ids=np.array(ids(text), np.int32), mask=np.ones(len(ids(text)), np.bool_), finished=finished)
            for text, finished in texts
        ),
        source="rows.jsonl",
        line=1,
    )
    shard = write_shard(tmp_path / "prompts", "0", [group], prompts=["what colour?"])
    commit_store(tmp_path / "prompts", [shard], meta={})
    prompts = StoredStream(
        name="prompts",
        stores=(tmp_path / "prompts",),
        columns=((),),
        weights=(1.0,),
        groups_per_step=1,
        num_candidates=2,
    )
    file = tmp_path / "seen.jsonl"
    spec = chunk_spec(
        model,
        prompts,
        shape="group",
        scorer=rule("notes", arguments={"file": str(file)}),
        sampling=None,
        engine="none",
        keep_stored=True,
        needs_reference=False,
    )
    ChunkMaker()((spec, PromptChunk(name="0", positions=range(1), directory=tmp_path / "out", weights=None)))
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        ["what colour?", "<think>\nthe sky</think> is blue"],
        ["what colour?", "<think>\n it is</think>\nso<|im_end|> and"],
    ]
