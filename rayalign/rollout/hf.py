"""The embedded engine: a loaded Hugging Face model, a KV cache and no other process."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rayalign.errors import UserError
from rayalign.rollout.base import Completion, SamplingParams
from rayalign.rollout.cache import make_cache
from rayalign.rollout.noise import sample_key, uniforms
from rayalign.rollout.sampling import draw

TOKENS_PER_BATCH = 16_384
COMPACT_BELOW = 0.9
"""Finished rows leave the batch when the share of live ones falls below this: leaving copies the whole cache once."""


class HfEngine:
    """Samples from ``model`` as it is at the time of the call; the caller may train it in between.

    A prompt is read once and its cache is shared out among its samples. The noise of a token does not depend on the
    batch; the logits do, by rounding, so another batch shape may turn a draw that falls on the edge between two tokens.
    Runs in the caller's autocast, so that log-probabilities are those of a training forward there.

    Args:
        model: a causal language model with a key-value cache.
        tokens_per_batch: bound on rows × (prompt + new tokens) that are sampled together; one prompt always fits.

    Raises:
        UserError: the model keeps no key-value cache.
    """

    def __init__(self, model: PreTrainedModel, *, tokens_per_batch: int = TOKENS_PER_BATCH) -> None:
        accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepted:
            raise UserError(
                f"rollout.engine: {model.config.model_type} models have no key-value cache, so hf cannot sample them"
            )
        self.model = model
        self.tokens_per_batch = tokens_per_batch
        self._takes_positions = "position_ids" in accepted

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int] | None = None
    ) -> list[Completion]:
        """See :meth:`rayalign.rollout.base.RolloutEngine.generate`.

        Raises:
            ValueError: a prompt is empty, or there is not one key per prompt.
            FloatingPointError: the model's log-probabilities are not finite.
        """
        keys = range(len(prompts)) if keys is None else keys
        if len(keys) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(keys)} keys")
        if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
            raise ValueError(f"prompt {empty[0]} has no tokens: there is nothing to continue")
        completions: list[Completion] = []
        with torch.no_grad(), _evaluating(self.model):
            for batch in self._batches(prompts, params):
                noise = _noise([keys[index] for index in batch], params)
                drawn = self._sample([prompts[index] for index in batch], params, noise=noise)
                completions += _completions(batch, params, *drawn)
        return sorted(completions, key=lambda completion: (completion.prompt_index, completion.sample_index))

    def _batches(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[list[int]]:
        """Prompts of similar length together, longest first, so that memory runs out at once or never."""
        batch: list[int] = []
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            rows = (len(batch) + 1) * params.num_samples
            if batch and rows * (len(prompts[batch[0]]) + params.max_new_tokens) > self.tokens_per_batch:
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
        cache = make_cache(self.model.config)
        logits = self._step(ids, attention, cache).repeat_interleave(params.num_samples, dim=0)
        cache.batch_repeat_interleave(params.num_samples)
        attention = attention.repeat_interleave(params.num_samples, dim=0)

        tokens = torch.full(noise.shape, -1, device=device)
        logps = torch.full((2, *noise.shape), torch.nan, device=device)
        rows = torch.arange(len(noise), device=device)
        live = torch.ones_like(rows, dtype=torch.bool)
        for t in range(params.max_new_tokens):
            token, logp = draw(logits, noise[rows, t], params)
            tokens[rows[live], t] = token[live]
            logps[:, rows[live], t] = logp[:, live]
            live &= ~torch.isin(token, stop)
            num_live = int(live.sum())
            if num_live == 0 or t + 1 == params.max_new_tokens:
                break
            if num_live < COMPACT_BELOW * len(rows):
                kept = live.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                rows, token, attention, live = rows[kept], token[kept], attention[kept], live[kept]
            attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
            logits = self._step(token[:, None], attention, cache)
        return tokens, logps[0], logps[1]

    def _step(self, ids: Tensor, attention: Tensor, cache: DynamicCache) -> Tensor:
        """Float32 logits [rows, V] after the last column of ``ids`` [rows, columns]; ``cache`` grows by them."""
        inputs = {"input_ids": ids, "attention_mask": attention, "past_key_values": cache}
        if self._takes_positions:
            inputs["position_ids"] = (attention.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits: Tensor = self.model(**inputs, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].float()


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _noise(keys: Sequence[int], params: SamplingParams) -> Tensor:
    """Float64 uniforms [len(keys) · num_samples, max_new_tokens]."""
    sample_keys = [sample_key(params.seed, key, sample) for key in keys for sample in range(params.num_samples)]
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
