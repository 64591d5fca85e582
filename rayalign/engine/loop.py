"""The steps over a source: resume, train, evaluate, checkpoint, export. No Ray here: this runs in any process."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayalign.data.rows import Layout
from rayalign.engine.checkpoint import Checkpoint, Checkpointer, restore
from rayalign.engine.forward import Policy
from rayalign.engine.metrics import MetricsFile, TensorBoard, WandB
from rayalign.engine.model import ModelSpec, compute_dtype, load_policy, save_pretrained
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.optimizer import OptimizerSpec, make_optimizer, set_learning_rate
from rayalign.engine.parity import choose_layout
from rayalign.engine.source import GroupSource, StreamWork
from rayalign.engine.step import Runner, to_device
from rayalign.engine.strategy import Strategy
from rayalign.manifest import commit, read_manifest
from rayalign.types import PADDING_GROUP

log = logging.getLogger(__name__)


class Sink(Protocol):
    def write(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """Everything one worker must know to train; plain values, so that it travels between processes."""

    directory: Path
    """``<storage_path>/<name>``: metrics.jsonl, checkpoints/, final/."""
    model: ModelSpec
    objectives: tuple[Objective, ...]
    optimizer: OptimizerSpec
    seed: int
    identity: Mapping[str, Any]
    """What this run is (digests of data, model and configuration): a checkpoint of another is refused."""
    checkpoint_every: int
    checkpoint_keep: int
    checkpoint_at: tuple[int, ...] = ()
    """Further steps whose checkpoint is written and kept until the run ends."""
    evaluate_at: tuple[int, ...] = ()
    """Steps after which loss and metrics are measured on held-out groups."""
    stop_ids: tuple[int, ...] = ()
    track: tuple[str, ...] = ()
    check_initial_logratio: bool = False
    """True when the reference is the initial policy: then every logratio of step 0 must be 0 up to rounding."""


class PolicyMismatch(ValueError):
    """The policy's first log-probs are not the reference's: another template, dtype, layout or model."""


MakeSource = Callable[[Layout, int], GroupSource]
"""(layout that the model is proven to read, id of padding) → a source."""


@dataclass(slots=True, kw_only=True)
class Run:
    """One worker's state between steps."""

    spec: TrainSpec
    strategy: Strategy
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    runner: Runner
    optimizer: torch.optim.Optimizer
    checkpointer: Checkpointer
    layout: Layout
    step: int = 0
    """Steps done."""
    num_tokens: int = 0

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)


def train(
    spec: TrainSpec,
    make_source: MakeSource,
    strategy: Strategy,
    *,
    make_held_out: MakeSource | None = None,
    on_step: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> Path:
    """Train to the last step and return the exported ``final/``; continues from the newest whole checkpoint.

    Every worker of the strategy calls this function; ``on_step`` is called on rank 0 with each row of metrics.
    """
    run = begin(spec, strategy)
    source = make_source(run.layout, run.pad_id)
    held_out = make_held_out(run.layout, run.pad_id).get(0) if make_held_out else ()
    sinks = open_sinks(spec, run.step) if strategy.rank == 0 else []
    while run.step < spec.optimizer.steps:
        row = advance(run, source, held_out)
        for sink in sinks:
            sink.write(row)
        if strategy.rank == 0:
            on_step(row)
            if checkpoint_is_due(run):
                save(run)
    for sink in sinks:
        sink.close()
    if strategy.rank == 0:
        export(run)
    return spec.directory / "final"


def begin(spec: TrainSpec, strategy: Strategy) -> Run:
    """Load the policy and, where there is one, the newest whole checkpoint; rank 0 picks it for all."""
    torch.manual_seed(spec.seed)
    model, tokenizer = load_policy(spec.model, device=strategy.device)
    layout = choose_layout(model)
    policy = Policy(model, layout=layout)
    runner = Runner(
        module=strategy.wrap(policy),
        objectives={objective.stream: objective for objective in spec.objectives},
        strategy=strategy,
        compute_dtype=compute_dtype(spec.model, strategy.device),
        seed=spec.seed,
    )
    found = strategy.broadcast(newest_checkpoint(spec) if strategy.rank == 0 else None)
    run = Run(
        spec=spec,
        strategy=strategy,
        model=model,
        tokenizer=tokenizer,
        runner=runner,
        optimizer=make_optimizer(policy, spec.optimizer),
        checkpointer=checkpointer_of(spec, attempt=strategy.broadcast(secrets.token_hex(3))),
        layout=layout,
    )
    if found is not None:
        restore(found, model, run.optimizer)
        run.step, run.num_tokens = found.step, int(found.facts["num_tokens"])
        log.warning("%s continues from %s", spec.directory.name, found.directory.name)
    return run


def advance(run: Run, source: GroupSource, held_out: Sequence[StreamWork]) -> dict[str, Any]:
    """One optimizer step and its row of metrics."""
    spec, began = run.spec, time.perf_counter()
    work = source.get(run.step)
    waited = time.perf_counter() - began
    if run.step == 0 and spec.check_initial_logratio:
        check_initial_logratio(run.runner, work)
    rate = spec.optimizer.learning_rate(run.step)
    set_learning_rate(run.optimizer, rate)
    result = run.runner.step(run.step, work, run.optimizer, spec.optimizer.max_grad_norm)
    run.step += 1
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
        **result.metrics,
        "padding_share": padding_share(work),
        "seconds": time.perf_counter() - began,
        "seconds_waiting_for_data": waited,
    }
    if held_out and run.step in spec.evaluate_at:
        row |= {f"eval_{name}": value for name, value in run.runner.evaluate(held_out, run.step).items()}
    return row


def newest_checkpoint(spec: TrainSpec) -> Checkpoint | None:
    return checkpointer_of(spec, attempt="").newest()


def checkpointer_of(spec: TrainSpec, *, attempt: str) -> Checkpointer:
    return Checkpointer(
        root=spec.directory / "checkpoints",
        attempt=attempt,
        keep=spec.checkpoint_keep,
        always_keep=spec.checkpoint_at,
        identity=spec.identity,
    )


def checkpoint_is_due(run: Run) -> bool:
    last = run.step == run.spec.optimizer.steps
    return last or run.step % run.spec.checkpoint_every == 0 or run.step in run.spec.checkpoint_at


def save(run: Run) -> None:
    run.checkpointer.save(
        run.step, run.model, run.tokenizer, run.optimizer, run.spec.stop_ids, {"num_tokens": run.num_tokens}
    )


def open_sinks(spec: TrainSpec, step: int) -> list[Sink]:
    """The metrics file always, trackers as configured; all continue at ``step``."""
    spec.directory.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = [MetricsFile(spec.directory / "metrics.jsonl", step)]
    for name in spec.track:
        if name == "tensorboard":
            sinks.append(TensorBoard(spec.directory / "tensorboard", step))
        else:
            sinks.append(WandB("rayalign", spec.directory.name, json.loads(json.dumps(spec.identity))))
    return sinks


def padding_share(work: Sequence[StreamWork]) -> float:
    """Share of this worker's row cells that hold no token."""
    cells = sum(batch.group_ids.numel() for part in work for batch in part.micro_batches)
    empty = sum(int((batch.group_ids == PADDING_GROUP).sum()) for part in work for batch in part.micro_batches)
    return empty / max(1, cells)


def export(run: Run) -> None:
    """Write ``final/`` once; an export that was committed before is left alone."""
    final = run.spec.directory / "final"
    if read_manifest(final) is None:
        save_pretrained(run.model, run.tokenizer, final, stop_ids=run.spec.stop_ids)
        commit(final, {"step": run.spec.optimizer.steps, "identity": dict(run.spec.identity)})


@torch.no_grad()
def check_initial_logratio(runner: Runner, work: Sequence[StreamWork]) -> None:
    """At step 0 policy and reference are one model: a per-token logratio beyond rounding is an error, not a start."""
    limit = 1e-4 if runner.compute_dtype == torch.float32 else 0.05
    worst = mean = 0.0
    for part in (part for part in work if part.stream == MAIN_STREAM):
        ratios: list[Tensor] = []
        for batch in (to_device(batch, runner.strategy.device) for batch in part.micro_batches):
            with runner.autocast():
                scored = runner.objectives[MAIN_STREAM].score(runner.module, batch)
            ratios.append((scored.scores.token_logp - batch.per_token["ref_token_logp"]).abs())
        every = torch.cat(ratios)
        worst, mean = max(worst, float(every.max())), max(mean, float(every.mean()))
    if worst > limit:
        raise PolicyMismatch(
            f"before the first step |log π − log π_ref| per token is {mean:.2e} on average and {worst:.2e} at most, "
            f"but policy and reference are the same model (limit {limit:g}). The reference log-probs were made with "
            "another template, dtype, attention or temperature: run again with --fresh reference."
        )
