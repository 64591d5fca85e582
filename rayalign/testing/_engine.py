"""What every rollout engine must do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from rayalign.rollout.base import Completion, RolloutEngine, SamplingParams
from rayalign.rollout.sampling import truncated

NextLogits = Callable[[Sequence[int]], Tensor]
"""Token ids → float32 logits [V] of the token that follows, by a plain forward."""

NEW_TOKENS = 8
SAMPLES = 4
PARAMS = SamplingParams(max_new_tokens=NEW_TOKENS, num_samples=SAMPLES)


def check_engine(
    engine: RolloutEngine, next_logits: NextLogits, prompts: Sequence[Sequence[int]], *, tolerance: float = 1e-5
) -> None:
    """Compare an engine with the plain forward of the model that it holds.

    Greedy tokens, log-probabilities with and without temperature and truncation, end tokens, lengths, repetition,
    order, and refused prompts.

    Args:
        tolerance: nats by which log-probabilities may differ.

    Raises:
        AssertionError: naming what the engine does otherwise.
    """
    _check_greedy(engine, next_logits, prompts, tolerance)
    _check_log_probabilities(engine, next_logits, prompts, replace(PARAMS, temperature=0.7), tolerance)
    _check_log_probabilities(engine, next_logits, prompts, replace(PARAMS, top_p=0.9), tolerance)
    _check_ends(engine, prompts)
    _check_draws(engine, prompts)
    _check_refusals(engine)


def _check_greedy(
    engine: RolloutEngine, next_logits: NextLogits, prompts: Sequence[Sequence[int]], tolerance: float
) -> None:
    found = engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS))
    for completion in found:
        ids = list(prompts[completion.prompt_index])
        for token, behavior, sampler in _tokens(completion):
            logp = torch.log_softmax(next_logits(ids), dim=-1)
            assert logp[token] >= logp.max() - tolerance, f"greedy drew token {token}, not the most probable one"
            assert behavior == 0.0, "the log-probability of a greedy choice is 0"
            assert math.isnan(sampler) or abs(sampler - float(logp[token])) <= tolerance, "sampler_logp when greedy"
            ids.append(token)


def _check_log_probabilities(
    engine: RolloutEngine,
    next_logits: NextLogits,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    tolerance: float,
) -> None:
    for completion in engine.generate(prompts, params):
        ids = list(prompts[completion.prompt_index])
        for token, behavior, sampler in _tokens(completion):
            full = torch.log_softmax(next_logits(ids) / params.temperature, dim=-1)
            kept = truncated(full[None], top_k=params.top_k, top_p=params.top_p)[0] if params.truncates else full
            assert math.isfinite(kept[token]), f"token {token} is outside the nucleus of {params.top_p}"
            assert abs(behavior - float(kept[token])) <= tolerance, f"behavior_token_logp with {params}"
            assert math.isnan(sampler) or abs(sampler - float(full[token])) <= tolerance, f"sampler_logp with {params}"
            ids.append(token)


def _check_ends(engine: RolloutEngine, prompts: Sequence[Sequence[int]]) -> None:
    free = engine.generate(prompts, PARAMS)
    assert all(len(found.token_ids) == NEW_TOKENS and found.finish_reason == "length" for found in free), (
        "without stop ids every completion runs to max_new_tokens"
    )
    stop = free[0].token_ids[2]
    for before, after in zip(free, engine.generate(prompts, replace(PARAMS, stop_ids=(stop,))), strict=True):
        place = before.token_ids.index(stop) if stop in before.token_ids else NEW_TOKENS - 1
        assert after.token_ids == before.token_ids[: place + 1], "a completion ends with the first stop id, and with it"
        assert after.finish_reason == ("stop" if stop in before.token_ids else "length")


def _check_draws(engine: RolloutEngine, prompts: Sequence[Sequence[int]]) -> None:
    params = replace(PARAMS, seed=3)
    first = engine.generate(prompts, params, keys=range(10, 10 + len(prompts)))
    order = [(found.prompt_index, found.sample_index) for found in first]
    assert order == list(product(range(len(prompts)), range(SAMPLES))), "order of results"
    again = engine.generate(prompts, params, keys=range(10, 10 + len(prompts)))
    assert [found.token_ids for found in again] == [found.token_ids for found in first], "equal calls draw alike"
    (alone,) = [engine.generate(prompts[1:2], params, keys=[11])]
    assert [found.token_ids for found in alone] == [found.token_ids for found in first if found.prompt_index == 1], (
        "a draw depends on the prompt's key, not on its company"
    )
    other = engine.generate(prompts, params, keys=range(50, 50 + len(prompts)))
    assert [found.token_ids for found in other] != [found.token_ids for found in first], "other keys draw otherwise"
    assert len({found.token_ids for found in first if found.prompt_index == 0}) > 1, "samples of one prompt differ"


def _check_refusals(engine: RolloutEngine) -> None:
    for prompts, keys in (([[1], []], None), ([[1]], [1, 2])):
        try:
            engine.generate(prompts, SamplingParams(max_new_tokens=1), keys=keys)
        except ValueError:
            continue
        raise AssertionError(f"prompts {prompts} with keys {keys} must raise ValueError")


def _tokens(completion: Completion) -> list[tuple[int, float, float]]:
    columns = completion.token_ids, completion.behavior_token_logp, completion.sampler_logp
    return list(zip(*columns, strict=True))
