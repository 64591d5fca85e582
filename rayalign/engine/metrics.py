"""Where metrics go: one JSON object per step in ``metrics.jsonl``, and trackers if asked."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from rayalign.engine.checkpoint.checkpoint import deciding_identity
from rayalign.errors import MissingExtra
from rayalign.storage.manifest import write_durably


@runtime_checkable
class Sink(Protocol):
    """Where rows of metrics go."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class MetricsFile:
    """``metrics.jsonl`` of one run; opening it cuts back to ``step`` what a lost attempt wrote after its checkpoint.

    A row is on the disk when ``write`` returns, so that no checkpoint outlives the rows before it. JSON has no NaN and
    no infinity: such a value is null.
    """

    def __init__(self, path: Path, step: int) -> None:
        cut_back(path, step)
        self.file: TextIO = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        finite = {name: None if is_non_finite(value) else value for name, value in row.items()}
        self.file.write(json.dumps(finite, allow_nan=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def cut_back(path: Path, step: int) -> None:
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def last_logged_step(path: Path) -> int:
    """The step of the newest whole row; 0 where there is none."""
    rows = path.read_bytes().split(b"\n") if path.exists() else []
    return next((int(step) for line in reversed(rows) if math.isfinite(step := _step_of(line))), 0)


class TensorBoard:
    """The same rows as scalars; rows after ``step`` of a lost attempt are hidden."""

    def __init__(self, directory: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", "tracking") from error
        self.writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()


class WandB:
    """The same rows in one Weights & Biases run, continued after a restart; its id says which directory and run."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise MissingExtra("wandb", "tracking") from error
        named = f"{directory.resolve()} {json.dumps(deciding_identity(identity), sort_keys=True)}"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rayalign"),
            name=directory.name,
            id=hashlib.sha256(named.encode()).hexdigest()[:16],
            resume="allow",
            config=json.loads(json.dumps(identity)),
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self.run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        self.run.finish()


def open_sinks(directory: Path, track: Sequence[str], identity: Mapping[str, Any], step: int) -> list[Sink]:
    """The metrics file of a run always, trackers as configured; all continue at ``step``."""
    directory.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = [MetricsFile(directory / "metrics.jsonl", step)]
    if "tensorboard" in track:
        sinks.append(TensorBoard(directory / "tensorboard", step))
    if "wandb" in track:
        sinks.append(WandB(directory, identity))
    return sinks
