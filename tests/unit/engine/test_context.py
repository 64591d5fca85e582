"""How far a model reads: what is longer, or holds a token that it has not, is named before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny
from tiny_runs import synthetic_groups
from tiny_tokenizers import byte_level
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rayalign.data.group import Candidate, Group
from rayalign.data.shard import write_shard
from rayalign.data.store import TokenStore, commit_store
from rayalign.engine.model import parity
from rayalign.engine.model.context import Context, context_of, refuse_long_rows, refuse_unknown_tokens
from rayalign.engine.model.parity import choose_attention, measure_attention
from rayalign.errors import UserError

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

REACH: list[tuple[str, dict[str, Any], int | None]] = [
    ("llama", {"max_position_embeddings": 128}, 128),
    ("gpt2", {"n_positions": 48}, 48),
    ("opt", {"max_position_embeddings": 64}, 64),
    ("mpt", {"max_seq_len": 32}, 32),
    ("bloom", {}, None),
    ("mamba", {}, None),
    ("falcon", {"alibi": True, "max_position_embeddings": 32}, None),
    ("llama", {"max_position_embeddings": 32, "rope_parameters": {**YARN, "rope_type": "linear"}}, 128),
    ("llama", {"max_position_embeddings": 32, "rope_parameters": YARN}, 128),
    ("llama", {"max_position_embeddings": 128, "rope_parameters": YARN}, 128),
    ("llama", {"max_position_embeddings": 256, "rope_parameters": LLAMA3}, 256),
    ("llama", {"max_position_embeddings": 32, "rope_parameters": DYNAMIC}, 32),
    ("phi3", {"max_position_embeddings": 128, "rope_parameters": LONGROPE, "hidden_size": 32,
              "num_attention_heads": 4, "original_max_position_embeddings": 16}, 16),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "tokens"), REACH)
def test_how_far_a_model_reads(kind: str, settings: dict[str, Any], tokens: int | None) -> None:
    context = context_of(CONFIG_MAPPING[kind](**settings))
    assert (context.tokens if context is not None else None) == tokens


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE, YARN, LLAMA3], ids=lambda rope: rope["rope_type"])
def test_log_probs_depend_on_no_other_sequence_up_to_there(
    rope: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof of a layout is as long as the model reads; were that longer, the proof would see it."""
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path))
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=4096)
    assert choose_attention(model).layout == "packed"
    monkeypatch.setattr(parity, "context_of", lambda config: None)
    depends = rope["rope_type"] in ("dynamic", "longrope")
    assert (max(measure_attention(model).values()) > 1e-2) is depends


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    groups = synthetic_groups([2, 1, 3])
    return commit_store(tmp_path / "store", [write_shard(tmp_path / "store", "shard", groups)], meta={})


def test_rows_that_are_too_long_are_named(store: TokenStore) -> None:
    lengths = [
        len(store[row].prompt_ids) + max(len(own.ids) for own in store[row].candidates) for row in range(len(store))
    ]
    worst, most = int(np.argmax(lengths)), max(lengths)
    refuse_long_rows(store, None, "m")
    refuse_long_rows(store, Context(tokens=most, reason="n_positions"), "m")
    with pytest.raises(UserError) as error:
        refuse_long_rows(store, Context(tokens=most - 1, reason="n_positions"), "gpt2")
    assert str(error.value) == (
        f"synthetic.jsonl:{worst + 1} has {most} tokens, prompt and response together, and gpt2 reads {most - 1} "
        f"(n_positions): lower data.max_tokens to {most - 1}, or name a model that reads more"
    )
    with pytest.raises(UserError, match=r"\(3 rows are too long; this is the longest\)"):
        refuse_long_rows(store, Context(tokens=2, reason="n_positions"), "gpt2")


def test_prompts_leave_room_for_their_completions(store: TokenStore) -> None:
    longest = int(store.index.whole().prompt_tokens.max())
    refuse_long_rows(store, Context(tokens=longest + 8, reason="n_positions"), "m", new_tokens=8)
    with pytest.raises(UserError, match=rf"rollout.max_new_tokens are 9, more than the {longest + 8} that m reads"):
        refuse_long_rows(store, Context(tokens=longest + 8, reason="n_positions"), "m", new_tokens=9)


def test_tokens_beyond_the_embedding_are_named(tmp_path: Path) -> None:
    tokenizer = byte_level()
    [token] = tokenizer("\u00e9", add_special_tokens=False)["input_ids"][-1:]
    group = Group(
        prompt_ids=np.array([5, 6], np.int32),
        candidates=(Candidate(ids=np.array([7, token, 4], np.int32), mask=np.ones(3, np.bool_)),),
        source="pairs.jsonl",
        line=3,
    )
    opened = commit_store(tmp_path / "store", [write_shard(tmp_path / "store", "shard", [group])], meta={})
    refuse_unknown_tokens(opened, len(tokenizer), "m", tokenizer)
    refuse_unknown_tokens(opened, token + 1, "m", tokenizer)
    with pytest.raises(
        UserError, match=rf"pairs.jsonl:3 has the token .*\(id {token}\), and the embedding of m has {token} rows"
    ):
        refuse_unknown_tokens(opened, token, "m", tokenizer)
