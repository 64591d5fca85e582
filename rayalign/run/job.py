"""A run's configuration → the job that its workers receive."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from rayalign.config.run import RunConfig
from rayalign.config.training import CriticConfig, OptimConfig
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.state import CriticSpec, TrainSpec
from rayalign.engine.strategy.zero_config import zero_config
from rayalign.errors import UserError
from rayalign.methods import resolve as method_called
from rayalign.placement import Share
from rayalign.rounds.service import RolloutJob
from rayalign.rounds.streams import AnyStream, SourceSpec, stored_parts
from rayalign.run.identity import run_identity
from rayalign.run.model import (
    chat_template,
    critic_model,
    saved_precision,
    scoring_spec,
    stop_ids,
    trained_spec,
)
from rayalign.run.readers import export_facts
from rayalign.run.reference import scoring_environment
from rayalign.run.resolve import resolve_run
from rayalign.run.rollouts import preparation
from rayalign.run.room import refuse_large_groups
from rayalign.run.stages import Stages
from rayalign.run.streams import DrawnRounds, auxiliary_streams, held_out, main_stream
from rayalign.runtime.worker import TrainJob
from rayalign.storage.place import Place


def make_job(run: RunConfig, directory: Place, stages: Stages, *, processes: int, label: str) -> TrainJob:
    """Everything the workers need, after the stages before training have been committed."""
    session, asked_before = stages.session, len(stages.artifacts.asked)
    resolved = resolve_run(run, session)
    shares = resolved.shares(session, processes)
    method = run.trained_method
    main = main_stream(run, stages, directory / "rounds")
    steps = main.steps
    refuse_long_warmup(run.optim, steps)
    refuse_unsaved_best(run, steps)
    streams: list[AnyStream] = [main.stream, *auxiliary_streams(run, stages)]
    source = SourceSpec(
        streams=tuple(streams),
        seed=run.seed,
        tokens_per_micro_batch=run.optim.tokens_per_micro_batch,
        row_tokens=session.row_tokens,
    )
    refuse_large_groups(run, source)
    spec = TrainSpec(
        directory=directory,
        model=trained_spec(run),
        objectives=objectives(run),
        optim=run.optim,
        steps=steps,
        critic=make_critic_spec(run) if method.critic is not None else None,
        seed=run.seed,
        identity=run_identity(run, streams),
        checkpoint=run.checkpoint,
        checkpoint_at=evaluation_steps(run, steps) if run.evaluate and method.trains == "policy" else (),
        evaluate_at=evaluation_steps(run, steps) if run.measures_loss else (),
        stop_ids=stop_ids(run),
        chat_template=chat_template(run),
        saved=saved_precision(run),
        export_adapter=export_facts(run).get("adapter", True) is True,
        track=run.track,
        reference_in_place=run.reference_is_the_policy,
        reference=scoring_spec(run, session) if run.reference_is_beside else None,
        reference_made=reference_made(main.stream),
        check_initial_logratio=(run.needs_reference or run.reference_is_beside) and run.model.reference is None,
    )
    evaluated = held_out(run, source, stages) if run.measures_loss else None
    return TrainJob(
        spec=spec,
        source=source,
        held_out=evaluated,
        strategy=run.strategy,
        zero=zero_file(run),
        workers=resolved.workers,
        share=shares.worker,
        run=label,
        rollouts=rollout_job(main.rounds, run, shares.actor, actors=resolved.actors)
        if main.rounds is not None
        else None,
        stages=tuple(dict.fromkeys(stages.artifacts.asked[asked_before:])),
        fewest=resolved.fewest,
        beside=shares.beside,
    )


def reference_made(stream: AnyStream) -> dict[str, str] | None:
    """With what the reference log-probs of stored groups were computed; None where all groups are drawn in rounds."""
    over = chain.from_iterable(part.columns for part in stored_parts(stream))
    first = next((columns[0] for columns in over if columns), None)
    return scoring_environment(first) if first is not None else None


def rollout_job(rounds: DrawnRounds, run: RunConfig, share: Share, *, actors: tuple[int, int]) -> RolloutJob:
    """How the driver draws the rounds of a run while it trains."""
    least, most = actors
    return RolloutJob(
        spec=rounds.chunks,
        plan=rounds.stream.plan,
        folder=rounds.stream.folder,
        most=most,
        least=least,
        share=share,
        drawing=rounds.drawing,
        max_bad_fraction=run.data.max_bad_fraction,
        alone=run.method.record.learns_alone,
        preparation=preparation(run) if run.method.record.critic is None else None,
    )


def objectives(run: RunConfig) -> tuple[Objective, ...]:
    """The method on the main stream, and a likelihood on each auxiliary one."""
    sft = method_called("sft")
    return (
        Objective(stream=MAIN_STREAM, method=run.trained_method, config=run.method.config),
        *(
            Objective(
                stream=auxiliary.name,
                method=sft,
                config=sft.config.model_validate({"reduction": auxiliary.reduction}),
                weight=auxiliary.weight,
            )
            for auxiliary in run.auxiliary or ()
        ),
    )


def make_critic_spec(run: RunConfig) -> CriticSpec:
    """The second model: another one, or the policy before the first step, with a scalar head and a rate of its own."""
    critic = run.critic or CriticConfig()
    return CriticSpec(model=critic_model(run), optim=run.optim.model_copy(update={"lr": critic.lr}))


def refuse_long_warmup(optim: OptimConfig, steps: int) -> None:
    """Raise UserError where a run of ``steps``, as its data make it, would end before its warm-up."""
    try:
        optim.refuse_long_warmup(steps)
    except ValueError as error:
        raise UserError(f"optim.{error}") from error


def zero_file(run: RunConfig) -> str | None:
    """The text of the user's DeepSpeed file; raises UserError where it cannot be read or contradicts the YAML."""
    path = run.strategy.config
    try:
        text = Path(path).read_text(encoding="utf-8") if path else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"strategy.config: {path} cannot be read: {error}") from error
    if run.strategy.name == "deepspeed":
        zero_config(run.strategy, run.optim, text, bfloat16=False)
    return text


def refuse_unsaved_best(run: RunConfig, steps: int) -> None:
    """Raise UserError where no saved step but the last has the metric of the best checkpoint."""
    best = run.checkpoint.best
    if best is None:
        return
    measured = evaluation_steps(run, steps)
    if best.metric.startswith("eval_") and run.method.record.trains != "policy":
        saved = {*range(run.checkpoint.every, steps + 1, run.checkpoint.every), steps}
        if not saved & {*measured[:-1]}:
            raise UserError(
                f"checkpoint.best.metric: {best.metric} is measured after steps {', '.join(map(str, measured))}, and "
                f"checkpoint.every: {run.checkpoint.every} saves none of them but the last; make one a multiple of the "
                "other"
            )


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
