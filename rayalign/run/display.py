"""Progress of long work: live bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rayalign.report.status import clock_text

LINE_EVERY_SECONDS = 5.0


class ProgressBoard:
    """Shows each run's steps, loss, tokens/s and time left; ``row`` takes rows of ``metrics.jsonl`` as they come.

    ``seen`` gets the same rows, with the name of their run.
    """

    def __init__(
        self, console: Console, seen: Callable[[str, Mapping[str, Any]], None] = lambda run, row: None
    ) -> None:
        self.console = console
        self.seen = seen
        self.bars: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bars = Progress(*columns, TextColumn("{task.fields[facts]}"), console=console)
        self.tasks: dict[str, TaskID] = {}
        self.runs: dict[str, RunClock] = {}

    def __enter__(self) -> Self:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars:
            self.bars.stop()

    def start(self, run: str, steps: int) -> None:
        """Announce a run of ``steps`` steps."""
        self.runs[run] = RunClock(steps)
        if self.bars:
            self.tasks[run] = self.bars.add_task(run, total=steps, facts="")

    def row(self, run: str, row: Mapping[str, Any]) -> None:
        """Show the newest row of ``run``."""
        self.seen(run, row)
        clock = self.runs[run]
        facts = clock.facts(row)
        if self.bars:
            self.bars.update(self.tasks[run], completed=row["step"], facts=facts)
        elif clock.line_is_due(row):
            line = f"{run}: step {row['step']}/{clock.steps}  {facts}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """One line of plain text, above the bars."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class RunClock:
    """Speed and time left of one run, from the rows seen since it was announced."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.first: tuple[float, int, int] | None = None
        self.last_line = float("-inf")

    def facts(self, row: Mapping[str, Any]) -> str:
        now = time.monotonic()
        if self.first is None:
            self.first = (now - row["seconds"], row["step"] - 1, row["num_tokens"] - row.get("step_tokens", 0))
        began, step, tokens = self.first
        elapsed = max(1e-9, now - began)
        left = (self.steps - row["step"]) * elapsed / max(1, row["step"] - step)
        speed = (row["num_tokens"] - tokens) / elapsed
        loss = f"loss {row['loss']:.4f}" if row.get("loss") is not None else "skipped"
        return f"{loss}  {speed:,.0f} tokens/s  {clock_text(left)} left"

    def line_is_due(self, row: Mapping[str, Any]) -> bool:
        due = time.monotonic() - self.last_line >= LINE_EVERY_SECONDS or row["step"] == self.steps
        if due:
            self.last_line = time.monotonic()
        return due
