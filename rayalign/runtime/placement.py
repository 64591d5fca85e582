"""Shares of the machine: how many CPUs and threads each of several processes gets. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rayalign.errors import UserError
from rayalign.runtime.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process reserves."""

    cpus: float
    gpus: float
    threads: int

    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def share(session: Session, processes: int) -> Share:
    """Equal shares for ``processes`` that run at the same time; everything fits, with fractional CPUs if it must.

    Raises UserError when the cluster has GPUs but fewer than processes.
    """
    if session.num_gpus:
        if processes > session.num_gpus:
            raise UserError(
                f"{processes} processes need a GPU each, the cluster has {session.num_gpus:g}: lower strategy.workers"
            )
        cpus = max(1.0, math.floor(session.num_cpus / max(processes, session.num_gpus)))
        return Share(cpus=min(cpus, session.num_cpus), gpus=1.0, threads=int(cpus))
    cpus = session.num_cpus / processes
    # a tenth is left for Ray's own helpers, which reserve nothing but must be schedulable
    return Share(cpus=math.floor(cpus * 9) / 10 if cpus < 1 else math.floor(cpus), gpus=0.0, threads=max(1, int(cpus)))
