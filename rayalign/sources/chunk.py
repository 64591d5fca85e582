"""A few prompts → finished groups: complete, score, label, look up the reference, write one shard. No Ray here.

The unit of work of a rollout pool. What a chunk holds depends on its positions, on the weights it names and on seeds
alone, so that a chunk which died with its process is simply made again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayalign.data.group import Candidate, Column, Group
from rayalign.data.prepare import Shape
from rayalign.data.shard import ShardInfo, write_shard
from rayalign.data.texts import PromptTexts
from rayalign.data.unpair import Mismatched
from rayalign.engine.canary import TOLERANCE, canary_error, canary_group
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model import load_tokenizer, model_directory
from rayalign.engine.source import Weights
from rayalign.errors import UserError
from rayalign.judge import make_scorer
from rayalign.judge.base import Scorer
from rayalign.judge.measure import ScorerSpec
from rayalign.manifest import read_manifest
from rayalign.rollout.base import Completion, RolloutEngine, SamplingParams
from rayalign.rollout.engines import make_engine
from rayalign.sources.label import Labelled, LabelSpec, label, label_key
from rayalign.sources.off_policy import Drawn, StoredGroups
from rayalign.sources.streams import StoredStream


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpec:
    """How groups are made, the same for all chunks of a run; plain values, so that it travels between processes."""

    prompts: StoredStream
    seed: int
    reference: ScoringSpec
    """Also says how the policy is loaded and laid out."""
    engine: str
    sampling: SamplingParams | None
    """None draws nothing: stored candidates are scored and labelled again."""
    keep_stored: bool
    """Stored candidates of a prompt stand before the fresh ones."""
    scorer: ScorerSpec
    label: LabelSpec
    shape: Shape
    needs_reference: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Prompts at consecutive positions, the weights that complete them, and where the shard belongs."""

    name: str
    positions: range
    directory: Path
    weights: Weights | None
    """None: the reference itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkReport:
    """What a chunk cost and gave; sums, so that chunks add up."""

    shard: ShardInfo
    prompts: int
    completions: int
    tokens_generated: int
    finished: int
    scorer_calls: int
    labels: int
    """Prompts whose candidates got a preference (or rewards)."""
    reward_sum: float
    """Over fresh completions; over stored ones where nothing is drawn."""
    seconds_generating: float
    seconds_loading: float
    quarantined: tuple[dict[str, Any], ...]


class ChunkMaker:
    """One process of a rollout pool: keeps the models that its chunks need, and nothing else."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.spec: ChunkSpec | None = None

    def __call__(self, job: tuple[ChunkSpec, Chunk]) -> ChunkReport:
        """Write the chunk's shard.

        Raises:
            UserError: the weights are not those that the chunk names, or the scorer cannot be made.
        """
        spec, chunk = job
        self._prepare(spec)
        began = time.monotonic()
        loaded = self._load(spec, chunk.weights)
        drawn = self.prompts.at(chunk.positions)
        texts = [self.texts[id(group.store)][group.row] for group in drawn]
        ready = time.monotonic()
        completions = self._complete(spec, chunk, [group.read().prompt_ids.tolist() for group in drawn])
        generated = time.monotonic()
        candidates = [stored_candidates(group) if spec.keep_stored else () for group in drawn]
        candidates = [(*mine, *fresh) for mine, fresh in zip(candidates, completions, strict=True)]
        scores, quarantined = self._score(drawn, texts, candidates)
        labelled = [
            label(own, [len(c.ids) for c in answers], spec.label, shape=spec.shape, key=label_key(spec.seed, position))
            if own is not None
            else Labelled(kept=(0,), preferred=False)
            for own, answers, position in zip(scores, candidates, chunk.positions, strict=True)
        ]
        groups = [
            make_group(group, answers, own, found)
            for group, answers, own, found in zip(drawn, candidates, scores, labelled, strict=True)
        ]
        if spec.shape == "labelled":
            pairs = Mismatched(groups)
            groups = [pairs[number] for number in range(len(groups))]
        if spec.needs_reference:
            columns = self.reference.token_logps(groups)
            groups = [
                replace(group, per_token={**group.per_token, "ref_token_logp": column})
                for group, column in zip(groups, columns, strict=True)
            ]
        fresh = [answer for answers in completions for answer in answers]
        rewards = [
            score
            for own, answers in zip(scores, completions, strict=True)
            if own is not None
            for score in (own[len(own) - len(answers) :] if answers else own)
        ]
        return ChunkReport(
            shard=write_shard(chunk.directory, chunk.name, groups, prompts=texts),
            prompts=len(drawn),
            completions=len(fresh),
            tokens_generated=sum(len(answer.ids) for answer in fresh),
            finished=sum(answer.finished for answer in fresh),
            scorer_calls=sum(len(answers) for answers in candidates),
            labels=sum(found.preferred for found in labelled),
            reward_sum=float(np.sum(rewards)),
            seconds_generating=generated - ready,
            seconds_loading=loaded - began,
            quarantined=tuple(quarantined),
        )

    def _prepare(self, spec: ChunkSpec) -> None:
        """Open what stays the same from chunk to chunk."""
        if spec == self.spec:
            return
        model = spec.reference.model
        self.tokenizer = load_tokenizer(
            model_directory(model.name, model.revision), trust_remote_code=model.trust_remote_code
        )
        self.prompts = StoredGroups(spec.prompts, spec.seed)
        self.texts = {id(store): PromptTexts(store) for store in self.prompts.stores}
        self.scorer: Scorer = make_scorer(spec.scorer.name, **spec.scorer.parameters)
        self.reference = FrozenModel(spec.reference, self.device)
        self.engine: RolloutEngine | None = None
        self.loaded: str | None = None
        self.spec = spec

    def _load(self, spec: ChunkSpec, weights: Weights | None) -> float:
        """The engine with exactly the weights asked for; returns when they were ready."""
        wanted = weights.digest if weights else "reference"
        if spec.sampling is not None and (self.engine is None or self.loaded != wanted):
            model = spec.reference.model
            if weights is not None:
                refuse_other_weights(weights)
                model = replace(model, name=str(weights.directory), revision=None, from_scratch=False)
            self.loaded = None  # whatever fails below, nothing is drawn with half-loaded weights
            policy = FrozenModel(replace(spec.reference, model=model), self.device) if weights else self.reference
            if weights is not None:
                refuse_broken_weights(policy, weights)
            self.engine = make_engine(spec.engine, policy, previous=self.engine, sampling=spec.sampling)
            self.loaded = wanted
        return time.monotonic()

    def _complete(self, spec: ChunkSpec, chunk: Chunk, prompts: Sequence[Sequence[int]]) -> list[list[Answer]]:
        answers: list[list[Answer]] = [[] for _ in prompts]
        if spec.sampling is not None:
            assert self.engine is not None
            for completion in self.engine.generate(prompts, spec.sampling, keys=chunk.positions):
                answers[completion.prompt_index].append(fresh_answer(completion))
        return answers

    def _score(
        self, drawn: Sequence[Drawn], prompts: Sequence[str], candidates: Sequence[Sequence[Answer]]
    ) -> tuple[list[list[float] | None], list[dict[str, Any]]]:
        """Every prompt's scores, None where the scorer failed on it; such prompts are told, not fatal."""
        replies = [[self._text(answer) for answer in answers] for answers in candidates]
        quarantined = []
        scores: list[list[float] | None] = []
        for group, prompt, own in zip(drawn, prompts, replies, strict=True):
            try:
                scores.append(self.scorer.score([prompt] * len(own), own))
            except Exception as error:  # the user's function may raise anything
                scores.append(None)
                source, _, line = group.name.rpartition(":")
                reason = f"the scorer failed on its candidates: {type(error).__name__}: {error}"
                quarantined.append({"file": source, "line": int(line), "reason": reason, "prompt": prompt[:200]})
        return scores, quarantined

    def _text(self, answer: Answer) -> str:
        return reply_text(self.tokenizer, answer.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A candidate with what is known of the policy that wrote it."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    finished: bool
    behavior: tuple[float, ...]
    """Per predicted token, nats; NaN for a stored candidate whose writer is not known."""
    behavior_total: float
    """Of the whole candidate, where only that is known."""


def fresh_answer(completion: Completion) -> Answer:
    return Answer(
        ids=completion.token_ids,
        mask=(True,) * len(completion.token_ids),
        finished=completion.finish_reason == "stop",
        behavior=completion.behavior_token_logp,
        behavior_total=float(np.sum(completion.behavior_token_logp, dtype=np.float64)),
    )


def stored_candidates(drawn: Drawn) -> tuple[Answer, ...]:
    group = drawn.read()
    totals = group.per_candidate.get("behavior_logp", np.full(len(group.candidates), np.nan, np.float32))
    return tuple(
        Answer(
            ids=tuple(candidate.ids.tolist()),
            mask=tuple(candidate.mask.tolist()),
            finished=candidate.finished,
            behavior=(np.nan,) * candidate.num_predicted,
            behavior_total=float(total),
        )
        for candidate, total in zip(group.candidates, totals, strict=True)
    )


def make_group(drawn: Drawn, answers: Sequence[Answer], scores: Sequence[float] | None, found: Labelled) -> Group:
    """The kept candidates in order, with their rewards, labels and behavior log-probabilities."""
    kept = [answers[k] for k in found.kept]
    rewards = [scores[k] if scores is not None else np.nan for k in found.kept]
    name, _, line = drawn.name.rpartition(":")
    return Group(
        prompt_ids=drawn.read().prompt_ids,
        candidates=tuple(
            Candidate(ids=np.array(answer.ids, np.int32), mask=np.array(answer.mask), finished=answer.finished)
            for answer in kept
        ),
        per_candidate={
            "reward": column(rewards),
            "label": column([found.label] * len(kept)),
            "behavior_logp": column([answer.behavior_total for answer in kept]),
        },
        per_token={"behavior_token_logp": column([value for answer in kept for value in answer.behavior])},
        source=name,
        line=int(line),
    )


def column(values: Sequence[float]) -> Column:
    return np.array(values, np.float32)


def reply_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """A completion as scorers and readers see it."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


def refuse_other_weights(weights: Weights) -> None:
    manifest = read_manifest(weights.directory)
    if manifest is None or manifest["digest"] != weights.digest:
        raise UserError(f"{weights.directory} does not hold the weights of step {weights.step} that were asked for")


def refuse_broken_weights(policy: FrozenModel, weights: Weights) -> None:
    """Raise UserError unless the loaded policy scores the canary as the trainer does."""
    model = policy.policy.model
    (found,) = policy.token_logps([canary_group(model.get_output_embeddings().weight.shape[0])])
    error = canary_error(weights.canary, tuple(found.tolist()))
    if not error <= TOLERANCE[policy.dtype]:
        raise UserError(
            f"the weights of step {weights.step} score a fixed sequence {error:.2g} nats per token away from the "
            f"trainer (limit {TOLERANCE[policy.dtype]:g}): they were damaged on the way"
        )
