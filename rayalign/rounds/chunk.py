"""A few prompts → finished groups: complete, score, label, look up the reference, write one shard. No Ray here.

The unit of work of a rollout pool. What a chunk holds depends on its positions, on the weights it names and on seeds
alone. So a chunk that died with its process is made again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch

from rayalign.config.candidates import Labelling
from rayalign.data.group import Group
from rayalign.data.replies import reply_text
from rayalign.data.schema import Turns
from rayalign.data.shard import ShardInfo, write_shard
from rayalign.data.shared_prompt import prompt_text
from rayalign.data.texts import Prompts
from rayalign.data.tokenize_rows import Shape
from rayalign.data.unpair import Mismatched
from rayalign.engine.batches import Weights
from rayalign.engine.canary import TOLERANCE, canary_error
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.pretrained import ModelSpec, compute_dtype, model_tokenizer
from rayalign.errors import UserError
from rayalign.judge import scorer_of
from rayalign.judge.base import NoVerdict, Scorer, ScorerUnusable
from rayalign.remarks import remarks_of
from rayalign.rollout.base import SamplingParams
from rayalign.rollout.engines import ALONE, EngineOptions, Sampler, make_sampler
from rayalign.rounds.answers import Answer, fresh_answer, make_group, stored_candidates
from rayalign.rounds.label import Labelled, label, label_key, own_rule
from rayalign.rounds.stored import Drawn, StoredGroups
from rayalign.rounds.streams import StoredStream
from rayalign.rounds.weights import WeightChannel
from rayalign.storage.cache import working
from rayalign.storage.manifest import read_manifest
from rayalign.storage.place import Place

REST: Literal["rest"] = "rest"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpec:
    """How groups are made, the same for all chunks of a run; plain values, so that it travels between processes."""

    prompts: StoredStream
    seed: int
    policy: ModelSpec
    """Before the first step; later weights are of the same kind."""
    reference: ScoringSpec
    """Also says how the policy is laid out."""
    engine: str
    options: EngineOptions = ALONE
    sampling: SamplingParams | None
    """None draws nothing: stored candidates are scored and labelled again."""
    keep_stored: bool
    """Stored candidates of a prompt stand before the fresh ones."""
    keep_unscored: bool = False
    """Candidates that the scorer failed on are kept, without rewards, as no loss could use them."""
    labelling: Labelling
    shape: Shape
    needs_reference: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChunk:
    """Prompts at consecutive positions, the weights that complete them, and where the shard belongs."""

    name: str
    positions: range
    directory: Place
    weights: Weights | None
    """None: the reference itself."""
    most_bad: int | None = None
    """Prompts that may stay without scores: after one more the rest is not tried. None: all of them."""
    fatal: tuple[int, ...] = ()
    """Positions whose prompts killed every process that touched them: they are recorded as bad, and not drawn."""

    @property
    def in_words(self) -> str:
        """What it is called in messages."""
        return f"the prompts at positions {self.positions.start} to {self.positions.stop - 1}"


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
    distinguishing: int
    """Those of them whose candidates got a preference or different rewards; a lone candidate's reward counts."""
    rewards: tuple[float, float] | None
    """The lowest and the highest of all; None where the scorer gave none."""
    reward_sum: float
    """Over fresh completions; over stored ones where nothing is drawn."""
    seconds_generating: float
    seconds_starting: float
    """Until an engine had its first weights."""
    refreshes: int
    """Times that an engine's weights were replaced."""
    seconds_refreshing: float
    quarantined: tuple[dict[str, Any], ...]
    remarks: tuple[str, ...] = ()
    """What the scorer and the label rule have to tell, and have not told before."""


class ChunkMaker:
    """One process of a rollout pool: keeps the models that its chunks need, and nothing else."""

    def __init__(self, channel: WeightChannel | None = None) -> None:
        self.channel = channel
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.spec: ChunkSpec | None = None
        self.sampler: Sampler | None = None
        self.loaded: str | None = None

    def __call__(self, job: tuple[ChunkSpec, PromptChunk] | Literal["rest"]) -> ChunkReport | None:
        """Write the chunk's shard; or, at :data:`REST`, leave the device's memory to others until the next chunk.

        Raises:
            UserError: the weights are not those that the chunk names, or the scorer cannot be made.
        """
        if job == REST:
            if self.sampler is not None:
                self.sampler.rest()
            return None
        return self._make(*job)

    def _make(self, spec: ChunkSpec, chunk: PromptChunk) -> ChunkReport:
        self._prepare(spec)
        began = time.monotonic()
        refreshed = self._load(spec, chunk.weights)
        loaded = time.monotonic()
        drawn = self.prompts.at(chunk.positions)
        prompts = [self.texts[id(group.store)][group.row] for group in drawn]
        healthy = [at not in chunk.fatal for at in chunk.positions]
        fresh = self._complete(spec, chunk, drawn)
        generated = time.monotonic()
        stored: list[tuple[Answer, ...]] = [()] * len(drawn)
        for place, (group, lives) in enumerate(zip(drawn, healthy, strict=True)):
            if spec.keep_stored and lives:
                stored[place] = stored_candidates(group)
        candidates = [(*old, *new) for old, new in zip(stored, fresh, strict=True)]
        quarantined = [
            bad_prompt(group, prompt, "every process that worked on it died")
            for group, prompt, lives in zip(drawn, prompts, healthy, strict=True)
            if not lives
        ]
        scores = self._score(chunk, drawn, prompts, candidates, quarantined)
        groups, labelled = self._groups(spec, chunk, drawn, candidates, scores)
        said = [
            self.texts[id(group.store)].again(group.row, group.read(), own)
            for group, own in zip(drawn, groups, strict=True)
        ]
        rewarded = [own for own in scores if own]
        # Fresh candidates stand last; where nothing is drawn, the stored ones are looked at.
        counted: list[Sequence[float]] = []
        for own, old, new in zip(scores, stored, fresh, strict=True):
            counted.append(own[len(old) :] if new else own)
        answers = list(chain.from_iterable(fresh))
        with working(chunk.directory) as folder:
            shard = write_shard(folder, chunk.name, groups, prompts=said)
        return ChunkReport(
            shard=shard,
            prompts=len(drawn),
            completions=len(answers),
            tokens_generated=sum(len(answer.ids) for answer in answers),
            finished=sum(answer.finished for answer in answers),
            scorer_calls=sum(map(len, candidates)),
            labels=sum(found.preferred for found in labelled),
            distinguishing=sum(
                found.preferred and tells_apart(own, spec.shape) for found, own in zip(labelled, scores, strict=True)
            ),
            rewards=(min(map(min, rewarded)), max(map(max, rewarded))) if rewarded else None,
            reward_sum=float(sum(map(sum, counted))),
            seconds_generating=generated - loaded,
            seconds_starting=0.0 if refreshed else loaded - began,
            refreshes=int(refreshed),
            seconds_refreshing=loaded - began if refreshed else 0.0,
            quarantined=tuple(quarantined),
            remarks=tuple(chain.from_iterable(remarks_of(said) for said in (self.scorer, self.rule))),
        )

    def _groups(
        self,
        spec: ChunkSpec,
        chunk: PromptChunk,
        drawn: Sequence[Drawn],
        candidates: Sequence[Sequence[Answer]],
        scores: Sequence[Sequence[float]],
    ) -> tuple[list[Group], list[Labelled]]:
        """The groups as the method takes them, and the label of each."""
        labelled: list[Labelled] = []
        for own, answers, at in zip(scores, candidates, chunk.positions, strict=True):
            if not own:
                kept = range(len(answers) if spec.keep_unscored else 0)
                labelled.append(Labelled(kept=tuple(kept), preferred=False))
                continue
            lengths = [len(answer.ids) for answer in answers]
            key = label_key(spec.seed, at)
            labelled.append(label(own, lengths, spec.labelling.label, shape=spec.shape, key=key, own=self.rule))
        made = [make_group(*parts) for parts in zip(drawn, candidates, scores, labelled, strict=True)]
        if spec.shape == "labelled":
            places = [place for place, group in enumerate(made) if group.candidates]
            examples = Mismatched([made[place] for place in places])
            for number, place in enumerate(places):
                made[place] = examples[number]
        if spec.needs_reference:
            columns = self.reference.token_logps(made)
            made = [
                replace(group, per_token={**group.per_token, "ref_token_logp": column})
                for group, column in zip(made, columns, strict=True)
            ]
        return made, labelled

    def _prepare(self, spec: ChunkSpec) -> None:
        """Open what stays the same from chunk to chunk."""
        if spec == self.spec:
            return
        if self.spec is None or engine_key(spec) != engine_key(self.spec):
            self.sampler, self.loaded = None, None
        self.tokenizer = model_tokenizer(spec.policy)
        self.prompts = StoredGroups(spec.prompts, spec.seed)
        self.texts = {id(store): Prompts(store) for store in self.prompts.stores}
        self.scorer: Scorer = scorer_of(spec.labelling.scorer)
        self.rule = own_rule(spec.labelling.label)
        if spec.needs_reference:
            self.reference = FrozenModel(spec.reference, self.device)
        self.spec = spec

    def _load(self, spec: ChunkSpec, weights: Weights | None) -> bool:
        """Make the engine sample from exactly the weights asked for; whether it had others before."""
        wanted = weights.digest if weights else "initial"
        if spec.sampling is None or self.loaded == wanted:
            return False
        refreshed = self.sampler is not None
        sampler = self.sampler or make_sampler(spec.engine, spec.reference, self.device, spec.options)
        # Whatever fails below, nothing is drawn by an engine that damaged weights have been in.
        self.sampler, self.loaded = None, None
        state = self.channel.fetch(weights) if weights and self.channel else None
        sampler.load(policy_spec(spec, weights) if state is None else spec.policy, state)
        if weights is not None:
            refuse_broken_weights(sampler, weights, compute_dtype(spec.policy, self.device))
        self.sampler, self.loaded = sampler, wanted
        return refreshed

    def _complete(self, spec: ChunkSpec, chunk: PromptChunk, drawn: Sequence[Drawn]) -> list[list[Answer]]:
        """Fresh candidates of every prompt."""
        answers: list[list[Answer]] = [[] for _ in drawn]
        if spec.sampling is not None:
            assert self.sampler is not None
            asked = [n for n, position in enumerate(chunk.positions) if position not in chunk.fatal]
            prompts = [drawn[n].read().prompt_ids.tolist() for n in asked]
            keys = [chunk.positions[n] for n in asked]
            for completion in self.sampler.generate(prompts, spec.sampling, keys=keys):
                answers[asked[completion.prompt_index]].append(fresh_answer(completion))
        return answers

    def _score(
        self,
        chunk: PromptChunk,
        drawn: Sequence[Drawn],
        prompts: Sequence[str | Turns],
        candidates: Sequence[Sequence[Answer]],
        quarantined: list[dict[str, Any]],
    ) -> list[list[float]]:
        """Every prompt's scores, none where the scorer failed on it; such prompts are quarantined.

        Raises:
            UserError: they are more than the chunk allows.
        """
        scores: list[list[float]] = []
        for group, prompt, answers in zip(drawn, prompts, candidates, strict=True):
            own = self._replies(group, answers)
            try:
                scores.append(self.scorer.score([prompt] * len(own), own) if own else [])
                continue
            except ScorerUnusable:
                raise
            except NoVerdict as problem:
                reason = str(problem)
            except Exception as error:
                reason = f"the scorer failed on its candidates: {type(error).__name__}: {error}"
            scores.append([])
            quarantined.append(bad_prompt(group, prompt, reason))
            if chunk.most_bad is not None and len(quarantined) > chunk.most_bad:
                raise UserError(
                    f"{len(quarantined)} of {len(scores)} prompts have no scored completions, more than "
                    f"data.max_bad_fraction allows; first {prompt_failure(quarantined[0])}"
                )
        return scores

    def _replies(self, group: Drawn, answers: Sequence[Answer]) -> list[str]:
        prompt_ids = group.read().prompt_ids.tolist() if answers else []
        return [
            reply_text(self.tokenizer, answer.ids, finished=answer.finished, prompt_ids=prompt_ids)
            for answer in answers
        ]


def tells_apart(scores: Sequence[float], shape: Shape) -> bool:
    """Whether a label among candidates of these scores says more than that they are there."""
    return shape not in ("group", "one") or len(scores) == 1 or min(scores) < max(scores)


def engine_key(spec: ChunkSpec) -> tuple[object, ...]:
    """What specs must have in common to be sampled by one engine."""
    return spec.engine, spec.options, spec.policy


def bad_prompt(group: Drawn, prompt: str | Turns, reason: str) -> dict[str, Any]:
    """A line of ``quarantine.jsonl``."""
    source, _, line = group.name.rpartition(":")
    return {"file": source, "line": int(line), "reason": reason, "prompt": prompt_text(prompt)[:200]}


def prompt_failure(bad: Mapping[str, Any]) -> str:
    """Where the prompt of such a line stands, and what became of it."""
    return f"{bad['file']}:{bad['line']}: {bad['reason']}"


def policy_spec(spec: ChunkSpec, weights: Weights | None) -> ModelSpec:
    """The model to draw from; raises UserError where the folder holds other weights than those asked for."""
    if weights is None:
        return spec.policy
    assert weights.directory is not None, "weights that are not sent are in a folder"
    manifest = read_manifest(weights.directory)
    if manifest is None or manifest["digest"] != weights.digest:
        raise UserError(f"{weights.directory} does not hold the weights of step {weights.step} that were asked for")
    return spec.policy.at(weights.directory)


def refuse_broken_weights(sampler: Sampler, weights: Weights, dtype: torch.dtype) -> None:
    """Raise UserError unless the engine scores the canary as the trainer does: it says why, as far as it is known."""
    error = canary_error(weights.canary, sampler.canary())
    if error <= TOLERANCE[dtype]:
        return
    found = sampler.digest()
    if found is None:
        why = (
            "either they were damaged on the way, or vLLM computes this family otherwise than transformers (attention, "
            "RoPE or dtype); rollout.engine: hf samples with the trainer's own forward"
        )
    elif found == weights.digest:
        why = (
            "they arrived as they were sent, so that this process computes otherwise than the trainer: look at its "
            "device, and at the versions of torch and transformers there"
        )
    else:
        why = "they were damaged on the way"
    raise UserError(
        f"the weights of step {weights.step} score a fixed sequence {error:.2g} nats per token away from the trainer "
        f"(limit {TOLERANCE[dtype]:g}): {why}"
    )
