"""An engine without a model: every next token has the same known distribution. For tests of what consumes samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayalign.rollout.base import Completion, SamplingParams
from rayalign.rollout.noise import sample_key, uniforms
from rayalign.rollout.sampling import sample_tokens


class FakeEngine:
    """Samples from ``softmax(logits)`` whatever the prompt.

    Args:
        logits: one float per token of the vocabulary.
    """

    def __init__(self, logits: Sequence[float]) -> None:
        self.logits = torch.tensor(logits)[None]

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int] | None = None
    ) -> list[Completion]:
        """See :meth:`rayalign.rollout.base.RolloutEngine.generate`."""
        keys = range(len(prompts)) if keys is None else keys
        if len(keys) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(keys)} keys")
        if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
            raise ValueError(f"prompt {empty[0]} has no tokens: there is nothing to continue")
        return [
            self._completion(index, sample, key, params)
            for index, key in enumerate(keys)
            for sample in range(params.num_samples)
        ]

    def _completion(self, index: int, sample: int, key: int, params: SamplingParams) -> Completion:
        noise = torch.from_numpy(uniforms(sample_key(params.seed, key, sample), params.max_new_tokens))
        ids: list[int] = []
        behavior: list[float] = []
        sampler: list[float] = []
        for t in range(params.max_new_tokens):
            token, logp = sample_tokens(self.logits, noise[t : t + 1], params)
            ids.append(int(token))
            behavior.append(float(logp[0]))
            sampler.append(float(logp[1]))
            if ids[-1] in params.stop_ids:
                break
        return Completion(
            prompt_index=index,
            sample_index=sample,
            token_ids=tuple(ids),
            behavior_token_logp=tuple(behavior),
            sampler_logp=tuple(sampler),
            finish_reason="stop" if ids[-1] in params.stop_ids else "length",
        )
