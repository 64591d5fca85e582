"""Which way of reading rows gives a family's own log-probabilities, proven before anything is drawn."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from rayalign.engine.model.context import context_of
from rayalign.engine.model.parity import TOLERANCE, choose_attention
from rayalign.engine.model.proofs import proven
from rayalign.engine.model.shrunken import probe_for
from rayalign.errors import UserError, first_line
from rayalign.rollout.base import SamplingParams
from rayalign.rollout.cache import make_cache
from rayalign.rollout.hf import HfEngine, Reading, accepted_arguments

PROMPTS = ((3, 5, 7), (11, 2, 6, 9, 4, 8, 10, 3, 12), (5, 4, 3))
"""Prompts of several lengths, two of them equal."""
NEW_TOKENS = 8
EXACT = 1e-4
"""Nats per token by which rounding lets a way differ; one that is further off is taken only if no other is better."""

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What a family's code raises for a cache, or for rows, that it does not understand."""

log = logging.getLogger(__name__)


def choose_reading(model: PreTrainedModel) -> Reading:
    """The fastest way of reading that ``model``'s family is proven to sample right by.

    The proof compares the log-probabilities that the engine says of its own samples with those of one plain forward
    over each: on a small random model of a family that reads packed rows, else on the model itself. The result is kept:
    see :mod:`rayalign.engine.model.proofs`.

    Raises:
        UserError: not even reading all of a row for every token gives the log-probabilities of a plain forward.
    """
    found: dict[Reading, float | str] = proven(
        "sampling", model, lambda: dict(measure_readings(model)), device=model.device
    )
    errors = {reading: error for reading, error in found.items() if isinstance(error, float)}
    best = min(errors, key=lambda reading: (errors[reading] > EXACT, errors[reading] > TOLERANCE), default=None)
    if best is None or not errors[best] <= TOLERANCE:
        told = "; ".join(f"{reading}: {error}" for reading, error in found.items())
        raise UserError(
            f"rollout.engine: hf cannot sample {model.config.model_type} models: by no way of reading rows are its "
            f"log-probs those of a plain forward ({told}); name another engine or model"
        )
    if best == "whole":
        log.warning(
            "%s models are sampled without a cache, so that every token reads its whole row again: that is slow",
            model.config.model_type,
        )
    return best


def measure_readings(model: PreTrainedModel) -> Iterator[tuple[Reading, float | str]]:
    """Way of reading → the largest |Δ log-prob| of a token, in nats, or what went wrong; up to the first right one."""
    packed = choose_attention(model).layout == "packed"
    probe = probe_for(model, model.device) if packed else model
    for reading in readings(model):
        try:
            found: float | str = error_of(HfEngine(probe, reading=reading))
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
        ) as error:
            found = f"{type(error).__name__}: {first_line(error)}"
        yield reading, found
        if isinstance(found, float) and found <= EXACT:
            return


def readings(model: PreTrainedModel) -> tuple[Reading, ...]:
    """The ways to try, fastest first."""
    names = accepted_arguments(model)
    if "past_key_values" not in names:
        return ("whole",)
    counts_filling = "position_ids" not in names or has_states(model.config)
    return ("even", "whole") if counts_filling else ("padded", "even", "whole")


def has_states(config: PretrainedConfig) -> bool:
    """Whether layers keep a state that runs along the row, which filling leaves its mark in, if a small one."""
    try:
        layers = make_cache(config).layers
    except FAILURES:
        return True
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def error_of(engine: HfEngine) -> float:
    """How far the log-probabilities of samples are from those of a plain forward; some of the samples end early."""
    context = context_of(engine.model.config)
    most = context.tokens if context is not None else 2**30
    new = min(NEW_TOKENS, max(1, most - max(map(len, PROMPTS))))
    prompts = [prompt[: max(1, most - new)] for prompt in PROMPTS]
    free = engine.generate(prompts, SamplingParams(max_new_tokens=new, num_samples=2))
    stops = {completion.token_ids[min(2, new - 1)] for completion in free[:3]}
    drawn = engine.generate(prompts, SamplingParams(max_new_tokens=new, num_samples=2, stop_ids=tuple(stops)))
    differences = []
    for completion in (*free, *drawn):
        prompt = prompts[completion.prompt_index]
        expected = plain_logps(engine.model, prompt, completion.token_ids)
        differences.append((expected - torch.tensor(completion.sampler_logp)).abs().max())
    return float(torch.stack(differences).max())


@torch.no_grad()
def plain_logps(model: PreTrainedModel, prompt: tuple[int, ...], ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probs of ``ids`` after ``prompt`` by one forward over both, on the CPU."""
    whole = torch.tensor([[*prompt, *ids]], device=model.device)
    logp: torch.Tensor = model(input_ids=whole).logits[0, :-1].float().log_softmax(dim=-1)
    return logp.gather(1, whole[0, 1:, None])[len(prompt) - 1 :, 0].cpu()
