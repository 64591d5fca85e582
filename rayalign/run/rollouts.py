"""The data policy of a run → where its groups come from: drawn round by round, drawn once, or scored again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import transformers

from rayalign.config.data import DataSource
from rayalign.config.fields import portable
from rayalign.config.policy import HybridConfig, LabelConfig, unread_parameters
from rayalign.config.run import RunConfig
from rayalign.data.budget import Completed
from rayalign.data.store import TokenStore
from rayalign.data.stream import Stream
from rayalign.data.tokenize_rows import Shape
from rayalign.errors import UserError
from rayalign.imports import source_digest
from rayalign.methods.method import Method
from rayalign.placement import Share, guest, share
from rayalign.remarks import Remarks
from rayalign.rollout.base import SamplingParams
from rayalign.rollout.engines import EngineOptions
from rayalign.rounds.chunk import ChunkMaker, ChunkSpec
from rayalign.rounds.columns import Preparation
from rayalign.rounds.drawing import commit_drawn, draw
from rayalign.rounds.label import LabelSpec
from rayalign.rounds.ledger import WHAT_DISTINGUISHES, Ledger, nothing_learned
from rayalign.rounds.plan import RoundPlan
from rayalign.rounds.streams import StoredStream
from rayalign.run.model import model_spec, scorer_identity, scorer_spec, scoring_spec, spec_digest, stop_ids
from rayalign.run.readers import refuse_unanswerable
from rayalign.run.stages import Stages
from rayalign.runtime.pool import Pool
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import digest_of
from rayalign.storage.manifest import committed


def prompt_store(source: DataSource, run: RunConfig, stages: Stages, *, draws: bool) -> Path:
    """Every row of a source as a prompt: with whatever completions it has, unless fresh ones take their place."""
    completed: Completed = "no" if not draws else "beside" if keeps_stored(run) else "alone"
    return stages.tokens(source, run, "prompt", completed=completed)


def prompt_stream(run: RunConfig, stages: Stages, *, groups_per_step: int) -> StoredStream:
    """The prompts that completions are drawn for: ``data_policy.prompts``, or those of ``data.train``."""
    sources = prompt_sources(run)
    stores = [prompt_store(source, run, stages, draws=True) for source in sources]
    return prompts_of(stores, weights=[source.weight for source in sources], groups_per_step=groups_per_step)


def prompt_sources(run: RunConfig) -> tuple[DataSource, ...]:
    assert run.data_policy.name != "off_policy"
    own = run.data_policy.prompts
    return run.data.train if own is None else (own.model_copy(update={"format": own.format or "auto"}),)


def prompts_of(stores: list[Path], *, weights: list[float], groups_per_step: int) -> StoredStream:
    return StoredStream(
        name="prompts",
        stores=tuple(stores),
        columns=((),) * len(stores),
        weights=tuple(weights),
        groups_per_step=groups_per_step,
        num_candidates=max(int(TokenStore.open(store).index.num_candidates.max()) for store in stores),
    )


def chunk_spec(
    run: RunConfig,
    prompts: StoredStream,
    shape: Shape,
    stages: Stages,
    *,
    draws: bool,
    needs_reference: bool,
    keep_unscored: bool = False,
) -> ChunkSpec:
    """How this run's groups are made from prompts; without ``draws`` from stored completions alone."""
    assert run.scorer is not None
    for store in prompts.stores if draws else ():
        if not stages.artifacts.pending(store):
            refuse_unanswerable(store, run)
    return ChunkSpec(
        prompts=prompts,
        seed=run.seed,
        policy=model_spec(run),
        reference=scoring_spec(run, stages.session),
        engine=run.rollout.engine if run.rollout is not None and draws else "none",
        options=engine_options(run, stages.session) if draws else EngineOptions(),
        sampling=sampling(run) if draws else None,
        keep_stored=keeps_stored(run) or not draws,
        keep_unscored=keep_unscored,
        scorer=scorer_spec(run.scorer),
        label=label_spec(run.label or LabelConfig()),
        shape=shape,
        needs_reference=needs_reference,
    )


def sampling(run: RunConfig) -> SamplingParams:
    assert run.rollout is not None
    return SamplingParams(
        temperature=run.rollout.temperature,
        top_p=run.rollout.top_p,
        max_new_tokens=run.rollout.max_new_tokens,
        num_samples=run.rollout.samples,
        seed=run.seed,
        stop_ids=stop_ids(run),
    )


def engine_options(run: RunConfig, session: Session) -> EngineOptions:
    assert run.rollout is not None
    shared = takes_turns(run, session)
    return EngineOptions(
        tensor_parallel=run.rollout.tensor_parallel,
        takes_turns=shared,
        memory_share=run.rollout.gpu_memory_utilization or (0.4 if shared else 0.9),
    )


def takes_turns(run: RunConfig, session: Session) -> bool:
    """Whether rollout actors use the devices of the training workers, which wait while rounds are drawn."""
    if run.rollout is None or not draws_rounds(run):
        return False
    if run.rollout.placement == "auto":
        needed = num_workers(run, session) + num_actors(run, 1)[0] * run.rollout.tensor_parallel
        may_wait = run.data_policy.name != "off_policy" and run.data_policy.lag == 0
        return 0 < session.num_gpus < needed and may_wait and run.rollout.tensor_parallel == 1
    return run.rollout.placement == "shared"


def draws_rounds(run: RunConfig) -> bool:
    """Whether completions are drawn while the run trains."""
    return run.data_policy.name != "off_policy" and run.data_policy.refresh_every != "never"


def num_workers(run: RunConfig, session: Session) -> int:
    """``strategy.workers``, the most of an elastic run; auto is one per GPU, and one on CPUs."""
    if run.strategy.name == "single":
        return 1
    if run.strategy.workers == "auto":
        return max(1, int(session.num_gpus))
    return run.strategy.workers if isinstance(run.strategy.workers, int) else run.strategy.workers[1]


def fewest_workers(run: RunConfig) -> int | None:
    """The smaller of two numbers in ``strategy.workers``; None where there is one."""
    return run.strategy.workers[0] if isinstance(run.strategy.workers, tuple) else None


def actor_share(each: Share, options: EngineOptions) -> Share:
    """What a rollout actor reserves where every process gets ``each``."""
    if options.takes_turns:
        return guest(each)
    return replace(each, gpus=float(options.tensor_parallel)) if options.tensor_parallel > 1 and each.gpus else each


def label_spec(config: LabelConfig) -> LabelSpec:
    return LabelSpec(**config.model_dump(exclude={"relabel"}))


def drawn_once(
    run: RunConfig, prompts: StoredStream, shape: Shape, stages: Stages, *, keep_unscored: bool = False
) -> Path:
    """One epoch of the prompts, completed by the policy before the first step: ``refresh_every: never``."""
    spec = chunk_spec(run, prompts, shape, stages, draws=True, needs_reference=False, keep_unscored=keep_unscored)
    return rollout_stage(spec, run, stages)


def relabelled(store: Path, run: RunConfig, shape: Shape, stages: Stages, *, keep_unscored: bool = False) -> Path:
    """Stored completions, scored and labelled like fresh ones: ``label.relabel``."""
    prompts = prompts_of([store], weights=[1.0], groups_per_step=1)
    lonely = [row for row, count in enumerate(TokenStore.open(store).index.num_candidates) if count < 1]
    if lonely:
        raise UserError(f"label.relabel: {TokenStore.open(store).index.name(lonely[0])} has no completion to label")
    spec = chunk_spec(run, prompts, shape, stages, draws=False, needs_reference=False, keep_unscored=keep_unscored)
    return rollout_stage(spec, run, stages)


def rollout_stage(spec: ChunkSpec, run: RunConfig, stages: Stages) -> Path:
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
        "scorer": scorer_identity(spec.scorer),
        "label": label_identity(spec.label),
        "shape": spec.shape,
    }

    def build(directory: Path) -> None:
        devices = max(1, int(session.num_gpus or session.num_cpus) // spec.options.tensor_parallel)
        least, most = num_actors(run, devices)
        each = actor_share(share(session, max(1, least)), spec.options)
        python = run.rollout.python if run.rollout is not None else None
        with Pool("rollouts", ChunkMaker, share=each, most=most, least=least, python=python) as pool:
            reports = draw(
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


def refuse_unlabelled(stores: Sequence[Path], run: RunConfig, shape: Shape, *, alone: bool) -> None:
    """Raise UserError where stores that were labelled once and for all have nothing that teaches."""
    assert run.scorer is not None
    ledgers = [Ledger(**committed(store)["meta"]["ledger"]) for store in stores]
    if not any(ledger.teaches(alone=alone) for ledger in ledgers):
        rule = (run.label or LabelConfig()).name
        why = nothing_learned(ledgers, scorer=run.scorer.label, rule=rule, shape=shape)
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


def label_identity(spec: LabelSpec) -> Any:
    read = {key: value for key, value in asdict(spec).items() if key not in unread_parameters(spec.name)}
    return [{**read, "name": portable(spec.name)}, source_digest(spec.name) if ":" in spec.name else None]


def num_actors(run: RunConfig, auto: int) -> tuple[int, int]:
    """(least, most) of ``rollout.actors``; stored completions need no engine, but the same processes score them."""
    if run.rollout is None or run.rollout.actors == "auto":
        return auto, auto
    return run.rollout.actors if isinstance(run.rollout.actors, tuple) else (run.rollout.actors, run.rollout.actors)


def round_plan(run: RunConfig, steps: int) -> RoundPlan:
    policy = run.data_policy
    assert policy.name != "off_policy" and isinstance(policy.refresh_every, int)
    return RoundPlan(
        steps=steps,
        refresh_every=policy.refresh_every,
        lag=policy.lag,
        groups_per_step=run.optim.groups_per_step,
        fresh_fraction=fresh_fraction(run),
        passes=num_passes(run),
    )


def num_passes(run: RunConfig) -> int:
    """Times that a round is trained on."""
    return run.data_policy.passes if run.data_policy.name == "on_policy" else 1


def kept_candidates(shape: Shape, spec: ChunkSpec) -> int:
    """K of the groups that a chunk makes, at most."""
    if shape in ("group", "ranking"):
        drawn = spec.sampling.num_samples if spec.sampling else 0
        return drawn + (spec.prompts.num_candidates if spec.keep_stored else 0)
    return 1 if shape == "one" else 2


def fresh_fraction(run: RunConfig) -> float:
    """Of the groups of a step, those that are drawn: all, unless ``mix: groups`` says otherwise."""
    policy = run.data_policy
    return policy.on_fraction if isinstance(policy, HybridConfig) and policy.mix == "groups" else 1.0


def preparation(run: RunConfig, method: Method) -> Preparation | None:
    """What the method makes of every round; None where it makes nothing."""
    if method.round_prepare is None:
        return None
    source = source_digest(run.method.name) if ":" in run.method.name else None
    key = digest_of([method.name, run.method.config.model_dump(mode="json"), source])[:12]
    return Preparation(method=method, config=run.method.config, key=key)


def keeps_stored(run: RunConfig) -> bool:
    """Whether stored candidates of a prompt are scored and labelled together with the fresh ones."""
    policy = run.data_policy
    return isinstance(policy, HybridConfig) and policy.mix == "candidates"
