"""vLLM in this process: continuous batching, prompts shared through the prefix cache, weights reloaded in place."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from rayalign.engine.batches import State
from rayalign.engine.canary import PROMPT_TOKENS, canary_group
from rayalign.engine.frozen import ScoringSpec
from rayalign.engine.model.context import context_of
from rayalign.engine.model.kinds import read_config
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.errors import UserError
from rayalign.rollout.base import Completion, SamplingParams
from rayalign.rollout.engines import ALONE, EngineOptions
from rayalign.rollout.sampling import sample_key

SEED_BITS = 63
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives and dies with this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class VllmSampler:
    """See :class:`rayalign.rollout.engines.Sampler`.

    A completion's seed is fixed by (seed, key, sample); its tokens depend on the batch by rounding only.
    """

    def __init__(self, spec: ScoringSpec, options: EngineOptions = ALONE) -> None:
        self.spec = spec
        self.options = options
        self.resting = False
        self.llm: Any = None

    def load(self, model: ModelSpec, state: State | None = None) -> None:
        """Start the engine with the first weights, later replace all of them.

        vLLM keeps what it computed for known prefixes across a reload, so that cache is emptied with it.
        """
        started = self.llm is not None
        directory = str(model.directory())
        if model.config.from_scratch:
            raise UserError(
                "rollout.engine: vllm reads weights from a folder, and model.from_scratch has none yet; write hf"
            )
        if self.llm is None:
            self.llm = start(directory, model, self.options)
        self._wake()  # before the weights: what sleeps is restored over them
        if started or state is not None:
            where = {"weights_path": directory} if state is None else {"weights_iterator": untied(state)}
            self.llm.collective_rpc("reload_weights", kwargs=where)
            if self.llm.llm_engine.model_config.hf_text_config.tie_word_embeddings:
                self.llm.apply_model(tie_head)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache after a reload")

    def rest(self) -> None:
        if self.options.takes_turns and torch.cuda.is_available() and not self.resting:
            self.llm.sleep(level=1)
            self.resting = True

    def _wake(self) -> None:
        if self.resting:
            self.llm.wake_up()
            self.resting = False

    def digest(self) -> str | None:
        """vLLM packs weights as its kernels want them."""
        return None

    def canary(self) -> tuple[float, ...]:
        from vllm import SamplingParams as VllmParams

        config = self.llm.llm_engine.model_config.hf_text_config
        group = canary_group(int(config.vocab_size))
        ids = [*group.prompt_ids.tolist(), *group.candidates[0].ids.tolist()]
        (output,) = self.llm.generate(
            [{"prompt_token_ids": ids}],
            VllmParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        told = output.prompt_logprobs
        return tuple(float(told[place][ids[place]].logprob) for place in range(PROMPT_TOKENS, len(ids)))

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int] | None = None
    ) -> list[Completion]:
        """See :meth:`rayalign.rollout.base.RolloutEngine.generate`.

        Raises:
            ValueError: a prompt is empty, or there is not one key per prompt.
            UserError: a prompt and its completion do not fit the model's context.
            FloatingPointError: log-probabilities are not finite.
        """
        keys = range(len(prompts)) if keys is None else keys
        if len(keys) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(keys)} keys")
        if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
            raise ValueError(f"prompt {empty[0]} has no tokens: there is nothing to continue")
        self._refuse_long(prompts, params)
        self._wake()
        wanted = list(product(range(len(prompts)), range(params.num_samples)))
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompts[index])} for index, _ in wanted],
            [vllm_params(params, seed=sample_key(params.seed, keys[index], sample)) for index, sample in wanted],
            use_tqdm=False,
        )
        return [
            completion(output.outputs[0], index, sample, params)
            for (index, sample), output in zip(wanted, outputs, strict=True)
        ]

    def _refuse_long(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        longest = max((len(prompt) for prompt in prompts), default=0)
        limit = int(self.llm.llm_engine.model_config.max_model_len)
        if longest + params.max_new_tokens > limit:
            raise UserError(
                f"a prompt of {longest} tokens and rollout.max_new_tokens {params.max_new_tokens} are more than the "
                f"model's context of {limit}: lower data.max_prompt_tokens or rollout.max_new_tokens"
            )


def untied(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight once, under its first name: as a file of weights has them."""
    seen = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.nbytes)
        if place not in seen:
            seen.add(place)
            yield name, tensor


def tie_head(model: torch.nn.Module) -> None:
    """Make the head the embedding again: a reload replaces the embedding and leaves the old weights in the head."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = list(model.modules())
    embedding = next(m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead))
    for head in (module for module in modules if isinstance(module, ParallelLMHead)):
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)  # packs them, on a CPU


def start(directory: str, model: ModelSpec, options: EngineOptions) -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    dtype = model.config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    context = context_of(read_config(Path(directory), trust_remote_code=model.config.trust_remote_code))
    longest = context.tokens if context is not None and context.rope == "longrope" else None
    # A seeded request whose prompt is read in parts makes vLLM 0.32 ask a CPU generator for what only CUDA's have.
    special: dict[str, Any] = {"enable_chunked_prefill": False}
    if torch.cuda.is_available():
        special = {"gpu_memory_utilization": options.memory_share, "enable_sleep_mode": options.takes_turns}
    return LLM(
        **special,
        tensor_parallel_size=options.tensor_parallel,
        model=directory,
        max_model_len=longest,  # longrope beyond it has other frequencies than in training
        dtype=dtype,
        trust_remote_code=model.config.trust_remote_code,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",  # the model's own would set a temperature and end tokens behind our back
    )


def vllm_params(params: SamplingParams, *, seed: int) -> Any:
    from vllm import SamplingParams as VllmParams

    return VllmParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_new_tokens,
        seed=seed % 2**SEED_BITS,
        stop_token_ids=list(params.stop_ids),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )


def completion(output: Any, index: int, sample: int, params: SamplingParams) -> Completion:
    """vLLM's answer in our terms. It tells one log-probability per token, of the distribution drawn from."""
    ids = tuple(int(token) for token in output.token_ids)
    told = [float(entry[token].logprob) for entry, token in zip(output.logprobs, ids, strict=True)]
    if not all(map(math.isfinite, told)):
        raise FloatingPointError("vLLM's log-probabilities are not finite: the weights are damaged")
    unknown = [math.nan] * len(ids)
    greedy = params.temperature == 0
    return Completion(
        prompt_index=index,
        sample_index=sample,
        token_ids=ids,
        behavior_token_logp=tuple([0.0] * len(ids) if greedy else told),
        sampler_logp=tuple(told if greedy or not params.truncates else unknown),
        finish_reason="stop" if ids[-1] in params.stop_ids else "length",
    )
