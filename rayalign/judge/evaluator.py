"""One process of an evaluation: samples a few prompts from a policy, or measures such samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from rayalign.config.scoring import ScorerConfig
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.precision import EXACT, Precision
from rayalign.engine.model.pretrained import CPU, ModelSpec, model_tokenizer
from rayalign.judge import judge_of
from rayalign.judge.measure import Measured, Prompt, Sampled, make_scorers, measure_samples, sample_replies
from rayalign.rollout.base import SamplingParams
from rayalign.rollout.engines import ALONE, EngineOptions, FrozenEngine, Sampler, make_sampler
from rayalign.storage.place import Place

TOKENS_PER_PART = 262_144
"""Bound on samples × (prompt + new tokens) of one part: minutes of the embedded engine on a GPU."""

Subject: TypeAlias = Place | ModelSpec | None
"""A policy: the folder of a checkpoint, any other model, or the reference where it is None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSpec:
    """What is measured, the same for every policy."""

    reference: ScoringSpec
    prompt_sets: Mapping[str, tuple[Prompt, ...]]
    sampling: SamplingParams
    scorers: tuple[ScorerConfig, ...]
    engine: str = "hf"
    """What samples: a rollout engine."""
    options: EngineOptions = ALONE
    saved: Precision = EXACT
    """A run's models are measured with the weights that its ``final/`` has, or would have."""
    judge: ScorerConfig | None = None
    baseline: ModelSpec | None = None
    """What wins are counted against; None: the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive prompts of one set: what is sampled and measured as one piece of work."""

    prompt_set: str
    places: range

    @property
    def in_words(self) -> str:
        """What it is called in messages."""
        return f"prompts {self.places.start} to {self.places.stop - 1} of {self.prompt_set}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartToDraw:
    """Asks for a policy's samples of one part."""

    subject: Subject
    part: Part

    @property
    def in_words(self) -> str:
        """What it is called in messages."""
        return f"sampling {self.part.in_words}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartToMeasure:
    """Asks what a policy's samples of one part are worth."""

    subject: Subject
    part: Part
    drawn: Sampled
    opponents: tuple[str, ...] | None = None
    """The baseline's replies, which the judge compares with; None: the policy is the baseline."""

    @property
    def in_words(self) -> str:
        """What it is called in messages."""
        return f"measuring {self.part.in_words}"


def parts_of(spec: EvaluationSpec) -> tuple[Part, ...]:
    """The prompt sets in parts that depend on the prompts and the sampling alone, whatever the number of processes."""
    found: list[Part] = []
    for name, prompts in spec.prompt_sets.items():
        lengths = [len(prompt.ids) for prompt in prompts]
        found += [Part(prompt_set=name, places=places) for places in ranges(lengths, spec.sampling)]
    return tuple(found)


def ranges(lengths: list[int], sampling: SamplingParams) -> list[range]:
    """Consecutive places of at most :data:`TOKENS_PER_PART` tokens each; one prompt always fits."""
    starts, tokens = [0], 0
    for place, length in enumerate(lengths):
        own = sampling.num_samples * (length + sampling.max_new_tokens)
        if tokens and tokens + own > TOKENS_PER_PART:
            starts.append(place)
            tokens = 0
        tokens += own
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True)]


class Evaluator:
    """Keeps the reference, the newest policy and an engine between items."""

    def __init__(self, spec: EvaluationSpec) -> None:
        self.spec = spec
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = model_tokenizer(spec.reference.model)
        self.scorers = make_scorers(spec.scorers)
        self.judge = judge_of(spec.judge) if spec.judge is not None else None
        self.held: dict[ModelSpec, FrozenModel] = {}
        """The reference and one policy, as far as they were asked for."""
        self.sampler: Sampler | None = None
        self.loaded: ModelSpec | None = None
        """What the sampler samples from."""

    def __call__(self, item: PartToDraw | PartToMeasure) -> Sampled | Measured:
        """The samples that are asked for, or what they are worth."""
        prompts = [self.spec.prompt_sets[item.part.prompt_set][place] for place in item.part.places]
        if isinstance(item, PartToDraw):
            return self._draw(item, prompts)
        if self.sampler is not None:
            self.sampler.rest()
        return measure_samples(
            self._model(self._spec(item.subject)),
            self._model(self.spec.reference.model),
            prompts,
            item.drawn,
            self.scorers,
            judge=self.judge,
            opponents=item.opponents,
        )

    def _draw(self, item: PartToDraw, prompts: Sequence[Prompt]) -> Sampled:
        """The draws depend on the seed and on a prompt's place in its set, so that policies answer with one noise."""
        spec = self._spec(item.subject)
        engine = FrozenEngine(self._model(spec)) if self.spec.engine == "hf" else self._sampler(spec)
        return sample_replies(engine, prompts, self.spec.sampling, keys=item.part.places, tokenizer=self.tokenizer)

    def _sampler(self, model: ModelSpec) -> Sampler:
        """An engine of its own with the weights of ``model``; what measures leaves the device to it meanwhile."""
        self._put_away()
        if self.sampler is None:
            self.sampler = make_sampler(self.spec.engine, self.spec.reference, self.device, self.spec.options)
        if self.loaded != model:
            self.loaded = None
            self.sampler.load(model)
            self.loaded = model
        return self.sampler

    def _put_away(self) -> None:
        """Leave the device's memory to an engine of its own until a model is asked for again."""
        for model in self.held.values():
            model.policy.to(CPU)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _model(self, spec: ModelSpec) -> FrozenModel:
        """The reference, or one policy at a time, on the device."""
        if spec not in self.held:
            reference = self.spec.reference.model
            self.held = {own: model for own, model in self.held.items() if own == reference}
            self.held[spec] = FrozenModel(replace(self.spec.reference, model=spec), self.device)
        self.held[spec].policy.to(self.device)
        return self.held[spec]

    def _spec(self, subject: Subject) -> ModelSpec:
        reference = self.spec.reference.model
        if subject is None:
            return reference
        if isinstance(subject, ModelSpec):
            return subject
        return replace(reference.at(subject, text_only=False), rounded=self.spec.saved)
