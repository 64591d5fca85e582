"""What a run needs of the machine that it runs on: its workers, its rollout actors, and how they share devices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rayalign.config.policy import RolloutConfig
from rayalign.config.run import RunConfig
from rayalign.placement import Share, elastic_share, guest_share, host_share
from rayalign.rollout.engines import EngineOptions
from rayalign.runtime.session import Session

MEMORY_ALONE, MEMORY_BESIDE_A_WORKER = 0.9, 0.4
"""Share of a GPU's memory that vLLM takes where ``rollout.gpu_memory_utilization`` leaves it open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What ``auto`` and the other settings of a run mean on one machine."""

    workers: int
    """Training workers; of an elastic run the most."""
    fewest: int | None
    """Fewest workers of an elastic run; None where their number is fixed."""
    actors: tuple[int, int]
    """(fewest, most) actors that draw rounds while the run trains; (0, 0) where none does."""
    takes_turns: bool
    """Rollout actors use the devices of the training workers, which wait while rounds are drawn."""
    processes: int
    """Processes that are busy while the run trains: its workers, and the actors that draw for them."""
    engine: EngineOptions
    """What a rollout engine gets beside its model."""

    def shares(self, session: Session, processes: int) -> Shares:
        """What the run's processes get where ``processes``, its own and others', run at the same time.

        Raises UserError naming what the cluster lacks.
        """
        fewest = self.fewest or self.workers
        each = elastic_share(session, processes - self.workers, fewest=fewest, most=self.workers)
        beside = max(0, self.processes - self.workers) + (1 if processes > self.processes else 0)
        return Shares(
            worker=host_share(each) if self.takes_turns else each, actor=actor_share(each, self.engine), beside=beside
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What each process of a run gets of the cluster."""

    worker: Share
    actor: Share
    beside: int
    """Processes that an elastic run leaves room for: its actors, and the evaluator of a comparison."""


def resolve_run(run: RunConfig, session: Session) -> Resolved:
    """Answer what ``run`` needs of the cluster of ``session``."""
    strategy, rollout = run.strategy, run.rollout
    workers = strategy.most or max(1, int(session.num_gpus))
    actors, turns = (0, 0), False
    if rollout is not None and run.data_policy.draws_rounds:
        actors = rollout.actor_range(1)
        turns = takes_turns(run, rollout, session, workers=workers)
    return Resolved(
        workers=workers,
        fewest=strategy.fewest,
        actors=actors,
        takes_turns=turns,
        processes=busy_processes(rollout, workers=workers, actors=actors, turns=turns),
        engine=engine_options(rollout, turns=turns),
    )


def takes_turns(run: RunConfig, rollout: RolloutConfig, session: Session, *, workers: int) -> bool:
    """Whether actors share devices with workers: as ``rollout.placement`` says; auto where GPUs are too few."""
    if rollout.placement != "auto":
        return rollout.placement == "shared"
    needed = workers + rollout.actor_range(1)[0] * rollout.tensor_parallel
    may_wait = run.data_policy.name != "off_policy" and run.data_policy.lag == 0
    return 0 < session.num_gpus < needed and may_wait and rollout.tensor_parallel == 1


def busy_processes(rollout: RolloutConfig | None, *, workers: int, actors: tuple[int, int], turns: bool) -> int:
    """Workers and actors that run at the same time.

    Actors with nodes of their own that are none yet leave the present nodes to the workers.
    """
    fewest, most = actors
    if rollout is None or most == 0 or (fewest == 0 and rollout.placement == "separate"):
        return workers
    drawing = max(1, fewest) * rollout.tensor_parallel
    return max(workers, drawing) if turns else workers + drawing


def engine_options(rollout: RolloutConfig | None, *, turns: bool) -> EngineOptions:
    """How an engine shares its devices; without rollouts nothing is drawn, and it does not matter."""
    if rollout is None:
        return EngineOptions()
    default = MEMORY_BESIDE_A_WORKER if turns else MEMORY_ALONE
    return EngineOptions(
        tensor_parallel=rollout.tensor_parallel,
        takes_turns=turns,
        memory_share=rollout.gpu_memory_utilization or default,
    )


def actor_share(each: Share, options: EngineOptions) -> Share:
    """What a rollout actor reserves where every process gets ``each``."""
    if options.takes_turns:
        return guest_share(each)
    return replace(each, gpus=float(options.tensor_parallel)) if options.tensor_parallel > 1 and each.gpus else each
