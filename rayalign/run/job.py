"""A run's configuration → the job that its workers receive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayalign import __version__
from rayalign.config import resume
from rayalign.config.run import RunConfig
from rayalign.config.training import CriticConfig
from rayalign.data.store import TokenStore
from rayalign.engine.checkpoint.checkpoint import DESCRIBED, Best
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.optimizer import OptimizerSpec
from rayalign.engine.state import CriticSpec, TrainSpec
from rayalign.engine.strategy.base import StrategySpec
from rayalign.engine.strategy.zero_config import zero_config
from rayalign.errors import UserError
from rayalign.imports import source_digest
from rayalign.methods import resolve
from rayalign.methods.composition import compose
from rayalign.methods.method import Method
from rayalign.placement import Share, elastic_share, host
from rayalign.rounds.service import RolloutJob
from rayalign.rounds.streams import AnyStream, SourceSpec, round_part, stored_parts
from rayalign.run.model import (
    chat_template,
    critic_model,
    model_spec,
    reference_spec,
    row_tokens,
    saved_precision,
    scorer_content,
    scorer_spec,
    spec_digest,
    stop_ids,
    trained_spec,
)
from rayalign.run.readers import export_facts
from rayalign.run.reference import made_with
from rayalign.run.rollouts import (
    actor_share,
    draws_rounds,
    fewest_workers,
    num_actors,
    num_workers,
    preparation,
    takes_turns,
)
from rayalign.run.room import refuse_large_groups
from rayalign.run.stages import Stages
from rayalign.run.streams import Main, auxiliary_streams, held_out, learns_alone, main_stream, needs_reference
from rayalign.runtime.session import Session
from rayalign.runtime.worker import TrainJob
from rayalign.storage.artifacts import digest_of
from rayalign.storage.copies import Mirror
from rayalign.storage.manifest import file_digest


def make_job(run: RunConfig, directory: Path, stages: Stages, *, processes: int, label: str) -> TrainJob:
    """Everything the workers need, after the stages before training have been committed."""
    session, asked_before = stages.session, len(stages.artifacts.asked)
    workers, fewest = num_workers(run, session), fewest_workers(run)
    own = num_processes(run, session)
    each = elastic_share(session, processes - workers, fewest=fewest or workers, most=workers)
    method = method_of(run)
    main = main_stream(run, method, stages, directory / "rounds")
    steps = main.steps
    streams: list[AnyStream] = [main.stream, *auxiliary_streams(run, stages)]
    source = SourceSpec(
        streams=tuple(streams),
        seed=run.seed,
        tokens_per_micro_batch=run.optim.tokens_per_micro_batch,
        row_tokens=row_tokens(session),
    )
    refuse_large_groups(run, source)
    spec = TrainSpec(
        directory=directory,
        model=trained_spec(run),
        objectives=objectives(run, method),
        optimizer=optimizer_spec(run, steps),
        critic=critic_spec(run, steps) if method.critic is not None else None,
        seed=run.seed,
        identity=run_identity(run, streams),
        checkpoint_every=run.checkpoint.every,
        checkpoint_keep=run.checkpoint.keep,
        checkpoint_at=evaluation_steps(run, steps) if run.evaluate and method.trains == "policy" else (),
        checkpoint_asynchronous=run.checkpoint.asynchronous,
        mirror=mirror_of(run, directory, storage=stages.artifacts.root.parent),
        restart_optimizer=run.checkpoint.restart_optimizer,
        checkpoint_best=checkpoint_best(run, steps),
        evaluate_at=evaluation_steps(run, steps) if measures_loss(run, method) else (),
        stop_ids=stop_ids(run),
        chat_template=chat_template(run),
        saved=saved_precision(run),
        export_adapter=export_facts(run).get("adapter", True) is True,
        track=run.track,
        reference_in_place=run.reference.place == "trainer",
        reference_made=reference_made(main.stream),
        check_initial_logratio=needs_reference(method, run) and run.model.reference is None,
        on_nonfinite=run.optim.on_nonfinite,
        max_skipped_in_a_row=run.optim.max_skipped_in_a_row,
    )
    evaluated = held_out(run, method, source, stages) if measures_loss(run, method) else None
    return TrainJob(
        spec=spec,
        source=source,
        held_out=evaluated,
        strategy=strategy_spec(run),
        timeout_seconds=run.strategy.timeout_seconds,
        workers=workers,
        share=host(each) if takes_turns(run, session) else each,
        run=label,
        rollouts=rollout_job(run, method, main, each) if main.chunks is not None else None,
        stages=tuple(dict.fromkeys(stages.artifacts.asked[asked_before:])),
        fewest=fewest,
        beside=max(0, own - workers) + (1 if processes > own else 0),  # more than its own: somebody evaluates it
    )


def reference_made(stream: AnyStream) -> dict[str, str] | None:
    """With what the reference log-probs of stored groups were computed; None where all groups are drawn in rounds."""
    found = [made_with(columns) for part in stored_parts(stream) for over in part.columns for columns in over[:1]]
    return found[0] if found else None


def mirror_of(run: RunConfig, directory: Path, *, storage: Path) -> Mirror | None:
    """Where the run in ``directory``, below ``storage``, is kept a second time."""
    uri = run.checkpoint.mirror
    return Mirror(uri=uri, folder=directory.relative_to(storage).as_posix()) if uri is not None else None


def measures_loss(run: RunConfig, method: Method) -> bool:
    """Whether ``data.eval`` has a loss; what is prepared of rounds, stored rows do not have."""
    return bool(run.data.eval) and method.round_prepare is None


def rollout_job(run: RunConfig, method: Method, main: Main, each: Share) -> RolloutJob:
    """How the driver draws the rounds of a run while it trains."""
    rounds = round_part(main.stream)
    assert rounds is not None and main.chunks is not None and run.rollout is not None
    assert run.data_policy.name != "off_policy"
    least, most = num_actors(run, 1)
    return RolloutJob(
        spec=main.chunks,
        plan=rounds.plan,
        folder=rounds.folder,
        most=most,
        least=least,
        share=actor_share(each, main.chunks.options),
        takes_turns=main.chunks.options.takes_turns,
        direct_weights=run.rollout.transfer == "nixl",
        python=run.rollout.python,
        max_bad_fraction=run.data.max_bad_fraction,
        max_unlabelled=run.data_policy.max_unlabelled_rounds,
        alone=learns_alone(method),
        preparation=preparation(run, method) if method.critic is None else None,
    )


def num_processes(run: RunConfig, session: Session) -> int:
    """Processes that are busy while a run trains: its workers, and the actors that draw for them.

    Actors with nodes of their own that are none yet leave the nodes that are there to the workers.
    """
    workers = num_workers(run, session)
    if not draws_rounds(run):
        return workers
    assert run.rollout is not None
    least, _ = num_actors(run, 1)
    if least == 0 and run.rollout.placement == "separate":
        return workers
    actors = max(1, least) * run.rollout.tensor_parallel
    return max(workers, actors) if takes_turns(run, session) else workers + actors


def run_identity(run: RunConfig, streams: Sequence[AnyStream]) -> dict[str, Any]:
    """What decides which model the run ends in: another identity does not continue its checkpoints.

    What stands below :data:`~rayalign.engine.checkpoint.checkpoint.DESCRIBED` explains the digests and decides nothing.
    """
    settings = resume.identity(run)
    identity = {
        "configuration": settings.decides,
        DESCRIBED: settings.described,
        "data": digest_of(
            [
                [TokenStore.open(store).digest for part in stored_parts(stream) for store in part.stores]
                for stream in streams
            ]
        ),
        "model": spec_digest(model_spec(run)),
        "package": __version__,
    }
    if run.model.reference is not None:
        identity["reference"] = spec_digest(reference_spec(run))
    if ":" in run.method.name:
        identity["method_source"] = source_digest(run.method.name)
    if run.method.record.critic is not None:
        identity["critic"] = spec_digest(critic_model(run))
    kept = [file for stream in streams for part in stored_parts(stream) for file in part.kept]
    if kept:
        identity["kept"] = digest_of([file_digest(file) for file in kept])
    scorer = scorer_content(scorer_spec(run.scorer)) if run.scorer is not None else None
    if scorer is not None:
        identity["scorer"] = scorer
    if run.label is not None and ":" in run.label.name and draws_rounds(run):  # else "data" has what it made
        identity["label"] = source_digest(run.label.name)
    return identity


def method_of(run: RunConfig) -> Method:
    """The method's record, with WPO's weight on top where the configuration asks for it."""
    record = run.method.record
    return compose(record, run.weighting) if run.weighting is not None else record


def objectives(run: RunConfig, method: Method) -> tuple[Objective, ...]:
    """The method on the main stream, and a likelihood on each auxiliary one."""
    sft = resolve("sft")
    return (
        Objective(stream=MAIN_STREAM, method=method, config=run.method.config),
        *(
            Objective(
                stream=auxiliary.name,
                method=sft,
                config=sft.config(reduction=auxiliary.reduction),  # type: ignore[call-arg]
                weight=auxiliary.weight,
            )
            for auxiliary in run.auxiliary or ()
        ),
    )


def optimizer_spec(run: RunConfig, steps: int) -> OptimizerSpec:
    optim = run.optim
    if optim.warmup_steps(steps) > steps:
        raise UserError(f"optim.warmup of {optim.warmup:g} steps is longer than the run of {steps}")
    return OptimizerSpec(
        lr=optim.lr,
        steps=steps,
        schedule=optim.schedule,
        warmup_steps=optim.warmup_steps(steps),
        min_lr_ratio=optim.min_lr_ratio,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm or 0.0,
    )


def critic_spec(run: RunConfig, steps: int) -> CriticSpec:
    """The second model: another one, or the policy before the first step, with a scalar head and a rate of its own."""
    critic = run.critic or CriticConfig()
    return CriticSpec(model=critic_model(run), optimizer=replace(optimizer_spec(run, steps), lr=critic.lr))


def strategy_spec(run: RunConfig) -> StrategySpec:
    """Raises UserError where a DeepSpeed file cannot be read or contradicts the YAML."""
    strategy = run.strategy
    try:
        config = Path(strategy.config).read_text(encoding="utf-8") if strategy.config else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"strategy.config: {strategy.config} cannot be read: {error}") from error
    spec = StrategySpec(
        name=strategy.name,
        reshard_after_forward=strategy.reshard_after_forward,
        sync_every_micro_batch=strategy.sync_every_micro_batch,
        cpu_offload=strategy.cpu_offload,
        zero_stage=strategy.zero_stage,
        config=config,
    )
    if strategy.name == "deepspeed":
        zero_config(spec, optimizer_spec(run, steps=run.optim.steps or 1), bfloat16=False)
    return spec


def checkpoint_best(run: RunConfig, steps: int) -> Best | None:
    """What tells the best checkpoint; raises UserError where no checkpoint is written at a step that is measured."""
    best = run.checkpoint.best
    if best is None:
        return None
    measured = evaluation_steps(run, steps)
    if best.metric.startswith("eval_") and run.method.record.trains != "policy":
        saved = {*range(run.checkpoint.every, steps + 1, run.checkpoint.every), steps}
        if not saved & {*measured[:-1]}:
            raise UserError(
                f"checkpoint.best.metric: {best.metric} is measured after steps {', '.join(map(str, measured))}, and "
                f"checkpoint.every: {run.checkpoint.every} saves none of them but the last; make one a multiple of the "
                "other"
            )
    return Best(metric=best.metric, mode=best.mode)


def evaluation_steps(run: RunConfig, steps: int) -> tuple[int, ...]:
    """Steps after which the policy is evaluated: ``at``, or every ``every``-th, and the last one."""
    if run.evaluate is None:
        return (steps,) if run.data.eval else ()
    late = [step for step in run.evaluate.at if step > steps]
    if late:
        raise UserError(f"evaluate.at: step {late[0]} is never reached: the run has {steps}")
    if run.evaluate.at:
        return tuple(step for step in run.evaluate.at if step > 0)
    every = run.evaluate.every or steps
    return tuple(sorted({*range(every, steps + 1, every), steps}))
