"""Evaluation in actors of its own: each holds the reference and measures one checkpoint after the other."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model import load_tokenizer, model_directory
from rayalign.errors import UserError
from rayalign.judge.base import Scorer
from rayalign.judge.measure import Measured, Prompt, ScorerSpec, make_scorers, measure
from rayalign.rollout.base import SamplingParams
from rayalign.runtime.failures import root_cause
from rayalign.runtime.placement import Share

START_SECONDS = 300.0
MAX_DEATHS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSpec:
    """What is measured, the same for every policy."""

    reference: ScoringSpec
    prompt_sets: Mapping[str, tuple[Prompt, ...]]
    sampling: SamplingParams
    scorers: tuple[ScorerSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What an evaluator keeps between policies."""

    device: torch.device
    reference: FrozenModel
    tokenizer: Any
    scorers: Mapping[str, Scorer]


class Evaluator:
    """One process that measures policies against the reference, which it loads with the first of them."""

    def __init__(self, spec: EvaluationSpec, threads: int) -> None:
        torch.set_num_threads(threads)
        self.spec = spec
        self.loaded: Loaded | None = None

    def measure(self, directory: str | None) -> dict[str, Measured]:
        """The policy in ``directory``, or the reference itself where it is None, on every prompt set."""
        # Loading here and not above: of an error in an actor's constructor Ray keeps the text only.
        self.loaded = loaded = self.loaded or load(self.spec)
        policy = loaded.reference
        if directory is not None:
            model = replace(self.spec.reference.model, name=directory, revision=None, from_scratch=False)
            policy = FrozenModel(replace(self.spec.reference, model=model), loaded.device)
        return {
            name: measure(
                policy, loaded.reference, prompts, self.spec.sampling, loaded.scorers, tokenizer=loaded.tokenizer
            )
            for name, prompts in self.spec.prompt_sets.items()
        }


def load(spec: EvaluationSpec) -> Loaded:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = spec.reference.model
    return Loaded(
        device=device,
        reference=FrozenModel(spec.reference, device),
        tokenizer=load_tokenizer(
            model_directory(model.name, model.revision), trust_remote_code=model.trust_remote_code
        ),
        scorers=make_scorers(spec.scorers),
    )


class Evaluators:
    """A few :class:`Evaluator` actors and a queue for them; safe to use from several threads.

    Raises UserError when the cluster has no room for them within five minutes.
    """

    def __init__(self, spec: EvaluationSpec, share: Share, count: int) -> None:
        actor = ray.remote(Evaluator).options(
            num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=MAX_DEATHS, max_task_retries=MAX_DEATHS
        )
        actors = [actor.remote(spec, share.threads) for _ in range(count)]
        starting = [actor.__ray_ready__.remote() for actor in actors]
        if len(ray.wait(starting, num_returns=count, timeout=START_SECONDS)[0]) < count:
            raise UserError(
                f"evaluation waited {START_SECONDS:.0f} s for {count} processes with {share.cpus:g} CPUs and "
                f"{share.gpus:g} GPUs each; free in the cluster: {ray.available_resources()}"
            )
        self.idle: queue.Queue[ray.actor.ActorHandle] = queue.Queue()
        for each in actors:
            self.idle.put(each)

    def measure(self, directory: Path | None) -> dict[str, Measured]:
        """Wait for an idle actor and let it measure; a scorer's own UserError is raised as such."""
        actor = self.idle.get()
        try:
            measured: dict[str, Measured] = ray.get(actor.measure.remote(str(directory) if directory else None))
            return measured
        except ray.exceptions.RayTaskError as error:
            cause = root_cause(error)
            raise (cause if isinstance(cause, UserError) else error) from error
        finally:
            self.idle.put(actor)

    def close(self) -> None:
        while not self.idle.empty():
            ray.kill(self.idle.get())
