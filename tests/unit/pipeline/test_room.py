"""A group that no micro-batch could hold is refused before a run starts, with the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_groups import random_groups
from tiny_runs import save_tiny

from rayalign.config import ConfigError, load_run
from rayalign.data.group import Candidate, Group
from rayalign.data.pack import pack
from rayalign.data.shard import write_shard
from rayalign.data.store import commit_store
from rayalign.errors import UserError
from rayalign.rounds.streams import RoundStream, SourceSpec, StoredStream
from rayalign.run.rollouts import prompts_of, round_plan
from rayalign.run.room import refuse_large_groups
from rayalign.run.streams import shape_of

SCORED = "scorer={name: rule, function: 'm:f'}"


def longest(prompt: int, candidates: int, tokens: int) -> Group:
    answer = Candidate(ids=np.ones(tokens, np.int32), mask=np.ones(tokens, np.bool_))
    return Group(prompt_ids=np.ones(prompt, np.int32), candidates=(answer,) * candidates)


@pytest.mark.parametrize("family", ["llama", "mamba"])
@pytest.mark.parametrize(
    ("method", "kept", "fewer"), [("grpo", 4, "rollout.samples, "), ("dpo", 2, ""), ("kto", 2, "")]
)
@pytest.mark.parametrize("row_tokens", [None, 40])
def test_rounds_may_hold_the_longest_prompt_with_completions_at_their_limit(
    tmp_path: Path, family: str, method: str, kept: int, fewer: str, row_tokens: int | None
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(f'{{"model_type": "{family}"}}')
    groups = random_groups([0] * 5, vocabulary=9)
    commit_store(tmp_path / "prompts", [write_shard(tmp_path / "prompts", "0", groups)], meta={})
    sizes = [len(group.prompt_ids) for group in groups]
    largest, where = max(sizes), sizes.index(max(sizes))
    batch = pack(
        [longest(largest, kept, 12)],
        positions=[0],
        num_candidates=kept,
        pad_id=0,
        row_tokens=row_tokens,
        layout="packed" if family == "llama" else "concatenated",
    )
    needed = batch.input_ids.numel()

    def check(tokens_per_micro_batch: int) -> None:
        policy = ["data_policy=on_policy", "rollout={samples: 4, max_new_tokens: 12}", SCORED]
        settings = [f"model.name={tmp_path / 'model'}", "data.train=t.jsonl", *policy]
        run = load_run(None, [*settings, f"method={method}", f"optim.tokens_per_micro_batch={tokens_per_micro_batch}"])
        assert run.drawing is not None
        stream = RoundStream(
            name="train",
            prompts=prompts_of([tmp_path / "prompts"], weights=[1.0], groups_per_step=2),
            plan=round_plan(run.drawing, run, refresh_every=4, steps=4),
            folder=tmp_path / "rounds",
            num_candidates=kept,
        )
        assert shape_of(run.trained_method) == {"grpo": "group", "dpo": "pair", "kto": "labelled"}[method]
        source = SourceSpec(
            streams=(stream,), seed=0, tokens_per_micro_batch=tokens_per_micro_batch, row_tokens=row_tokens
        )
        refuse_large_groups(run, source)

    check(needed)
    expected = (
        f"{kept} completions of up to 12 tokens for the prompt of {largest} at {groups[where].source}:"
        f"{groups[where].line} take {needed} tokens of a micro-batch. Raise it to at least {needed}, or lower {fewer}"
        "rollout.max_new_tokens or data.max_prompt_tokens"
    )
    with pytest.raises(UserError) as caught:
        check(needed - 1)
    assert str(caught.value).endswith(expected)


def test_stored_groups_are_refused_by_name(tmp_path: Path) -> None:
    groups = random_groups([2] * 6, vocabulary=9)
    store = commit_store(tmp_path / "pairs", [write_shard(tmp_path / "pairs", "0", groups)], meta={})
    sizes = [store.lengths(row).packed for row in range(len(store))]
    settings = [f"model.name={save_tiny(tmp_path / 'tiny')}", "data.train=t.jsonl", "method=dpo"]
    stream = StoredStream(
        name="train",
        stores=(tmp_path / "pairs",),
        columns=((),),
        weights=(1.0,),
        groups_per_step=2,
        num_candidates=2,
    )

    def check(limit: int) -> None:
        source = SourceSpec(streams=(stream,), seed=0, tokens_per_micro_batch=limit, row_tokens=None)
        refuse_large_groups(load_run(None, settings), source)

    check(max(sizes))
    with pytest.raises(UserError, match=f"raise it to at least {max(sizes)}"):
        check(max(sizes) - 1)


@pytest.mark.parametrize(("method", "kept"), [("grpo", 4), ("ppo", 4), ("dpo", 2), ("kto", 2), ("sft", 1)])
def test_completions_that_never_fit_are_refused_when_the_configuration_is_read(method: str, kept: int) -> None:
    settings = ["model.name=m", "data.train=t.jsonl", f"method={method}", "data_policy=on_policy", SCORED]
    settings += ["rollout={samples: 4, max_new_tokens: 100}"]
    load_run(None, [*settings, f"optim.tokens_per_micro_batch={100 * kept + 1}"])
    with pytest.raises(ConfigError, match=f"{100 * kept} is too small for {kept} completions of up to"):
        load_run(None, [*settings, f"optim.tokens_per_micro_batch={100 * kept}"])
