"""Where Ray comes from: the running cluster inside a job, one of our own on a laptop. Nobody else asks which."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from rayalign.errors import UserError

WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the controller polls every 2 s by default: a run ends that much later
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",  # without it a hung worker hangs the run for ever
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A connection to Ray."""

    started_here: bool
    """True when there was no cluster and one was started for this process; it ends with it."""
    num_cpus: float
    num_gpus: float
    nodes: int

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"


@contextlib.contextmanager
def connect(*, import_paths: Sequence[Path] = (), num_cpus: int | None = None) -> Iterator[Session]:
    """Join the running cluster (``RAY_ADDRESS``, or one on this machine), else start Ray here and stop it at the end.

    ``num_cpus`` limits a cluster started here. Raises UserError when the cluster at ``RAY_ADDRESS`` does not answer.
    """
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    paths = [str(path.resolve()) for path in import_paths]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    # workers must find the user's modules before they unpickle the first of their functions
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    if ray.is_initialized():
        yield describe(started_here=False)
        return
    started_here = not join_running_cluster()
    if started_here:
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=True,  # without it Ray cannot reclaim the placement group of a dead controller
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    try:
        yield describe(started_here=started_here)
    finally:
        ray.shutdown()


def join_running_cluster() -> bool:
    """Connect to a cluster that runs already; False when there is none."""
    try:
        ray.init(
            address="auto",
            runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except ConnectionError as error:
        if os.environ.get("RAY_ADDRESS"):
            raise UserError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} does not answer: {error}") from error
        return False
    return True


def describe(*, started_here: bool) -> Session:
    resources = ray.cluster_resources()
    return Session(
        started_here=started_here,
        num_cpus=resources.get("CPU", 1.0),
        num_gpus=resources.get("GPU", 0.0),
        nodes=sum(node["Alive"] for node in ray.nodes()),
    )
