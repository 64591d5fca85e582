"""A model that is asked through a rollout engine: its own chat template, greedy, nothing cut and nothing guessed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from parrots import parrot
from tiny_models import tiny
from tiny_tokenizers import CHATML, byte_level
from transformers import AutoTokenizer

from rayalign.engine.model.pretrained import save_pretrained
from rayalign.errors import MissingExtra, UserError
from rayalign.judge import make_judge, make_scorer
from rayalign.judge.asking import ATTEMPTS, Unanswered
from rayalign.judge.base import Asked, NoVerdict, ScorerUnusable
from rayalign.judge.local import LocalModel


def test_answers_are_the_models_own_greedy_ones(tmp_path: Path) -> None:
    tokenizer = byte_level(template=CHATML)
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=256).eval()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def greedy(question: str) -> list[int]:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        drawn = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=end)[0, ids.shape[1] :]
        return [int(token) for token in drawn]

    questions = ["why is the sky blue?", "who?", "a question of some more words", "what is it"]
    fourth = greedy(questions[0])[3]  # a random model hardly ever ends: let it say <|im_end|> in this one's place
    with torch.no_grad():
        model.lm_head.weight[[end, fourth]] = model.lm_head.weight[[fourth, end]]
    save_pretrained(model, tokenizer, tmp_path)
    drawn = [greedy(question) for question in questions]
    expected = [tokenizer.decode(ids[:-1]).strip() if ids[-1] == end else None for ids in drawn]
    local = LocalModel(field="scorer", model=str(tmp_path), revision=None, engine="hf", max_new_tokens=12)
    found = local(questions, attempt=0)
    assert [None if isinstance(answer, Unanswered) else answer for answer in found] == expected
    assert expected[0] and None in expected


def test_a_local_model_rates(tmp_path: Path) -> None:
    scorer = make_scorer("llm", engine="hf", model=str(parrot(tmp_path, "8", "<|im_end|>")))
    assert scorer.score(["why?"] * 3, ["because", "so", "no"]) == [8.0, 8.0, 8.0]
    assert scorer.tally.asked == Asked(calls=3)


def test_a_local_judge_that_always_says_first_prefers_nothing(tmp_path: Path) -> None:
    judge = make_judge("llm", engine="hf", model=str(parrot(tmp_path, "A", "<|im_end|>")))
    assert judge.compare(["why?"] * 3, ["a", "b", "same"], ["x", "y", "same"]) == [0.5, 0.5, 0.5]
    assert judge.tally.asked == Asked(calls=4, ties=1, disagreements=2)


def test_an_answer_that_is_cut_is_none(tmp_path: Path) -> None:
    directory = parrot(tmp_path, "1", "0", "<|im_end|>")
    with pytest.raises(NoVerdict, match="the answer was cut at 1 tokens") as found:
        make_scorer("llm", engine="hf", model=str(directory), max_new_tokens=1).score(["why?"], ["so"])
    assert math.isnan(found.value.values[0])
    assert make_scorer("llm", engine="hf", model=str(directory), max_new_tokens=3).score(["why?"], ["so"]) == [10.0]


def test_a_question_with_a_token_beyond_the_embedding(tmp_path: Path) -> None:
    directory = parrot(tmp_path, "8", "<|im_end|>")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["Zanzibar"])
    tokenizer.save_pretrained(directory)
    scorer = make_scorer("llm", engine="hf", model=str(directory))
    assert scorer.score(["why?"], ["so"]) == [8.0]
    with pytest.raises(ScorerUnusable, match=r"scorer.model: a question has the token 'Zanzibar' \(id \d+\)"):
        scorer.score(["where?"], ["in Zanzibar"])


def test_a_question_that_does_not_fit_is_not_cut(tmp_path: Path) -> None:
    scorer = make_scorer("llm", engine="hf", model=str(parrot(tmp_path, "8", "<|im_end|>")))
    with pytest.raises(NoVerdict, match=r"tokens and max_new_tokens 512 do not fit .* of 1024") as found:
        scorer.score(["why?", "why?"], ["so " * 1000, "so"])
    assert math.isnan(found.value.values[0]) and found.value.values[1] == 8.0
    assert scorer.tally.asked == Asked(calls=1 + ATTEMPTS, failures=ATTEMPTS)


def test_what_cannot_be_loaded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="judge.model: there is no directory"):
        make_judge("llm", engine="hf", model=str(tmp_path / "nowhere"))
    directory = parrot(tmp_path / "model", "8", "<|im_end|>")
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="scorer.model: .* holds no weights"):
        make_scorer("llm", engine="hf", model=str(directory))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'rayalign\[vllm"):
        make_judge("llm", engine="vllm", model=str(directory))
