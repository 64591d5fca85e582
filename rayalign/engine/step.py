"""One optimizer step: statistics → forward → loss ÷ global counts → backward → average → clip → update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.source import StreamWork
from rayalign.engine.strategy import Strategy
from rayalign.methods._base import Statistics
from rayalign.types import PackedBatch, Scored


class NonFiniteStep(FloatingPointError):
    """The loss or its gradient is NaN or infinite; the message names the step and the groups that it saw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did. Sums and counts are over all workers; ``metrics`` are their ratios."""

    loss: float
    grad_norm: float
    """Euclidean norm of the averaged gradient before clipping."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Everything that stays the same from step to step on one worker."""

    module: nn.Module
    objectives: Mapping[str, Objective]
    strategy: Strategy
    compute_dtype: torch.dtype
    seed: int

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.strategy.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32
        )

    def step(
        self, step: int, work: Sequence[StreamWork], optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> StepResult:
        """Train on the groups of ``step``; raises :class:`NonFiniteStep` before any parameter has moved."""
        statistics = {part.stream: self.statistics(step, part) for part in work}
        optimizer.zero_grad(set_to_none=True)
        tally = Tally()
        jobs = [(part, batch) for part in work for batch in part.micro_batches]
        for number, (part, batch) in enumerate(jobs):
            last = number == len(jobs) - 1
            objective = self.objectives[part.stream]
            with self.strategy.forward_context(self.module, last=last):
                with self.autocast():
                    scored = objective.score(self.module, to_device(batch, self.strategy.device))
                loss, shares = objective.loss(scored, statistics[part.stream], part.counts)
                self.strategy.backward(self.module, loss * self.strategy.world_size, last=last)
            tally.add_loss(objective, loss, shares)
            tally.add_metrics(objective, scored, statistics[part.stream])
        loss_value, metrics = tally.reduce(self.strategy)
        grad_norm = float(self.strategy.clip(self.module, max_grad_norm))
        if not (torch.isfinite(torch.tensor(loss_value)) and torch.isfinite(torch.tensor(grad_norm))):
            raise NonFiniteStep(describe_non_finite(step, loss_value, grad_norm, work))
        optimizer.step()
        return StepResult(loss=loss_value, grad_norm=grad_norm, metrics=metrics)

    @torch.no_grad()
    def evaluate(self, work: Iterable[StreamWork], step: int) -> dict[str, float]:
        """Loss and metrics of the policy on held-out groups, over all of them and all workers."""
        tally = Tally()
        for part in work:
            objective = self.objectives[part.stream]
            statistics = self.statistics(step, part)
            for batch in part.micro_batches:
                with self.autocast():
                    scored = objective.score(self.module, to_device(batch, self.strategy.device))
                loss, shares = objective.loss(scored, statistics, part.counts)
                tally.add_loss(objective, loss, shares)
                tally.add_metrics(objective, scored, statistics)
        loss_value, metrics = tally.reduce(self.strategy)
        return {"loss": loss_value, **metrics}

    @torch.no_grad()
    def statistics(self, step: int, part: StreamWork) -> Statistics:
        """What the method wants to know of the whole step before its loss: one extra forward where it asks for it."""
        objective = self.objectives[part.stream]
        empty = Statistics(groups_per_step=part.groups_per_step, seed=self.seed, step=step)
        prepare = objective.method.step_prepare
        if prepare is None:
            return empty
        sums: dict[str, Tensor] = {}
        for batch in part.micro_batches:
            with self.autocast():
                scored = objective.score(self.module, to_device(batch, self.strategy.device))
            for name, value in prepare(scored, objective.config, empty).items():
                sums[name] = sums.get(name, torch.zeros_like(value, dtype=torch.float64)) + value.double()
        reduced = {name: self.strategy.all_sum(value) for name, value in sorted(sums.items())}
        return Statistics(sums=reduced, groups_per_step=part.groups_per_step, seed=self.seed, step=step)


class Tally:
    """Sums and counts of one step on this worker; one reduction over workers at the end."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, count: Tensor) -> None:
        self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + total.detach().double().cpu()
        self.counts[name] = self.counts.get(name, torch.zeros((), dtype=torch.float64)) + count.detach().double().cpu()

    def add_loss(self, objective: Objective, loss: Tensor, shares: Mapping[str, Tensor]) -> None:
        nothing = torch.zeros(())
        self.add("loss", loss, nothing)
        for name, share in shares.items():
            self.add(f"loss/{objective.stream}/{name}", share, nothing)

    def add_metrics(self, objective: Objective, scored: Scored, statistics: Statistics) -> None:
        if objective.method.metrics is None or objective.stream != MAIN_STREAM:
            return
        with torch.no_grad():
            for name, (total, count) in objective.method.metrics(scored, objective.config, statistics).items():
                self.add(name, total, count)

    def reduce(self, strategy: Strategy) -> tuple[float, dict[str, float]]:
        """(loss, metrics): losses are sums over workers, metrics are Σ sum / Σ count."""
        names = sorted(self.sums)
        flat = torch.stack([*(self.sums[name] for name in names), *(self.counts[name] for name in names)])
        flat = strategy.all_sum(flat.to(strategy.device)).cpu()
        sums = dict(zip(names, flat[: len(names)].tolist(), strict=True))
        counts = dict(zip(names, flat[len(names) :].tolist(), strict=True))
        parts = [name for name in names if name.startswith("loss/")]
        reported = {name: sums[name] for name in parts if len(parts) > 1}
        ratios = {name: sums[name] / counts[name] for name in names if counts[name] > 0}
        return sums["loss"], {**reported, **ratios}


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    if batch.input_ids.device == device:
        return batch

    def moved(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        assert isinstance(value, Mapping)
        return {name: column.to(device, non_blocking=True) for name, column in value.items()}

    return PackedBatch(**{name: moved(getattr(batch, name)) for name in PackedBatch.__slots__})


def describe_non_finite(step: int, loss: float, grad_norm: float, work: Sequence[StreamWork]) -> str:
    seen = "; ".join(f"{part.stream}: groups {group_range(part.micro_batches)}" for part in work)
    return (
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}. No parameter was changed by this step. "
        f"This worker saw {seen} (positions in the stream). Lower optim.lr, or look at these groups."
    )


def group_range(batches: Sequence[PackedBatch]) -> str:
    positions = sorted({int(index) for batch in batches for index in batch.group_index})
    return f"{positions[0]}…{positions[-1]}" if positions else "none"
