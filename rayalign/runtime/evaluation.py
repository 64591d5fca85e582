"""Evaluation in actors of its own: each holds the reference and measures one checkpoint after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model import load_tokenizer, model_directory
from rayalign.judge.base import Scorer
from rayalign.judge.measure import Measured, Prompt, ScorerSpec, make_scorers, measure
from rayalign.rollout.base import SamplingParams


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
    """One process that measures policies against the reference."""

    def __init__(self, spec: EvaluationSpec) -> None:
        self.spec = spec
        self.loaded = load(spec)

    def __call__(self, directory: Path | None) -> dict[str, Measured]:
        """The policy in ``directory``, or the reference itself where it is None, on every prompt set."""
        loaded = self.loaded
        policy = loaded.reference
        if directory is not None:
            model = replace(self.spec.reference.model, name=str(directory), revision=None, from_scratch=False)
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
