"""The data policy of a run → where its groups come from: drawn round by round, drawn once, or scored again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import transformers

from rayalign.config.candidates import Drawing, Labelling
from rayalign.config.data import DataSource
from rayalign.config.policy import RolloutConfig
from rayalign.config.run import RunConfig
from rayalign.data.budget import Completed
from rayalign.data.store import TokenStore
from rayalign.data.stream import Stream
from rayalign.data.tokenize_rows import Shape
from rayalign.errors import UserError
from rayalign.imports import source_digest
from rayalign.placement import even_share
from rayalign.remarks import Remarks
from rayalign.rollout.base import SamplingParams
from rayalign.rounds.chunk import ChunkMaker, ChunkSpec
from rayalign.rounds.columns import RoundPreparation
from rayalign.rounds.drawing import commit_drawn, draw_chunks
from rayalign.rounds.ledger import WHAT_DISTINGUISHES, Ledger, nothing_learned
from rayalign.rounds.plan import RoundPlan
from rayalign.rounds.streams import StoredStream
from rayalign.run.identity import label_identity, scorer_identity, spec_digest
from rayalign.run.model import model_spec, scoring_spec, stop_ids
from rayalign.run.readers import refuse_unanswerable
from rayalign.run.resolve import actor_share, resolve_run
from rayalign.run.stages import Stages
from rayalign.runtime.pool import Pool
from rayalign.storage.artifacts import digest_of
from rayalign.storage.manifest import committed
from rayalign.storage.place import Place


def prompt_store(source: DataSource, run: RunConfig, stages: Stages, *, draws: bool) -> Place:
    """Every row of a source as a prompt: with whatever completions it has, unless fresh ones take their place."""
    completed: Completed = "no" if not draws else "beside" if run.data_policy.keeps_stored else "alone"
    return stages.tokens(source, run, "prompt", completed=completed)


def prompt_stream(drawing: Drawing, run: RunConfig, stages: Stages) -> StoredStream:
    """The prompts that completions are drawn for, as many of a step as ``optim.groups_per_step``."""
    sources = drawing.prompts(run.data.train)
    stores = [prompt_store(source, run, stages, draws=True) for source in sources]
    weights = [source.weight for source in sources]
    return prompts_of(stores, weights=weights, groups_per_step=run.optim.groups_per_step, window=run.data.window)


def prompts_of(
    stores: list[Place], *, weights: list[float], groups_per_step: int, window: int | None = None
) -> StoredStream:
    return StoredStream(
        name="prompts",
        stores=tuple(stores),
        columns=((),) * len(stores),
        weights=tuple(weights),
        groups_per_step=groups_per_step,
        num_candidates=max(TokenStore.open(store).index.most_candidates for store in stores),
        window=window,
    )


def drawn_spec(
    drawing: Drawing,
    run: RunConfig,
    prompts: StoredStream,
    shape: Shape,
    stages: Stages,
    *,
    needs_reference: bool,
    keep_unscored: bool = False,
) -> ChunkSpec:
    """How groups are made of what the policy answers to prompts."""
    for store in prompts.stores:
        if not stages.artifacts.pending(store):
            refuse_unanswerable(store, run, drawing.rollout)
    stored = stored_spec(drawing.labelling, run, prompts, shape, stages, keep_unscored=keep_unscored)
    return replace(
        stored,
        engine=drawing.rollout.engine,
        options=resolve_run(run, stages.session).engine,
        sampling=sampling(drawing.rollout, run),
        keep_stored=drawing.policy.keeps_stored,
        needs_reference=needs_reference,
    )


def stored_spec(
    labelling: Labelling,
    run: RunConfig,
    prompts: StoredStream,
    shape: Shape,
    stages: Stages,
    *,
    keep_unscored: bool = False,
) -> ChunkSpec:
    """How groups are made of the completions that prompts are stored with."""
    return ChunkSpec(
        prompts=prompts,
        seed=run.seed,
        policy=model_spec(run),
        reference=scoring_spec(run, stages.session),
        engine="none",
        sampling=None,
        keep_stored=True,
        keep_unscored=keep_unscored,
        labelling=labelling,
        shape=shape,
        needs_reference=False,
    )


def sampling(rollout: RolloutConfig, run: RunConfig) -> SamplingParams:
    """How the policy is sampled, with the run's seed and the tokens that end its answers."""
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_new_tokens=rollout.max_new_tokens,
        num_samples=rollout.samples,
        seed=run.seed,
        stop_ids=stop_ids(run),
    )


def drawn_once(
    drawing: Drawing,
    run: RunConfig,
    prompts: StoredStream,
    shape: Shape,
    stages: Stages,
    *,
    keep_unscored: bool = False,
) -> Place:
    """One epoch of the prompts, completed by the policy before the first step: ``refresh_every: never``."""
    spec = drawn_spec(drawing, run, prompts, shape, stages, needs_reference=False, keep_unscored=keep_unscored)
    return rollout_stage(spec, run, stages)


def relabelled(
    labelling: Labelling, run: RunConfig, store: Place, shape: Shape, stages: Stages, *, keep_unscored: bool = False
) -> Place:
    """Stored completions, scored and labelled like fresh ones: ``label.relabel``."""
    prompts = prompts_of([store], weights=[1.0], groups_per_step=1, window=run.data.window)
    index = TokenStore.open(store).index
    counts = index.arrays["num_candidates"]
    if not counts.all():
        raise UserError(f"label.relabel: {index.name(int(counts.argmin()))} has no completion to label")
    spec = stored_spec(labelling, run, prompts, shape, stages, keep_unscored=keep_unscored)
    return rollout_stage(spec, run, stages)


def rollout_stage(spec: ChunkSpec, run: RunConfig, stages: Stages) -> Place:
    """The committed store of all groups that ``spec`` makes of one epoch of its prompts."""
    session = stages.session
    inputs: dict[str, Any] = {
        "prompts": [[stages.digest(store) for store in spec.prompts.stores], spec.prompts.weights, spec.seed],
        "model": spec_digest(spec.policy) if spec.sampling else None,
        "computation": [run.model.dtype, session.device, transformers.__version__] if spec.sampling else None,
        "engine": spec.engine,
        "sampling": asdict(spec.sampling) if spec.sampling else None,
        "keep_stored": spec.keep_stored,
        "keep_unscored": spec.keep_unscored,
        "scorer": scorer_identity(spec.labelling.scorer),
        "label": label_identity(spec.labelling.label),
        "shape": spec.shape,
    }

    def build(directory: Place) -> None:
        devices = max(1, int(session.num_gpus or session.num_cpus) // spec.options.tensor_parallel)
        least, most = run.rollout.actor_range(devices) if run.rollout is not None else (devices, devices)
        each = actor_share(even_share(session, max(1, least)), spec.options)
        python = run.rollout.python if run.rollout is not None else None
        with Pool("rollouts", ChunkMaker, share=each, most=most, least=least, python=python) as pool:
            reports = draw_chunks(
                spec,
                range(groups_per_epoch(spec)),
                directory,
                weights=None,
                pool=pool,
                max_bad_fraction=run.data.max_bad_fraction,
                told=Remarks(),
                done=lambda text: stages.artifacts.note(f"rollouts: {text}"),
            )
        commit_drawn(directory, reports, max_bad_fraction=run.data.max_bad_fraction, inputs=inputs)

    return stages.artifacts.stage("rollouts", inputs, build)


def refuse_unlabelled(stores: Sequence[Place], labelling: Labelling, shape: Shape, *, alone: bool) -> None:
    """Raise UserError where stores that were labelled once and for all have nothing that teaches."""
    ledgers = [Ledger(**committed(store)["meta"]["ledger"]) for store in stores]
    if not any(ledger.teaches(alone=alone) for ledger in ledgers):
        rule = labelling.label.name
        why = nothing_learned(ledgers, scorer=labelling.scorer.label, rule=rule, shape=shape)
        raise UserError(f"{why}: the run would learn nothing. Give it {WHAT_DISTINGUISHES}")


def groups_per_epoch(spec: ChunkSpec) -> int:
    """Groups of one epoch of the prompts, whose stores are made."""
    order = Stream(
        name=spec.prompts.name,
        sizes=tuple(len(TokenStore.open(store)) for store in spec.prompts.stores),
        weights=spec.prompts.weights,
        groups_per_step=1,
        seed=spec.seed,
    )
    return order.groups_per_epoch


def round_plan(drawing: Drawing, run: RunConfig, *, refresh_every: int, steps: int) -> RoundPlan:
    """Which rounds a run of ``steps`` draws, one for every ``refresh_every`` of them."""
    return RoundPlan(
        steps=steps,
        refresh_every=refresh_every,
        lag=drawing.policy.lag,
        groups_per_step=run.optim.groups_per_step,
        fresh_fraction=drawing.policy.fresh_fraction,
        passes=drawing.policy.passes,
    )


def kept_candidates(shape: Shape, spec: ChunkSpec) -> int:
    """K of the groups that a chunk makes, at most."""
    if shape in ("group", "ranking"):
        drawn = spec.sampling.num_samples if spec.sampling else 0
        return drawn + (spec.prompts.num_candidates if spec.keep_stored else 0)
    return 1 if shape == "one" else 2


def preparation(run: RunConfig) -> RoundPreparation | None:
    """What the method makes of every round; None where it makes nothing."""
    method = run.trained_method
    if method.round_prepare is None:
        return None
    source = source_digest(run.method.name) if ":" in run.method.name else None
    key = digest_of([method.name, run.method.config.model_dump(mode="json"), source])[:12]
    return RoundPreparation(method=method, config=run.method.config, key=key)
