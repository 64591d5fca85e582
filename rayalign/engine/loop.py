"""The steps of a run: resume, train, evaluate, checkpoint, export. No Ray here: this runs in any process."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rayalign.data.rows import Layout
from rayalign.engine.batches import Batches, Rounds, StreamWork
from rayalign.engine.checkpoint.checkpoint import (
    Checkpoint,
    Checkpointer,
    identity_differences,
    refuse_other_run,
    refuse_unknown_metric,
)
from rayalign.engine.checkpoint.optimizer_state import UnreadableOptimizer
from rayalign.engine.checkpoint.saving import (
    Writer,
    checkpoint_is_due,
    numeric_environment,
    refuse_stopped,
    save_checkpoint,
)
from rayalign.engine.checkpoint.sending import num_bytes, offer_weights, state_to_export
from rayalign.engine.first_step import check_initial_logratio
from rayalign.engine.frozen import ScoringSpec, computed_with
from rayalign.engine.metrics import flush, open_sinks
from rayalign.engine.model.attention import AttentionKind
from rayalign.engine.model.forward import RootModule, root_module
from rayalign.engine.model.lora import ADAPTER
from rayalign.engine.model.parameter_dtype import base_names_in_bfloat16, hold_in_bfloat16
from rayalign.engine.model.parity import choose_attention
from rayalign.engine.model.pretrained import ModelSpec, compute_dtype, save_pretrained
from rayalign.engine.nonfinite import skip_step
from rayalign.engine.objective import MAIN_STREAM
from rayalign.engine.optimizer import learning_rate, set_learning_rate
from rayalign.engine.state import MakeBatches, NoNotices, Notices, Run, TrainSpec, checkpointer_of
from rayalign.engine.step import NonFiniteStep, Runner, StepResult
from rayalign.engine.strategy.base import Strategy
from rayalign.storage.cache import fetched, local_folder, working
from rayalign.storage.disk import room_for
from rayalign.storage.manifest import commit, read_manifest
from rayalign.storage.place import Place
from rayalign.types import PADDING_GROUP

log = logging.getLogger(__name__)


def train_policy(
    spec: TrainSpec,
    make_batches: MakeBatches,
    strategy: Strategy,
    *,
    rounds: Rounds | None = None,
    make_held_out: MakeBatches | None = None,
    on_step: Callable[[Mapping[str, Any]], None] = lambda row: None,
    stop: Callable[[], bool] = lambda: False,
    notices: Notices | None = None,
) -> Place:
    """Train to the last step and return the exported ``final/``; continues from the newest whole checkpoint.

    ``rounds`` are what the batches are read from, where the run draws them from its policy; None for stored data.
    Every worker of the strategy calls this function; ``on_step`` is called on rank 0 with each row of metrics, and
    ``stop`` on every rank between steps. After a step in which ``notices`` say so a checkpoint is written.

    Raises:
        Stopped: ``stop`` said so; the step that was under way is done and saved.
        IncompatibleCheckpoint: the directory holds another run.
        PolicyMismatch: reference log-probs are not the initial policy's, though they should be.
        NonFiniteStep: the loss or its gradient is NaN or infinite, and ``spec`` says to stop, or it happened too often.
        UserError: the disk is full, or no row has the metric of the best checkpoint.
    """
    run, resumed = begin_training(spec, strategy, stop, notices)
    pad_id = int(run.tokenizer.pad_token_id or 0)
    batches = make_batches(run.layout, pad_id)
    if resumed is not None and rounds is not None:
        rounds.restore(resumed.facts["source"])
    held_out = make_held_out(run.layout, pad_id).get(0) if make_held_out else ()
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(Writer(asynchronous=spec.checkpoint.asynchronous, strategy=strategy))
        sinks = open_sinks(spec.directory, spec.track, spec.identity, run.step) if strategy.rank == 0 else []
        for sink in sinks:
            stack.callback(sink.close)
        while run.step < spec.steps and not run.stopping:
            writer.check()
            offer_weights(run, rounds)
            row = train_one_step(run, batches, rounds, held_out=held_out)
            if row is None:
                break
            for sink in sinks:
                sink.write(row)
            if strategy.rank == 0:
                on_step(row)
            if checkpoint_is_due(run):
                flush(sinks)
                save_checkpoint(run, writer, rounds)
        refuse_stopped(run, writer, partial(save_checkpoint, run, writer, rounds))
    export_final(run)
    return spec.directory / "final"


def begin_training(
    spec: TrainSpec, strategy: Strategy, stop: Callable[[], bool], notices: Notices | None = None
) -> tuple[Run, Checkpoint | None]:
    """Load the policy, as the newest whole checkpoint has it where there is one; rank 0 picks it for all."""
    checkpointer = checkpointer_of(spec, attempt=strategy.broadcast(secrets.token_hex(4)))
    found = strategy.broadcast(resume_point(spec, checkpointer) if strategy.rank == 0 else None)
    start = resumed_model(spec.model, found.directory) if found else spec.model
    model, tokenizer = strategy.load(start)
    if spec.chat_template is not None and spec.model.head is None:
        tokenizer.chat_template = spec.chat_template
    attention = attention_of(model, strategy)
    layout = attention.layout
    computes = compute_dtype(spec.model, strategy.device)
    policy = root_module(model, attention)
    if spec.model.config.lora is not None:
        hold_base(policy, strategy, computes)
    module, optimizer = strategy.wrap(policy, spec.optim, compute_dtype=computes)
    reference = None
    if spec.reference is not None:
        reference, readable = begin_reference(spec.reference, strategy, computes)
        layout = common_layout(layout, readable)
    notices = notices or NoNotices()
    run = Run(
        spec=spec,
        strategy=strategy,
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        runner=Runner(
            module=module,
            objectives={objective.stream: objective for objective in spec.objectives},
            strategy=strategy,
            compute_dtype=computes,
            seed=spec.seed,
            reference_in_place=spec.reference_in_place,
            reference=reference,
            stop=stop,
            ask=notices.due,
        ),
        optimizer=optimizer,
        checkpointer=checkpointer,
        stopping=strategy.broadcast(stop()),
        notices=notices,
    )
    if found is not None:
        load_optimizer(run, run.optimizer, found.directory)
        run.step, run.saved, run.num_tokens = found.step, found.step, found.facts["num_tokens"]
        run.skipped_steps, run.skipped_in_a_row = found.facts.get("skipped", (0, 0))
        changed = identity_differences(found.facts["environment"], numeric_environment(strategy))
        rounding = f"; equal up to rounding, since {', '.join(changed)}" if changed else ""
        log.warning("%s continues from %s%s", spec.directory.name, found.directory.name, rounding)
    return run, found


def begin_reference(spec: ScoringSpec, strategy: Strategy, computes: torch.dtype) -> tuple[nn.Module, Layout]:
    """The reference as the workers hold it beside the policy, and the layout that it reads."""
    model = strategy.load_frozen(spec.model)
    attention = attention_of(model, strategy)
    policy = root_module(model, attention)
    return strategy.freeze(policy, spec.parameter_dtype, compute_dtype=computes), attention.layout


def hold_base(policy: RootModule, strategy: Strategy, computes: torch.dtype) -> None:
    """Hold what lies below the adapter in bfloat16 where that changes no bit of any result."""
    if strategy.config.name != "deepspeed":  # which holds one precision
        names = base_names_in_bfloat16(policy, computes) if strategy.rank == 0 else None
        hold_in_bfloat16(policy, strategy.broadcast(names))


def attention_of(model: PreTrainedModel, strategy: Strategy) -> AttentionKind:
    """How ``model`` is proven to read groups; rank 0, which is sure to hold its weights, tries it for all."""
    chosen = choose_attention(model, device=strategy.device) if strategy.rank == 0 else None
    attention: AttentionKind = strategy.broadcast(chosen)
    return attention


def common_layout(one: Layout, other: Layout) -> Layout:
    """The layout that both read: who reads packed rows reads one sequence a row as well."""
    return "packed" if one == other == "packed" else "concatenated"


def load_optimizer(run: Run, optimizer: torch.optim.Optimizer, directory: Place, *, part: str = "") -> None:
    """The optimizer's state as a checkpoint has it, or, where it cannot be read and the user wants that, a new one."""
    try:
        with local_folder(directory) as folder:
            run.strategy.load_optimizer(optimizer, folder / part)
    except UnreadableOptimizer as error:
        if not run.spec.checkpoint.restart_optimizer:
            raise
        log.warning(
            "%s resumes from the weights of %s alone, with a new optimizer, as checkpoint.restart_optimizer asks (%s). "
            "The curve is not that of an uninterrupted run",
            run.spec.directory.name, directory.name, error,
        )  # fmt: skip


def resumed_model(model: ModelSpec, checkpoint: Place) -> ModelSpec:
    """What a run loads to resume: an adapter onto the model that it began with, or the whole policy."""
    if model.config.lora is not None:
        return replace(model, adapter=fetched(checkpoint) / ADAPTER)
    return model.at(checkpoint)


def resume_point(spec: TrainSpec, checkpointer: Checkpointer) -> Checkpoint | None:
    """The newest whole checkpoint; a directory with another run's checkpoint or model is refused."""
    final = spec.directory / "final"
    exported = read_manifest(final)
    if exported is not None:
        refuse_other_run(final, exported["identity"], spec.identity)
    return checkpointer.newest()


def update_policy(run: Run, work: Sequence[StreamWork]) -> StepResult:
    """One optimizer step of the policy."""
    return run.runner.step(run.step, work, optimizer=run.optimizer, max_grad_norm=run.spec.optim.max_grad_norm)


def train_one_step(
    run: Run,
    batches: Batches,
    rounds: Rounds | None,
    *,
    held_out: Sequence[StreamWork] = (),
    update: Callable[[Run, Sequence[StreamWork]], StepResult] = update_policy,
) -> dict[str, Any] | None:
    """One step of ``update`` and its row of metrics; None where the run stops instead of waiting for its groups."""
    spec, began = run.spec, time.perf_counter()
    if not wait_for_groups(run, rounds):
        return None
    # Nothing here draws random numbers, but a method may: a restarted run, whatever was lost, draws the same ones.
    torch.manual_seed((spec.seed * 1_000_003 + run.step) % 2**63)
    work = batches.get(run.step)
    waited = time.perf_counter() - began
    if run.step == 0 and spec.check_initial_logratio:
        now = computed_with(run.model, run.layout, run.runner.compute_dtype, run.strategy.device)
        check_initial_logratio(run.runner, work, made=spec.reference_made, now=now)
    rate = learning_rate(spec.optim, run.step, steps=spec.steps)
    set_learning_rate(run.optimizer, rate)
    try:
        result = update(run, work)
        run.skipped_in_a_row = 0
    except NonFiniteStep as error:
        result = skip_step(run, work, error)
    run.step += 1
    run.stopping = result.stop
    said = run.notices.heard() if result.ask else None
    run.urgent = said is not None
    if run.urgent:
        log.warning("%s: %s; saves step %d and continues", spec.directory.name, said, run.step)
    step_tokens = sum(part.num_tokens for part in work)
    run.num_tokens += step_tokens
    row: dict[str, Any] = {
        "step": run.step,
        "epoch": next(part.epoch for part in work if part.stream == MAIN_STREAM),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": rate,
        "num_tokens": run.num_tokens,
        "step_tokens": step_tokens,
        "workers": run.strategy.world_size,
        **result.metrics,
        **dict(chain.from_iterable(part.facts.items() for part in work)),
        "padding_share": padding_share(work),
        "seconds": time.perf_counter() - began,
        "seconds_waiting_for_data": waited,
        "seconds_saving": run.seconds_saving,
    }
    run.seconds_saving = 0.0
    if spec.optim.on_nonfinite == "skip":
        row["skipped_steps"] = run.skipped_steps
    if held_out and run.step in spec.evaluate_at:
        row |= {f"eval_{name}": value for name, value in run.runner.evaluate(run.step, held_out).items()}
    if run.skipped_in_a_row == 0:
        best = spec.checkpoint.best
        if best is not None and not run.row:
            measured = {"loss", *result.metrics, *result.absent}
            refuse_unknown_metric(best, {*row, *measured}, evaluated=measured if held_out else set())
        run.row = row
    return row


def wait_for_groups(run: Run, rounds: Rounds | None) -> bool:
    """Whether the groups of the next step are there; False on every worker where any was asked to stop meanwhile."""
    if rounds is None or not rounds.opens_round(run.step):
        return True
    missing = 0.0 if rounds.wait(run.step, run.runner.stop) else 1.0
    run.stopping = bool(run.strategy.all_sum(torch.tensor([missing], device=run.strategy.device)).item())
    return not run.stopping


def padding_share(work: Sequence[StreamWork]) -> float:
    """Share of this worker's row cells that hold no token."""
    batches = list(chain.from_iterable(part.micro_batches for part in work))
    cells = sum(batch.group_ids.numel() for batch in batches)
    empty = sum(int((batch.group_ids == PADDING_GROUP).sum()) for batch in batches)
    return empty / max(1, cells)


def export_final(run: Run) -> None:
    """Write ``final/`` once; an export that was committed before is left alone."""
    final = run.spec.directory / "final"
    if run.strategy.broadcast(read_manifest(final) is not None):
        return
    state, adapter = state_to_export(run)
    if run.strategy.rank == 0:
        with room_for(final, num_bytes(state)):
            with working(final) as folder:
                if run.spec.export_adapter:
                    adapter(folder)
                save_pretrained(
                    run.model,
                    run.tokenizer,
                    folder,
                    stop_ids=run.spec.stop_ids,
                    state=state,
                    precision=run.spec.saved,
                )
            commit(final, {"step": run.step, "identity": dict(run.spec.identity)})
