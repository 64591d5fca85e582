"""A reward model as scorer: its logit for every reply, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_tokenizers import CHATML, byte_level
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rayalign.engine.model.scalar import WRITTEN, ScalarHead, head_written_as
from rayalign.errors import UserError
from rayalign.judge import make_scorer

PROMPTS = ["hi", [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
                  {"role": "user", "content": "three"}], "a longer question, for a row with less padding"]  # fmt: skip
REPLIES = ["yes", "no, never", "!"]


def save(directory: Path, *, labels: int = 1, context: int = 256) -> Path:
    tokenizer = byte_level(template=CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_scores_are_the_models_logits_one_by_one(tmp_path: Path) -> None:
    directory = save(tmp_path)
    scorer = make_scorer("reward_model", model=str(directory))
    found = scorer.score(PROMPTS, REPLIES)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = byte_level(template=CHATML)
    for prompt, reply, score in zip(PROMPTS, REPLIES, found, strict=True):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": reply}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert score == pytest.approx(float(model(input_ids=ids).logits[0, 0]), abs=1e-5)
    assert len({round(score, 4) for score in found}) == 3


def test_conversations_are_read_as_our_own_reward_models_were_trained(tmp_path: Path) -> None:
    """They end in the end token, without the line end that the template writes after it."""
    directory = save(tmp_path)
    config = LlamaConfig.from_pretrained(directory)
    setattr(config, WRITTEN, {"template": "auto", "stop": "auto"})
    config.save_pretrained(directory)
    assert head_written_as(config) == ScalarHead(template="auto", stop="auto")
    found = make_scorer("reward_model", model=str(directory)).score(PROMPTS, REPLIES)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = byte_level(template=CHATML)
    for prompt, reply, score in zip(PROMPTS, REPLIES, found, strict=True):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": reply}], tokenize=False)
        ids = tokenizer(text.removesuffix("\n"), add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert score == pytest.approx(float(model(input_ids=ids).logits[0, 0]), abs=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        make_scorer("reward_model", model=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="scorer.model: .*one is a folder, which has no revision v2: remove revision"):
        make_scorer("reward_model", model=str(save(tmp_path / "one")), revision="v2")
    with pytest.raises(UserError, match="scorer.model: .*two has 2 outputs; a reward model has one"):
        make_scorer("reward_model", model=str(save(tmp_path / "two", labels=2)))
    short = make_scorer("reward_model", model=str(save(tmp_path / "short", context=16)))
    with pytest.raises(UserError, match="do not fit"):
        short.score(["hi"], ["a reply that is longer than the context"])


def test_a_token_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    directory = save(tmp_path)
    tokenizer = byte_level(template=CHATML)
    tokenizer.add_tokens(["Zanzibar"])
    tokenizer.save_pretrained(directory)
    scorer = make_scorer("reward_model", model=str(directory))
    assert len(scorer.score(["hi"], ["yes"])) == 1
    with pytest.raises(UserError, match=r"the reply 'in Zanzibar' has the token 'Zanzibar' \(id \d+\), and the embed"):
        scorer.score(["where?"], ["in Zanzibar"])
