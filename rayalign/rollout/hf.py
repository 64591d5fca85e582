"""The embedded engine: a loaded Hugging Face model, its cache and no other process."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rayalign.engine.model.context import context_of, refuse_long_prompt
from rayalign.rollout.base import Completion, SamplingParams
from rayalign.rollout.cache import keep_cache_rows, make_cache
from rayalign.rollout.sampling import sample_key, sample_tokens, uniforms

TOKENS_PER_BATCH = 16_384
COMPACT_BELOW = 0.9
"""Finished rows leave the batch when the share of live ones falls below this: leaving copies the whole cache once."""

Reading = Literal["padded", "even", "whole"]
"""How rows are read. ``padded``: prompts of any lengths stand together, filled up on their left. ``even``: prompts of
one length, since states that run along the row, or positions that are counted, would count the filling too. ``whole``:
as ``even``, and without a cache: every token reads its whole row again."""


class HfEngine:
    """Samples from ``model`` as it is at the time of the call; the caller may train it in between.

    A prompt is read once and its cache is shared out among its samples. The noise of a token does not depend on the
    batch; the logits do, by rounding, so another batch shape may turn a draw that falls on the edge between two tokens.
    Runs in the caller's autocast, so that log-probabilities are those of a training forward there.

    Args:
        model: a causal language model.
        reading: of rows; None: what :func:`rayalign.rollout.reading.choose_reading` proves right for the family.
        tokens_per_batch: bound on rows × (prompt + new tokens) that are sampled together; one prompt always fits.

    Raises:
        UserError: no way of reading is right.
    """

    def __init__(
        self, model: PreTrainedModel, *, reading: Reading | None = None, tokens_per_batch: int = TOKENS_PER_BATCH
    ) -> None:
        from rayalign.rollout.reading import choose_reading  # which tries engines itself

        self.model = model
        self.reading: Reading = reading or choose_reading(model)
        self.tokens_per_batch = tokens_per_batch
        self.context = context_of(model.config)
        self._accepted = accepted_arguments(model)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int] | None = None
    ) -> list[Completion]:
        """See :meth:`rayalign.rollout.base.RolloutEngine.generate`.

        Raises:
            ValueError: a prompt is empty, or there is not one key per prompt.
            UserError: a prompt and its completion do not fit the model's context.
            FloatingPointError: the model's log-probabilities are not finite.
        """
        keys = range(len(prompts)) if keys is None else keys
        if len(keys) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(keys)} keys")
        if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
            raise ValueError(f"prompt {empty[0]} has no tokens: there is nothing to continue")
        if prompts:
            refuse_long_prompt(max(map(len, prompts)), params.max_new_tokens, self.context)
        completions: list[Completion] = []
        with torch.no_grad(), _evaluating(self.model):
            for batch in self._batches(prompts, params):
                noise = _noise([keys[index] for index in batch], params)
                drawn = self._sample([prompts[index] for index in batch], params, noise=noise)
                completions += _completions(batch, params, *drawn)
        return sorted(completions, key=lambda completion: (completion.prompt_index, completion.sample_index))

    def _batches(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[list[int]]:
        """Prompts of similar or equal length together, longest first, so that memory runs out at once or never."""
        batch: list[int] = []
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            rows = (len(batch) + 1) * params.num_samples
            full = rows * (len(prompts[batch[0]]) + params.max_new_tokens) > self.tokens_per_batch if batch else False
            uneven = self.reading != "padded" and batch and len(prompts[index]) != len(prompts[batch[0]])
            if full or uneven:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (−1 after the end), behavior and sampler log-probabilities, all [rows, max_new_tokens]."""
        device = self.model.device
        noise = noise.to(device)
        stop = torch.tensor(params.stop_ids, dtype=torch.long, device=device)
        ids, attention = _left_padded(prompts, device)
        cache = make_cache(self.model.config) if self.reading != "whole" else None
        shared = torch.arange(len(prompts), device=device).repeat_interleave(params.num_samples)
        logits = self._step(ids, attention, cache)[shared]
        ids, attention = ids[shared], attention[shared]
        keep_cache_rows(cache, shared)

        tokens = torch.full(noise.shape, -1, device=device)
        logps = torch.full((2, *noise.shape), torch.nan, device=device)
        rows = torch.arange(len(noise), device=device)
        live = torch.ones_like(rows, dtype=torch.bool)
        for t in range(params.max_new_tokens):
            token, logp = sample_tokens(logits, noise[rows, t], params)
            tokens[rows[live], t] = token[live]
            logps[:, rows[live], t] = logp[:, live]
            live &= ~torch.isin(token, stop)
            num_live = int(live.sum())
            if num_live == 0 or t + 1 == params.max_new_tokens:
                break
            if num_live < COMPACT_BELOW * len(rows):
                kept = live.nonzero()[:, 0]
                keep_cache_rows(cache, kept)
                rows, token, live = rows[kept], token[kept], live[kept]
                ids, attention = ids[kept], attention[kept]
            attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
            ids = torch.cat([ids, token[:, None]], dim=1) if cache is None else token[:, None]
            logits = self._step(ids, attention, cache)
        return tokens, logps[0], logps[1]

    def _step(self, ids: Tensor, attention: Tensor, cache: DynamicCache | None) -> Tensor:
        """Float32 logits [rows, V] after the last column of ``ids`` [rows, columns]; ``cache`` grows by them."""
        inputs = {
            "attention_mask": attention,
            "past_key_values": cache,
            "position_ids": (attention.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            "use_cache": cache is not None,
            "logits_to_keep": 1,
        }
        known = {name: value for name, value in inputs.items() if name in self._accepted}
        logits: Tensor = self.model(input_ids=ids, **known).logits
        return logits[:, -1].float()


def accepted_arguments(model: PreTrainedModel) -> frozenset[str]:
    """The names of what a model's forward may be told."""
    return frozenset(inspect.signature(model.forward).parameters)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """A layer that computes its activations again is in training mode, and would use no cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _noise(keys: Sequence[int], params: SamplingParams) -> Tensor:
    """Float64 uniforms [len(keys) · num_samples, max_new_tokens]."""
    samples = product(keys, range(params.num_samples))
    sample_keys = [sample_key(params.seed, key, sample) for key, sample in samples]
    return torch.from_numpy(np.stack([uniforms(key, params.max_new_tokens) for key in sample_keys]))


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [prompts, longest]; padding may be any id, nothing attends to it."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _completions(
    batch: Sequence[int], params: SamplingParams, tokens: Tensor, behavior: Tensor, sampler: Tensor
) -> Iterator[Completion]:
    lengths = (tokens >= 0).sum(dim=1).tolist()
    columns = zip(lengths, tokens.tolist(), behavior.tolist(), sampler.tolist(), strict=True)
    for row, (length, ids, behavior_logp, sampler_logp) in enumerate(columns):
        if not np.isfinite(sampler_logp[:length]).all():
            raise FloatingPointError("the model's log-probabilities are not finite: its weights are damaged")
        yield Completion(
            prompt_index=batch[row // params.num_samples],
            sample_index=row % params.num_samples,
            token_ids=tuple(ids[:length]),
            behavior_token_logp=tuple(behavior_logp[:length]),
            sampler_logp=tuple(sampler_logp[:length]),
            finish_reason="stop" if ids[length - 1] in params.stop_ids else "length",
        )
