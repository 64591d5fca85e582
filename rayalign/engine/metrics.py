"""Where metrics go: one JSON object per step in ``metrics.jsonl``, and TensorBoard if asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rayalign.errors import MissingExtra
from rayalign.manifest import write_durably


class MetricsFile:
    """``metrics.jsonl`` of one run; opening it cuts back to ``step`` what a lost attempt wrote after its checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        cut_back(path, step)
        self.file: TextIO = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def cut_back(path: Path, step: int) -> None:
    """Keep the rows up to ``step``; a torn last line is what a killed writer leaves and goes."""
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().split(b"\n") if _step_of(line) <= step]
    write_durably(path, b"".join(line + b"\n" for line in kept).decode("utf-8"))


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


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
    """The same rows in one Weights & Biases run, continued under its id after a restart."""

    def __init__(self, project: str, run_id: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra("wandb", "tracking") from error
        self.run = wandb.init(project=project, id=run_id, resume="allow", config=dict(config))

    def write(self, row: Mapping[str, Any]) -> None:
        self.run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        self.run.finish()
