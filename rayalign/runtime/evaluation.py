"""Evaluation in actors of its own: each holds the reference and measures one checkpoint after the other."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch

from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model import load_tokenizer, model_directory
from rayalign.errors import UserError
from rayalign.judge.measure import Measured, Prompt, ScorerSpec, make_scorers, measure
from rayalign.rollout.base import SamplingParams
from rayalign.runtime.placement import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSpec:
    """What is measured, the same for every policy."""

    reference: ScoringSpec
    prompt_sets: Mapping[str, tuple[Prompt, ...]]
    sampling: SamplingParams
    scorers: tuple[ScorerSpec, ...]


class Evaluator:
    """One process that measures policies against the reference."""

    def __init__(self, spec: EvaluationSpec, threads: int) -> None:
        torch.set_num_threads(threads)
        self.spec = spec
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.reference = FrozenModel(spec.reference, self.device)
        directory = model_directory(spec.reference.model.name, spec.reference.model.revision)
        self.tokenizer = load_tokenizer(directory, trust_remote_code=spec.reference.model.trust_remote_code)
        self.scorers = make_scorers(spec.scorers)

    def measure(self, directory: str | None) -> dict[str, Measured]:
        """The policy in ``directory``, or the reference itself where it is None, on every prompt set."""
        policy = self.reference
        if directory is not None:
            model = replace(self.spec.reference.model, name=directory, revision=None, from_scratch=False)
            policy = FrozenModel(replace(self.spec.reference, model=model), self.device)
        return {
            name: measure(policy, self.reference, prompts, self.spec.sampling, self.scorers, tokenizer=self.tokenizer)
            for name, prompts in self.spec.prompt_sets.items()
        }


class Evaluators:
    """A few :class:`Evaluator` actors and a queue for them; safe to use from several threads."""

    def __init__(self, spec: EvaluationSpec, share: Share, count: int) -> None:
        actor = ray.remote(Evaluator).options(num_cpus=share.cpus, num_gpus=share.gpus)
        self.idle: queue.Queue[ray.actor.ActorHandle] = queue.Queue()
        for _ in range(count):
            self.idle.put(actor.remote(spec, share.threads))

    def measure(self, directory: Path | None) -> dict[str, Measured]:
        """Wait for an idle actor and let it measure; a scorer's own UserError is raised as such."""
        actor = self.idle.get()
        try:
            measured: dict[str, Measured] = ray.get(actor.measure.remote(str(directory) if directory else None))
            return measured
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, UserError) else error
            raise cause from error
        finally:
            self.idle.put(actor)

    def close(self) -> None:
        while not self.idle.empty():
            ray.kill(self.idle.get())
