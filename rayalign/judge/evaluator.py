"""Evaluation in actors of its own: each holds the reference and measures one checkpoint after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rayalign.config.scoring import ScorerConfig
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.precision import EXACT, Precision
from rayalign.engine.model.pretrained import ModelSpec, model_tokenizer
from rayalign.judge import judge_of
from rayalign.judge.base import Judge, Scorer
from rayalign.judge.measure import (
    Measured,
    Prompt,
    Sampled,
    make_scorers,
    measure_policy,
    sample_replies,
)
from rayalign.rollout.base import SamplingParams
from rayalign.storage.place import ObjectPath, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSpec:
    """What is measured, the same for every policy."""

    reference: ScoringSpec
    prompt_sets: Mapping[str, tuple[Prompt, ...]]
    sampling: SamplingParams
    scorers: tuple[ScorerConfig, ...]
    saved: Precision = EXACT
    """A run's models are measured with the weights that its ``final/`` has, or would have."""
    judge: ScorerConfig | None = None
    baseline: ModelSpec | None = None
    """What wins are counted against; None: the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What an evaluator keeps between policies."""

    device: torch.device
    reference: FrozenModel
    tokenizer: Any
    scorers: Mapping[str, Scorer]
    judge: Judge | None
    opponents: dict[str, Sampled] = field(default_factory=dict)
    """The baseline's samples of every prompt set, drawn when the judge first needs them."""


class Evaluator:
    """One process that measures policies against the reference."""

    def __init__(self, spec: EvaluationSpec) -> None:
        self.spec = spec
        self.loaded = load_evaluation(spec)

    def __call__(self, subject: Place | ModelSpec | None) -> dict[str, Measured]:
        """The policy in a checkpoint's folder, or any other, or the reference where it is None, on every prompt set."""
        loaded, spec = self.loaded, self.spec
        if loaded.judge is not None and not loaded.opponents:
            baseline = self._model(spec.baseline)
            loaded.opponents.update(
                {
                    name: sample_replies(baseline, prompts, spec.sampling, tokenizer=loaded.tokenizer)
                    for name, prompts in spec.prompt_sets.items()
                }
            )
        policy = self._model(subject)
        opponents = loaded.opponents if subject != spec.baseline else {}
        return {
            name: measure_policy(
                policy,
                loaded.reference,
                prompts,
                spec.sampling,
                loaded.scorers,
                tokenizer=loaded.tokenizer,
                judge=loaded.judge,
                opponent=opponents.get(name),
            )
            for name, prompts in spec.prompt_sets.items()
        }

    def _model(self, subject: Place | ModelSpec | None) -> FrozenModel:
        if subject is None:
            return self.loaded.reference
        if isinstance(subject, Path | ObjectPath):
            subject = replace(self.spec.reference.model.at(subject, text_only=False), rounded=self.spec.saved)
        return FrozenModel(replace(self.spec.reference, model=subject), self.loaded.device)


def load_evaluation(spec: EvaluationSpec) -> Loaded:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Loaded(
        device=device,
        reference=FrozenModel(spec.reference, device),
        tokenizer=model_tokenizer(spec.reference.model),
        scorers=make_scorers(spec.scorers),
        judge=judge_of(spec.judge) if spec.judge is not None else None,
    )
