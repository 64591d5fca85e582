"""Where Ray comes from: the running cluster inside a job, one of our own on a laptop. No other module asks which."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private import auto_init_hook
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayalign.errors import Failed, UserError, first_line
from rayalign.paths import expanded
from rayalign.placement import Node
from rayalign.runtime.vital import Vital, newest_logs
from rayalign.storage.place import ObjectPath, Place, place_of, refuse_unwritable

DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_worker_niceness": "0",  # by default workers give way to every other process: the training itself does
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the controller polls every 2 s by default: a run ends that much later
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",  # without it a hung worker hangs the run for ever
}
"""Environment variables of this process and of the Ray that it starts, unless the user set them."""

WATCHER_VARIABLE = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Switch of Ray Train's watch for nodes that are taken back. A Ray that we start has one node, which stays."""

STORAGE_VARIABLE = "RAYALIGN_STORAGE"
PROBE_SECONDS = 60.0
ANSWER_SECONDS = 5.0


CPU_ROW_TOKENS = 2048
"""Row length on a CPU: rows of this length are as fast as any, and few of them hold a batch. CUDA takes one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A connection to Ray."""

    started_here: bool
    """True when there was no cluster and one was started for this process; it ends with it."""
    nodes: tuple[Node, ...]
    vital: Vital = field(default_factory=Vital)
    """Ends this process where a Ray that was started for it dies."""

    @property
    def num_cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def num_gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"

    @property
    def row_tokens(self) -> int | None:
        """Length of the rows of a micro-batch; None: one row holds it all."""
        return None if self.num_gpus else CPU_ROW_TOKENS

    def storage(self, path: str) -> Place:
        """The folder that ``storage_path`` means, seen by every node, or the prefix of an object store.

        A relative path is below the current directory where Ray was started for this process, and below
        ``$RAYALIGN_STORAGE`` on a running cluster, whose current directory is a copy that ends with the job.

        Raises UserError where there is no such folder for all nodes, and says what to set.
        """
        folder = self.place(path)
        if isinstance(folder, ObjectPath):
            refuse_unwritable(folder)
            return folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"storage_path: {folder} cannot be made: {error.strerror}") from error
        refuse_private(folder, self.nodes)
        return folder

    def place(self, path: str) -> Place:
        """Where that folder is or would be; nothing is made."""
        folder = place_of(path, field="storage_path")
        if isinstance(folder, ObjectPath):
            return folder
        if not folder.is_absolute():
            folder = self._base(path) / folder
        return folder.resolve()

    def _base(self, path: str) -> Path:
        if self.started_here:
            return Path.cwd()
        base = os.environ.get(STORAGE_VARIABLE)
        if not base:
            raise UserError(
                f"storage_path: {path} is relative, and on a running cluster nothing says to what: give an absolute "
                f"path that every node sees, or set {STORAGE_VARIABLE} to one"
            )
        return expanded(base, field=STORAGE_VARIABLE)


@contextlib.contextmanager
def connect(*, import_paths: Sequence[Path] = ()) -> Iterator[Session]:
    """Join the running cluster, else start Ray for this process and stop it at the end.

    A cluster is running where ``RAY_ADDRESS`` names one (a submitted job has it) or where ``ray start`` made this
    machine part of one; ``RAY_ADDRESS=local`` starts a new one in any case. Workers find the modules in
    ``import_paths``. The environment of this process is as before when the block ends.

    Where Ray was started here and dies, the process ends with a message: see :mod:`rayalign.runtime.vital`.

    Raises UserError when the cluster does not answer, and when Ray cannot write its own files; Failed when Ray does not
    start.
    """
    vital = Vital()
    with inherited_environment(import_paths):
        if ray.is_initialized():
            yield describe(started_here=False)
            return
        address = running_cluster()
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address is None:
            # Without a dashboard Ray cannot reclaim the placement group of a dead controller.
            options |= {"address": "local", "include_dashboard": True, "dashboard_host": "127.0.0.1"}
            os.environ.setdefault(WATCHER_VARIABLE, "0")
            vital.watch()
        elif import_paths:
            options |= {"runtime_env": {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}}
        try:
            ray.init(**options)
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"the Ray cluster at {address} does not answer ({first_line(error)}): start it, correct RAY_ADDRESS, "
                "or set RAY_ADDRESS=local to start one here"
            ) from error
        except OSError as error:  # a socket's path has 107 bytes at most
            raise UserError(
                f"Ray cannot keep its files below {temporary_folder()} ({first_line(error)}): set RAY_TMPDIR to a "
                "folder with a short path that can be written, such as /tmp"
            ) from error
        except Exception as error:  # Ray tells by bare Exceptions, too, that it did not start in time
            if address is not None:
                raise
            raise Failed(
                f"Ray did not start ({first_line(error)}): this machine may be very busy, or short of memory. Its logs "
                f"are in {newest_logs()}; the same command tries again"
            ) from error
        if address is None:
            host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
            vital.gcs = (host, int(port))
        try:
            yield describe(started_here=address is None, vital=vital)
        finally:
            vital.release()
            auto_init_hook.enable_auto_connect = False  # a thread that still waits for Ray must not start another one
            ray.shutdown()


@contextlib.contextmanager
def preview() -> Iterator[Session]:
    """What :func:`connect` would give, for plans: the running cluster, else this machine as Ray would find it.

    No Ray is started.
    """
    if ray.is_initialized() or running_cluster() is not None:
        with connect() as session:
            yield session
        return
    import torch

    node = Node(
        id="", name=socket.gethostname(), cpus=float(os.cpu_count() or 1), gpus=float(torch.cuda.device_count())
    )
    yield Session(started_here=True, nodes=(node,))


@contextlib.contextmanager
def inherited_environment(import_paths: Sequence[Path]) -> Iterator[None]:
    """What the processes of Ray are to inherit from this one.

    Workers must find the user's modules before they unpickle the first of their functions, hence ``PYTHONPATH``.
    """
    before = dict(os.environ)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if import_paths:
        paths = [str(path.resolve()) for path in import_paths]
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [before.get("PYTHONPATH")])])
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def running_cluster() -> str | None:
    """The cluster to join. (Ray's ``address="auto"`` would also join what another process started for itself.)"""
    named = os.environ.get("RAY_ADDRESS")
    if named:
        return None if named == "local" else named
    noted = temporary_folder() / "ray" / "ray_current_cluster"
    address = noted.read_text().strip() if noted.exists() else ""
    return address if address and is_listening(address) else None


def temporary_folder() -> Path:
    """Where Ray keeps its sockets and logs."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"))


def is_listening(address: str) -> bool:
    """Whether anything listens there: of a cluster that was killed only the note is left, and Ray would wait for it."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def describe(*, started_here: bool, vital: Vital | None = None) -> Session:
    alive = [node for node in ray.nodes() if node["Alive"]]
    return Session(started_here=started_here, nodes=tuple(make_node(node) for node in alive), vital=vital or Vital())


def make_node(facts: Mapping[str, Any]) -> Node:
    resources = facts["Resources"]
    return Node(
        id=facts["NodeID"],
        name=facts["NodeManagerHostname"],
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
    )


def refuse_private(folder: Path, nodes: Sequence[Node]) -> None:
    """Raise UserError naming the nodes that do not see what this process writes into ``folder``."""
    if len(nodes) == 1:
        return
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.write_text("visible")
    try:
        sees = ray.remote(num_cpus=0)(is_visible)
        here = {
            node: sees.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False), max_retries=0
            ).remote(str(probe))
            for node in nodes
        }
        answered, _ = ray.wait(list(here.values()), num_returns=len(here), timeout=PROBE_SECONDS)
        silent = [node.name for node, answer in here.items() if answer not in answered]
        blind = [node.name for node, answer in here.items() if answer in answered and not ray.get(answer)]
    finally:
        probe.unlink()
    if silent:
        raise UserError(f"no answer within {PROBE_SECONDS:.0f} s from the node(s) {', '.join(silent)}")
    if blind:
        raise UserError(
            f"storage_path: {folder} is not the same folder on every node ({', '.join(blind)} cannot see it): use a "
            f"shared file system, such as a mounted volume, and name it in storage_path or {STORAGE_VARIABLE}"
        )


def is_visible(path: str) -> bool:
    try:
        os.listdir(Path(path).parent)  # a network file system may remember that the file was not there
        return Path(path).exists()
    except OSError:
        return False
