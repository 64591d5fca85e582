"""The steps over a source: resume, train, evaluate, checkpoint, export. No Ray here: this runs in any process."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rayalign.engine.checkpoint import Checkpointer, restore
from rayalign.engine.forward import Policy
from rayalign.engine.metrics import MetricsFile, TensorBoard, WandB
from rayalign.engine.model import ModelSpec, compute_dtype, load_policy, save_pretrained
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.optimizer import OptimizerSpec, make_optimizer, set_learning_rate
from rayalign.engine.source import GroupSource, StreamWork
from rayalign.engine.step import Runner, to_device
from rayalign.engine.strategy import Strategy
from rayalign.manifest import commit, read_manifest

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
    layout: str
    objectives: Mapping[str, Objective]
    optimizer: OptimizerSpec
    seed: int
    attempt: str
    identity: Mapping[str, Any]
    checkpoint_every: int
    checkpoint_keep: int
    evaluate_every: int
    stop_ids: tuple[int, ...]
    track: tuple[str, ...] = ()
    check_initial_logratio: bool = False
    """True when the reference is the initial policy: then every logratio of step 0 must be 0 up to rounding."""
    threads: int | None = None


class PolicyMismatch(ValueError):
    """The policy's first log-probs are not the reference's: another template, dtype, layout or model."""


def train(
    spec: TrainSpec,
    source: GroupSource,
    strategy: Strategy,
    *,
    held_out: Callable[[], Sequence[StreamWork]] | None = None,
    on_step: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> Path:
    """Train to the last step and return the exported ``final/`` directory; continues from the newest whole checkpoint.

    ``on_step`` is called on rank 0 with each row of metrics. Every worker of the strategy calls this function.
    """
    if spec.threads:
        torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    model, tokenizer = load_policy(spec.model)
    model.to(strategy.device)
    policy = Policy(model)
    runner = Runner(
        module=strategy.wrap(policy),
        objectives=spec.objectives,
        strategy=strategy,
        compute_dtype=compute_dtype(spec.model, strategy.device),
        seed=spec.seed,
    )
    optimizer = make_optimizer(policy, spec.optimizer)
    checkpointer = Checkpointer(
        root=spec.directory / "checkpoints", attempt=spec.attempt, keep=spec.checkpoint_keep, identity=spec.identity
    )
    found = strategy.broadcast(checkpointer.newest() if strategy.rank == 0 else None)
    start, num_tokens = 0, 0
    if found is not None:
        restore(found, model, optimizer)
        start, num_tokens = found.step, int(found.facts["num_tokens"])
        log.info("continuing %s from %s", spec.directory.name, found.directory.name)

    sinks = open_sinks(spec, start) if strategy.rank == 0 else []
    for step in range(start, spec.optimizer.steps):
        began = time.perf_counter()
        work = source.get(step)
        waited = time.perf_counter() - began
        if step == 0 and spec.check_initial_logratio:
            check_initial_logratio(runner, work)
        rate = spec.optimizer.learning_rate(step)
        set_learning_rate(optimizer, rate)
        result = runner.step(step, work, optimizer, spec.optimizer.max_grad_norm)
        num_tokens += sum(part.num_tokens for part in work)
        done = step + 1
        row: dict[str, Any] = {
            "step": done,
            "epoch": next(part.epoch for part in work if part.stream == MAIN_STREAM),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "num_tokens": num_tokens,
            **result.metrics,
            **padding_metrics(work),
        }
        if (
            held_out is not None
            and spec.evaluate_every
            and (done % spec.evaluate_every == 0 or done == spec.optimizer.steps)
        ):
            row |= {f"eval_{name}": value for name, value in runner.evaluate(held_out(), step).items()}
        row |= {"seconds": time.perf_counter() - began, "seconds_waiting_for_data": waited}
        for sink in sinks:
            sink.write(row)
        if strategy.rank == 0:
            on_step(row)
            last = done == spec.optimizer.steps
            if last or (spec.checkpoint_every and done % spec.checkpoint_every == 0):
                checkpointer.save(done, model, tokenizer, optimizer, spec.stop_ids, {"num_tokens": num_tokens})
    for sink in sinks:
        sink.close()
    if strategy.rank == 0:
        export(spec, model, tokenizer)
    return spec.directory / "final"


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


def padding_metrics(work: Sequence[StreamWork]) -> dict[str, float]:
    """Share of this worker's row cells that hold no token."""
    cells = sum(batch.group_ids.numel() for part in work for batch in part.micro_batches)
    empty = sum(int((batch.group_ids < 0).sum()) for part in work for batch in part.micro_batches)
    return {"padding_share": empty / max(1, cells)}


def export(spec: TrainSpec, model: Any, tokenizer: Any) -> None:
    """Write ``final/`` once; an export that was committed before is left alone."""
    final = spec.directory / "final"
    if read_manifest(final) is None:
        save_pretrained(model, tokenizer, final, stop_ids=spec.stop_ids)
        commit(final, {"step": spec.optimizer.steps, "identity": dict(spec.identity)})


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
