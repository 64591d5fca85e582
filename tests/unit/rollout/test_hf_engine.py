"""The embedded engine against the plain forward of the same model, token by token and without a cache."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import VOCABULARY, tiny
from transformers import PreTrainedModel

from rayalign.errors import UserError
from rayalign.rollout.base import Completion, SamplingParams
from rayalign.rollout.hf import HfEngine

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 11, 12, 13], [3], [20, 21, 22, 23]]
FAMILIES = ["llama", "gpt2", "qwen3_windowed", "gemma2", "mistral_windowed", "bloom"]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


def plain_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Float32 logits [len(ids), V] of one sequence by itself, no cache, no padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def plain_logp(model: PreTrainedModel, completion: Completion, temperature: float = 1.0) -> list[float]:
    prompt = PROMPTS[completion.prompt_index]
    logits = plain_logits(model, prompt + list(completion.token_ids)) / temperature
    predicted = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    return [row[token].item() for row, token in zip(predicted, completion.token_ids, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_argmax_of_the_plain_forward(family: str) -> None:
    model = tiny(family)
    completions = HfEngine(model).generate(PROMPTS, SamplingParams(temperature=0.0, max_new_tokens=10))
    for completion, prompt in zip(completions, PROMPTS, strict=True):
        ids = list(prompt)
        for _ in range(10):
            ids.append(int(plain_logits(model, ids)[-1].argmax()))
        assert completion.token_ids == tuple(ids[len(prompt) :])
        assert completion.behavior_token_logp == (0.0,) * 10
        assert completion.sampler_logp == pytest.approx(plain_logp(model, completion), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_plain_forward(family: str) -> None:
    model = tiny(family)
    params = SamplingParams(temperature=0.8, max_new_tokens=12, num_samples=4, stop_ids=(2, 7, 30, 31, 32))
    completions = HfEngine(model).generate(PROMPTS, params)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}  # rows left the batch early
    for completion in completions:
        assert completion.behavior_token_logp == completion.sampler_logp
        assert completion.sampler_logp == pytest.approx(plain_logp(model, completion, temperature=0.8), abs=1e-5)


def test_order_and_indices(llama: PreTrainedModel) -> None:
    completions = HfEngine(llama).generate(PROMPTS, SamplingParams(max_new_tokens=2, num_samples=3))
    places = [(completion.prompt_index, completion.sample_index) for completion in completions]
    assert places == [(prompt, sample) for prompt in range(4) for sample in range(3)]


def test_the_same_tokens_for_any_batching(llama: PreTrainedModel) -> None:
    params = SamplingParams(max_new_tokens=16, num_samples=3, seed=11, stop_ids=(2, 7, 30))
    keys = [40, 41, 42, 43]
    together = HfEngine(llama).generate(PROMPTS, params, keys=keys)
    one_by_one = HfEngine(llama, tokens_per_batch=1).generate(PROMPTS, params, keys=keys)
    assert [c.token_ids for c in one_by_one] == [c.token_ids for c in together]
    for alone, batched in zip(one_by_one, together, strict=True):
        assert alone.sampler_logp == pytest.approx(batched.sampler_logp, abs=1e-5)
    # another chunk of the same round: other neighbours, other places in the call
    chunk = HfEngine(llama).generate([PROMPTS[3], PROMPTS[1]], params, keys=[43, 41])
    assert [c.token_ids for c in chunk] == [c.token_ids for c in together[9:] + together[3:6]]
    # repeated as it was: equal to the last bit
    assert HfEngine(llama).generate(PROMPTS, params, keys=keys) == together


def test_what_a_draw_depends_on(llama: PreTrainedModel) -> None:
    def tokens(prompt: list[int], *, seed: int, key: int) -> list[tuple[int, ...]]:
        params = SamplingParams(max_new_tokens=16, num_samples=4, seed=seed)
        return [completion.token_ids for completion in HfEngine(llama).generate([prompt], params, keys=[key])]

    first = tokens(PROMPTS[0], seed=0, key=0)
    assert len(set(first)) == 4  # samples differ
    assert tokens(PROMPTS[0], seed=0, key=0) == first
    assert not set(tokens(PROMPTS[0], seed=1, key=0)) & set(first)
    assert not set(tokens(PROMPTS[0], seed=0, key=1)) & set(first)  # the same prompt again, under another key
    fewer = HfEngine(llama).generate([PROMPTS[0]], SamplingParams(max_new_tokens=16, num_samples=2))
    assert [completion.token_ids for completion in fewer] == first[:2]


def test_samples_follow_the_models_distribution(llama: PreTrainedModel) -> None:
    """Pearson's χ² of 4 000 first tokens against the softmax; cells with fewer than 5 expected are pooled."""
    engine = HfEngine(llama, tokens_per_batch=10**6)
    completions = engine.generate([PROMPTS[1]], SamplingParams(max_new_tokens=1, num_samples=4000))
    observed = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=VOCABULARY).double()
    expected = 4000 * torch.softmax(plain_logits(llama, PROMPTS[1])[-1], dim=-1).double()
    large = expected >= 5
    terms = ((observed - expected) ** 2 / expected)[large].sum()
    rest = (observed[~large].sum() - expected[~large].sum()) ** 2 / expected[~large].sum().clamp(min=1e-9)
    degrees = int(large.sum())
    assert degrees > 10
    assert float(terms + rest) < degrees + 4 * math.sqrt(2 * degrees)


def test_truncation_is_told_apart_from_the_full_softmax(llama: PreTrainedModel) -> None:
    completions = HfEngine(llama).generate(PROMPTS, SamplingParams(top_k=5, max_new_tokens=6, num_samples=4))
    for completion in completions:
        assert completion.sampler_logp == pytest.approx(plain_logp(llama, completion), abs=1e-5)
        prompt = PROMPTS[completion.prompt_index]
        logits = plain_logits(llama, prompt + list(completion.token_ids))[len(prompt) - 1 : -1]
        for row, token, logp in zip(logits, completion.token_ids, completion.behavior_token_logp, strict=True):
            best = row.topk(5)
            assert token in best.indices
            assert logp == pytest.approx((row[token] - best.values.logsumexp(0)).item(), abs=1e-5)


def test_stop_ids_end_a_completion_and_belong_to_it(llama: PreTrainedModel) -> None:
    free = HfEngine(llama).generate(PROMPTS, SamplingParams(max_new_tokens=12, num_samples=4))
    stop_ids = (free[0].token_ids[3], free[5].token_ids[0])
    params = SamplingParams(max_new_tokens=12, num_samples=4, stop_ids=stop_ids)
    for stopped, whole in zip(HfEngine(llama).generate(PROMPTS, params), free, strict=True):
        ends = [place for place, token in enumerate(whole.token_ids) if token in stop_ids]
        length = ends[0] + 1 if ends else 12
        assert stopped.token_ids == whole.token_ids[:length]
        assert stopped.finish_reason == ("stop" if ends else "length")
        assert len(stopped.sampler_logp) == len(stopped.behavior_token_logp) == length


def test_a_stop_as_the_last_allowed_token_is_a_stop(llama: PreTrainedModel) -> None:
    params = SamplingParams(max_new_tokens=1, stop_ids=tuple(range(VOCABULARY)))
    assert [c.finish_reason for c in HfEngine(llama).generate(PROMPTS, params)] == ["stop"] * 4


def test_the_model_is_left_as_it_was(llama: PreTrainedModel) -> None:
    model = tiny("llama", attention_dropout=0.5).train()
    completions = HfEngine(model).generate(PROMPTS, SamplingParams(max_new_tokens=8))
    assert model.training
    assert completions == HfEngine(llama).generate(PROMPTS, SamplingParams(max_new_tokens=8))  # no dropout was drawn


def test_refusals(llama: PreTrainedModel) -> None:
    engine = HfEngine(llama)
    assert engine.generate([], SamplingParams()) == []
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        engine.generate([[3], []], SamplingParams())
    with pytest.raises(ValueError, match="4 prompts and 1 keys"):
        engine.generate(PROMPTS, SamplingParams(), keys=[1])
    with pytest.raises(UserError, match=r"a prompt of 10 tokens and 119 new ones .* context of 128"):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=119))
    broken = tiny("llama")
    broken.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        HfEngine(broken).generate(PROMPTS, SamplingParams(max_new_tokens=2))
