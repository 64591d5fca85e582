"""One optimizer step: statistics → forward → loss ÷ global counts → backward → average → clip → update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayalign.engine.batches import StreamWork, to_device
from rayalign.engine.model.lora import adapter_off, with_reference
from rayalign.engine.objective import MAIN_STREAM, REFERENCE_NEEDS, Objective
from rayalign.engine.strategy.base import Strategy
from rayalign.errors import UserError
from rayalign.methods.method import Statistics
from rayalign.types import PackedBatch, Scored


class NonFiniteStep(FloatingPointError):
    """The loss or its gradient is NaN or infinite, on every worker alike; nothing has moved (DeepSpeed may have).

    The message names the step; ``suspects`` are the groups of this worker whose micro-batch's loss is not finite, and
    ``stop`` and ``ask`` are those of :class:`StepResult`.
    """

    def __init__(
        self,
        message: str,
        *,
        loss: float = math.nan,
        grad_norm: float = math.nan,
        suspects: Sequence[str] = (),
        stop: bool = False,
        ask: bool = False,
    ) -> None:
        super().__init__(message)
        self.loss = loss
        self.grad_norm = grad_norm
        self.suspects = tuple(suspects)
        self.stop = stop
        self.ask = ask


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did. Sums and counts are over all workers; ``metrics`` are their ratios."""

    loss: float
    grad_norm: float
    """Euclidean norm of the averaged gradient before clipping."""
    metrics: Mapping[str, float]
    stop: bool = False
    """Rank 0 was asked to end the run; every rank learns it of the same step."""
    ask: bool = False
    """Rank 0 says that it is time to ask for notices of the cluster; so does every rank."""
    absent: tuple[str, ...] = ()
    """Metrics that had nothing to count in this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Everything that stays the same from step to step on one worker."""

    module: nn.Module
    objectives: Mapping[str, Objective]
    """By the name of their stream."""
    strategy: Strategy
    compute_dtype: torch.dtype
    seed: int
    reference_in_place: bool = False
    """The reference is the policy with its adapter off, and scores each batch here."""
    reference: nn.Module | None = None
    """A frozen model that scores each batch here, spread over the workers as the strategy freezes models."""
    stop: Callable[[], bool] = lambda: False
    """Whether this rank was asked to end the run; rank 0's answer counts."""
    ask: Callable[[], bool] = lambda: False
    """Whether it is time to ask for notices of the cluster; rank 0's answer counts."""

    def step(
        self, step: int, work: Sequence[StreamWork], *, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> StepResult:
        """Train on the groups of ``step``; raises :class:`NonFiniteStep` before any parameter has moved."""
        result = self.gradient(step, work, optimizer=optimizer, max_grad_norm=max_grad_norm)
        optimizer.step()
        return result

    def gradient(
        self, step: int, work: Sequence[StreamWork], *, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> StepResult:
        """The clipped gradient of ``step``, for the optimizer to use; raises :class:`NonFiniteStep`."""
        statistics = {part.stream: self.statistics(step, part) for part in work}
        optimizer.zero_grad(set_to_none=True)
        tally = StepSums()
        losses: list[Tensor] = []
        jobs: list[tuple[StreamWork, PackedBatch]] = []
        for part in work:
            jobs += [(part, batch) for batch in part.micro_batches]
        for number, (part, batch) in enumerate(jobs):
            last = number == len(jobs) - 1
            objective = self.objectives[part.stream]
            with self.strategy.forward_context(self.module, last=last):
                scored = self.score(objective, batch)
                loss, shares = objective.loss(scored, statistics[part.stream], part.counts)
                if not loss.requires_grad:
                    name = objective.method.name
                    raise UserError(f"method {name!r}: its loss has no gradient: make it of scored.scores, undetached")
                # Every strategy averages gradients over workers; the loss is divided by the counts of all of them.
                self.strategy.backward(self.module, loss * self.strategy.world_size, last=last)
            losses.append(loss.detach())
            tally.add_loss(objective, shares)
            tally.add_metrics(objective, scored, statistics[part.stream])
        tally.stop = self.strategy.rank == 0 and self.stop()
        tally.ask = self.strategy.rank == 0 and self.ask()
        grad_norm = float(self.strategy.clip(self.module, max_grad_norm))
        tally.finite = math.isfinite(grad_norm)
        loss_value, metrics = tally.reduce(self.strategy)
        if not (math.isfinite(loss_value) and tally.finite):
            suspects: list[str] = []
            for (part, batch), loss in zip(jobs, losses, strict=True):
                if not loss.isfinite():
                    suspects += [part.describe(int(place)) for place in batch.group_index]
            raise NonFiniteStep(
                f"step {step + 1}: loss {loss_value}, gradient norm {grad_norm}",
                loss=loss_value,
                grad_norm=grad_norm,
                suspects=suspects,
                stop=tally.stop,
                ask=tally.ask,
            )
        absent = tuple(name for name in tally.sums if name not in metrics)
        return StepResult(
            loss=loss_value, grad_norm=grad_norm, metrics=metrics, absent=absent, stop=tally.stop, ask=tally.ask
        )

    @torch.no_grad()
    def evaluate(self, step: int, work: Iterable[StreamWork]) -> dict[str, float]:
        """Loss and metrics of the policy on held-out groups, over all of them and all workers."""
        tally = StepSums()
        for part in work:
            objective = self.objectives[part.stream]
            statistics = self.statistics(step, part)
            for batch in part.micro_batches:
                scored = self.score(objective, batch)
                _, shares = objective.loss(scored, statistics, part.counts)
                tally.add_loss(objective, shares)
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
            for name, value in prepare(self.score(objective, batch), objective.config, empty).items():
                sums[name] = sums.get(name, torch.zeros_like(value, dtype=torch.float64)) + value.double()
        reduced = {name: self.strategy.all_sum(value) for name, value in sorted(sums.items())}
        return Statistics(sums=reduced, groups_per_step=part.groups_per_step, seed=self.seed, step=step)

    def score(self, objective: Objective, batch: PackedBatch) -> Scored:
        """One forward of the policy in the compute dtype."""
        device = self.strategy.device
        with torch.autocast(device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            batch = to_device(batch, device)
            if objective.method.needed(objective.config) & REFERENCE_NEEDS:
                batch = self.referenced(batch, logit_temperature=objective.config.logit_temperature)
            return objective.score(self.module, batch)

    @torch.no_grad()
    def referenced(self, batch: PackedBatch, *, logit_temperature: float) -> PackedBatch:
        """The batch with the log-probs of a reference that scores here; as it is where data carry them."""
        if self.reference is not None:
            scores = self.reference(batch, logit_temperature=logit_temperature)
        elif self.reference_in_place:
            with adapter_off(self.module):
                scores = self.module(batch, logit_temperature=logit_temperature)
        else:
            return batch
        return with_reference(batch, scores.token_logp)


class StepSums:
    """What one step adds up on this worker; one reduction over workers at the end.

    Every worker has the same names: a dummy batch counts nothing, but goes through the same methods.
    """

    def __init__(self) -> None:
        self.terms: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.stop = False
        """Whether this worker was asked to stop; after the reduction, whether any was. It travels with the sums."""
        self.ask = False
        """Whether notices of the cluster are due, reduced in the same way."""
        self.finite = True
        """Whether this worker's gradient is; after the reduction, whether every worker's is."""

    def add_loss(self, objective: Objective, shares: Mapping[str, Tensor]) -> None:
        for name, share in shares.items():
            add_to_total(self.terms, f"loss/{objective.stream}/{name}", share)

    def add_metrics(self, objective: Objective, scored: Scored, statistics: Statistics) -> None:
        if objective.method.metrics is None or objective.stream != MAIN_STREAM:
            return
        with torch.no_grad():
            for name, (total, count) in objective.method.metrics(scored, objective.config, statistics).items():
                add_to_total(self.sums, name, total)
                add_to_total(self.counts, name, count)

    def reduce(self, strategy: Strategy) -> tuple[float, dict[str, float]]:
        """(loss, metrics): the loss is the sum of its terms over workers, a metric is Σ sum / Σ count."""
        signs = torch.tensor([not self.finite, self.stop, self.ask], dtype=torch.float64)
        columns = [*self.terms.values(), *self.sums.values(), *self.counts.values(), *signs]
        reduced = iter(strategy.all_sum(torch.stack([column.to(strategy.device) for column in columns])).tolist())
        terms = {name: next(reduced) for name in self.terms}
        sums = {name: next(reduced) for name in self.sums}
        counts = {name: next(reduced) for name in self.counts}
        self.finite = next(reduced) == 0
        self.stop = next(reduced) > 0
        self.ask = next(reduced) > 0
        metrics = {name: sums[name] / counts[name] for name in sums if counts[name] > 0}
        return math.fsum(terms.values()), metrics if len(terms) == 1 else terms | metrics


def add_to_total(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Float64, and on the device where the value is: reading it would wait for the device."""
    value = value.detach().double()
    totals[name] = totals[name] + value if name in totals else value
