"""A run's configuration → the job that its workers receive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rayalign import __version__
from rayalign.config.data import DataSource
from rayalign.config.dump import dump
from rayalign.config.run import RunConfig
from rayalign.data.chat import make_chat
from rayalign.data.prepare import Shape
from rayalign.data.store import TokenStore
from rayalign.data.stream import Stream
from rayalign.engine.loop import TrainSpec
from rayalign.engine.model import load_tokenizer, model_directory
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.optimizer import OptimizerSpec
from rayalign.errors import UserError
from rayalign.imports import source_digest
from rayalign.methods import resolve
from rayalign.methods._base import Method
from rayalign.methods.composition import compose
from rayalign.pipeline.artifacts import digest_of
from rayalign.pipeline.model import model_spec, reference_spec, row_tokens, spec_digest
from rayalign.pipeline.stages import Stages
from rayalign.runtime.placement import share
from rayalign.runtime.session import Session
from rayalign.runtime.worker import TrainJob
from rayalign.sources.streams import SourceSpec, StoredStream

COLUMN_FIELDS = {
    "reward": "`rewards`, one number per completion",
    "label": "`label`",
    "behavior_logp": "`behavior_logps`, the log-probabilities of whole completions under the policy that drew them "
    "(one that is cut at data.max_tokens has none); without them write method.behavior: assume_reference if the "
    "reference drew them (the report repeats it)",
}
"""Column → the field of rows that it comes from, for messages."""

NOT_TRAINING = ("name", "storage_path", "track", "checkpoint", "evaluate", "resources", "strategy")
"""Blocks that do not change which model a run ends in; a run may go on after they are changed."""


def make_job(run: RunConfig, directory: Path, stages: Stages, *, processes: int, label: str) -> TrainJob:
    """Everything the workers need, after the stages before training have been committed."""
    session = stages.session
    workers = num_workers(run, session)
    each = share(session, processes, workers=workers)
    method = method_of(run)
    streams = [main_stream(run, method, stages), *auxiliary_streams(run, stages)]
    steps = num_steps(run, streams[0])
    source = SourceSpec(
        streams=tuple(streams),
        seed=run.seed,
        tokens_per_micro_batch=run.optim.tokens_per_micro_batch,
        row_tokens=row_tokens(session),
    )
    spec = TrainSpec(
        directory=directory,
        model=model_spec(run),
        objectives=objectives(run, method),
        optimizer=optimizer_spec(run, steps),
        seed=run.seed,
        identity=run_identity(run, streams),
        checkpoint_every=run.checkpoint.every,
        checkpoint_keep=run.checkpoint.keep,
        checkpoint_at=evaluation_steps(run, steps) if run.evaluate else (),
        evaluate_at=evaluation_steps(run, steps) if run.data.eval else (),
        stop_ids=stop_ids(run),
        track=run.track,
        check_initial_logratio=needs_reference(method, run) and run.model.reference is None,
    )
    return TrainJob(
        spec=spec,
        source=source,
        held_out=held_out(run, method, source, stages) if run.data.eval else None,
        strategy=run.strategy.name,
        workers=workers,
        share=each,
        run=label,
    )


def run_identity(run: RunConfig, streams: Sequence[StoredStream]) -> dict[str, Any]:
    """What decides which model the run ends in: another identity does not continue its checkpoints."""
    identity = {
        "configuration": training_configuration(run),
        "data": digest_of([[TokenStore.open(store).digest for store in stream.stores] for stream in streams]),
        "model": spec_digest(model_spec(run)),
        "package": __version__,
    }
    if run.model.reference is not None:
        identity["reference"] = spec_digest(reference_spec(run))
    if ":" in run.method.name:
        identity["method_source"] = source_digest(run.method.name)
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


def shape_of(method: Method) -> Shape:
    """What the method learns from."""
    if method.candidates == "one":
        return "labelled" if "label" in method.needs else "one"
    return method.candidates


def needs_reference(method: Method, run: RunConfig) -> bool:
    return bool(method.needed(run.method.config) & {"ref_logp", "ref_token_logp"})


def main_stream(run: RunConfig, method: Method, stages: Stages) -> StoredStream:
    """The stores of ``data.train``, with reference log-probs where the method needs them."""
    return stored_stream(run, run.data.train, method, stages, groups_per_step=run.optim.groups_per_step)


def stored_stream(
    run: RunConfig, sources: Sequence[DataSource], method: Method, stages: Stages, *, groups_per_step: int
) -> StoredStream:
    stores = [stages.tokens(source, run, shape_of(method)) for source in sources]
    if "mismatched" in method.needs:
        stores = [stages.mismatched(store) for store in stores]
    for source, store in zip(sources, stores, strict=True):
        require_columns(run, method, source.label, TokenStore.open(store))
    columns: list[tuple[Path, ...]] = [()] * len(stores)
    if needs_reference(method, run):
        columns = [(stages.reference(store, run),) for store in stores]
    return StoredStream(
        name=MAIN_STREAM,
        stores=tuple(stores),
        columns=tuple(columns),
        weights=tuple(source.weight for source in sources),
        groups_per_step=groups_per_step,
        num_candidates=max(int(TokenStore.open(store).index.num_candidates.max()) for store in stores),
    )


def require_columns(run: RunConfig, method: Method, source: str, store: TokenStore) -> None:
    """Raises UserError where rows lack a number that the method cannot do without; a NaN loss would say it later."""
    needed = COLUMN_FIELDS.keys() & method.needed(run.method.config)
    if getattr(run.method.config, "behavior", "") == "assume_reference":
        needed -= {"behavior_logp"}
    for name in sorted(needed):
        lacking = range(len(store)) if name not in store.column_names else groups_without(name, store)
        if lacking:
            raise UserError(
                f"{source}: {method.name} needs {COLUMN_FIELDS[name]}. {len(lacking)} of {len(store)} rows lack it, "
                f"first {store.index.name(lacking[0])}"
            )


def groups_without(name: str, store: TokenStore) -> list[int]:
    """Groups in which a candidate lacks the column ``name``; a mismatched completion has no label and needs none."""
    told = slice(0, 1) if name == "label" else slice(None)
    return [group for group in range(len(store)) if np.isnan(store[group].per_candidate[name][told]).any()]


def auxiliary_streams(run: RunConfig, stages: Stages) -> list[StoredStream]:
    """One stream of single completions per entry of ``auxiliary``."""
    return [
        StoredStream(
            name=auxiliary.name,
            stores=tuple(stages.tokens(with_format(source, auxiliary.term), run, "one") for source in auxiliary.data),
            columns=((),) * len(auxiliary.data),
            weights=tuple(source.weight for source in auxiliary.data),
            groups_per_step=auxiliary.groups_per_step,
            num_candidates=1,
        )
        for auxiliary in run.auxiliary or ()
    ]


def with_format(source: DataSource, term: Literal["reference", "pretrain"]) -> DataSource:
    """The source in the format of its term; ``data.format`` is that of the rows under test."""
    return source.model_copy(update={"format": source.format or ("text" if term == "pretrain" else "auto")})


def held_out(run: RunConfig, method: Method, source: SourceSpec, stages: Stages) -> SourceSpec:
    """``data.eval`` as one step that holds every group once."""
    stream = stored_stream(run, run.data.eval, method, stages, groups_per_step=1)
    total = sum(len(TokenStore.open(store)) for store in stream.stores)
    return SourceSpec(
        streams=(replace(stream, groups_per_step=total),),
        seed=run.seed,
        tokens_per_micro_batch=source.tokens_per_micro_batch,
        row_tokens=source.row_tokens,
    )


def num_steps(run: RunConfig, stream: StoredStream) -> int:
    """``optim.steps``, or as many as ``optim.epochs`` takes."""
    if run.optim.steps is not None:
        return run.optim.steps
    assert run.optim.epochs is not None
    sizes = tuple(len(TokenStore.open(store)) for store in stream.stores)
    order = Stream(
        name=stream.name, sizes=sizes, weights=stream.weights, groups_per_step=stream.groups_per_step, seed=run.seed
    )
    return order.num_steps(run.optim.epochs)


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
        max_grad_norm=optim.max_grad_norm,
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


def stop_ids(run: RunConfig) -> tuple[int, ...]:
    """The token that training appends, rollouts stop at and generation_config names."""
    tokenizer = load_tokenizer(
        model_directory(run.model.name, run.model.revision), trust_remote_code=run.model.trust_remote_code
    )
    return (make_chat(tokenizer, template=run.data.template, stop=run.data.stop).end_id,)


def num_workers(run: RunConfig, session: Session) -> int:
    """``strategy.workers``; auto is one per GPU, and one on CPUs."""
    if run.strategy.name == "single":
        return 1
    if run.strategy.workers == "auto":
        return max(1, int(session.num_gpus))
    return run.strategy.workers if isinstance(run.strategy.workers, int) else run.strategy.workers[1]


def training_configuration(run: RunConfig) -> dict[str, Any]:
    """The part of the configuration that decides which model the run ends in."""
    return {block: value for block, value in dump(run).items() if block not in NOT_TRAINING}
