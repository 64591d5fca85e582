"""Where metrics go: one JSON object per step in ``metrics.jsonl``, and trackers if asked."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from rayalign.engine.checkpoint.checkpoint import deciding_identity
from rayalign.errors import MissingExtra
from rayalign.storage.manifest import write_durably
from rayalign.storage.place import ObjectPath, Place, write_whole

SEND_SECONDS = 15.0


@runtime_checkable
class Sink(Protocol):
    """Where rows of metrics go."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def flush(self) -> None:
        """Bring to where it outlives this process what was written."""
        ...

    def close(self) -> None: ...


class MetricsFile:
    """``metrics.jsonl`` of one run; opening it cuts back to ``step`` what a lost attempt wrote after its checkpoint.

    A row is on the disk when ``write`` returns. An object cannot be appended to: it is written whole, at most every
    :data:`SEND_SECONDS`, and by ``flush``. So no checkpoint outlives the rows before it. JSON has no NaN and no
    infinity: such a value is null.
    """

    def __init__(self, path: Place, step: int) -> None:
        cut_back(path, step)
        self.path = path
        self.file: IO[bytes] = path.open("ab") if isinstance(path, Path) else io.BytesIO()
        if isinstance(path, ObjectPath) and path.exists():
            self.file.write(path.read_bytes())
        self.sent = time.monotonic()

    def write(self, row: Mapping[str, Any]) -> None:
        not_finite = [name for name, value in row.items() if is_non_finite(value)]
        finite = {**row, **dict.fromkeys(not_finite)}
        self.file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        if isinstance(self.path, Path) or time.monotonic() - self.sent > SEND_SECONDS:
            self.flush()

    def flush(self) -> None:
        if isinstance(self.file, io.BytesIO):
            write_whole(self.path, self.file.getvalue())
            self.sent = time.monotonic()
        else:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.flush()
        self.file.close()


def is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def cut_back(path: Place, step: int) -> None:
    """Keep the rows up to ``step``; a torn last line is what a killed writer leaves and goes."""
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().split(b"\n") if _step_of(line) <= step]
    write_durably(path, b"".join(line + b"\n" for line in kept).decode("utf-8"))


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_metrics(path: Place) -> list[dict[str, Any]]:
    """All rows of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def last_logged_step(path: Place) -> int:
    """The step of the newest whole row; 0 where there is none."""
    rows = path.read_bytes().split(b"\n") if path.exists() else []
    return next((int(step) for line in reversed(rows) if math.isfinite(step := _step_of(line))), 0)


class TensorBoard:
    """The same rows as scalars; rows after ``step`` of a lost attempt are hidden.

    For an object store the events are written on this node, and sent with every ``flush``.
    """

    def __init__(self, directory: Place, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", "tracking") from error
        self.directory = directory
        self.local = directory if isinstance(directory, Path) else Path(tempfile.mkdtemp(prefix="rayalign-events-"))
        self.writer = SummaryWriter(str(self.local), purge_step=step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        self.writer.flush()
        if isinstance(self.directory, ObjectPath):
            for path in self.local.iterdir():
                (self.directory / path.name).send(path)

    def close(self) -> None:
        self.writer.close()
        if isinstance(self.directory, ObjectPath):
            self.flush()
            shutil.rmtree(self.local, ignore_errors=True)


class WandB:
    """The same rows in one Weights & Biases run, continued after a restart; its id says which directory and run."""

    def __init__(self, directory: Place, identity: Mapping[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise MissingExtra("wandb", "tracking") from error
        place = directory.resolve() if isinstance(directory, Path) else directory
        named = f"{place} {json.dumps(deciding_identity(identity), sort_keys=True)}"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rayalign"),
            name=directory.name,
            id=hashlib.sha256(named.encode()).hexdigest()[:16],
            resume="allow",
            config=json.loads(json.dumps(identity)),
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self.run.log(dict(row), step=int(row["step"]))

    def flush(self) -> None:
        """It sends on its own."""

    def close(self) -> None:
        self.run.finish()


def flush(sinks: Sequence[Sink]) -> None:
    for sink in sinks:
        sink.flush()


def open_sinks(directory: Place, track: Sequence[str], identity: Mapping[str, Any], step: int) -> list[Sink]:
    """The metrics file of a run always, trackers as configured; all continue at ``step``."""
    directory.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = [MetricsFile(directory / "metrics.jsonl", step)]
    if "tensorboard" in track:
        sinks.append(TensorBoard(directory / "tensorboard", step))
    if "wandb" in track:
        sinks.append(WandB(directory, identity))
    return sinks
