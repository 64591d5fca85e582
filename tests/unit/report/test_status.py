"""How far the runs below a folder are, damaged ones included."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from rayalign.errors import UserError
from rayalign.report.status import status_table


def shown(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=240)
    console.print(status_table(folder))
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_runs_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "torn"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "run.json").write_text(
        json.dumps({"status": "finished", "steps": 4, "updated": "2026-01-31 12:34:56"})
    )
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 3, "loss": 1}\n{"step": 4, "loss": 0.5}\n{"step"')
    (tmp_path / "b" / "run.json").write_text(
        json.dumps({"status": "failed", "steps": 9, "updated": "2026-02-01 00:00:01"})
    )
    (tmp_path / "torn" / "run.json").write_text('{"status"')
    text = shown(tmp_path)
    assert "run status step loss updated" in text
    assert "a finished 4/4 0.5000 01-31 12:34 b failed 0/9 – 02-01 00:00 torn unreadable 0/? –" in text


def test_a_running_one_says_speed_time_left_checkpoint_and_failures(tmp_path: Path) -> None:
    """Two steps of 300 tokens in 3 s: 200 tokens/s, and 1.5 s for each of the 60 steps that are left."""
    facts = {"status": "running", "steps": 62, "attempts": 2, "failures": ["attempt 1: worker 0: killed"]}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    rows = [{"step": step, "loss": 0.5, "step_tokens": 300, "seconds": 1.0 * step} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("step_000001-aa", "step_000002-ab"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000001-aa" / "MANIFEST.json").touch()
    lease = tmp_path / ".lease-000001"
    lease.touch()
    text = shown(tmp_path)
    assert "run status step loss tokens/s left saved attempts" in text
    assert f"{tmp_path.name} running 2/62 0.5000 200 1:30 1 2" in text
    assert text.endswith(f"{tmp_path.name}: attempt 1: worker 0: killed")
    os.utime(lease, (time.time() - 600, time.time() - 600))
    assert "lost 2/62 0.5000 200 1 2" in shown(tmp_path)


def test_no_word_is_cut_at_eighty_columns(tmp_path: Path) -> None:
    name = "a-comparison-of-many-things/cells/hybrid-wpo-with-a-long-name-and-seed-12"
    run = tmp_path / name
    (run / "checkpoints" / "step_010000-aa").mkdir(parents=True)
    (run / "checkpoints" / "step_010000-aa" / "MANIFEST.json").touch()
    facts = {"status": "running", "steps": 20_000, "attempts": 12, "updated": "2026-01-31 12:34:56"}
    (run / "run.json").write_text(json.dumps(facts))
    row = {"step": 12_345, "loss": 0.5, "step_tokens": 300_000, "seconds": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / ".lease-000001").touch()
    console = Console(file=io.StringIO(), width=80)
    console.print(status_table(tmp_path))
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "…" not in printed
    for text in ("running", "12345/20000", "0.5000", "300,000", "2:07:35", "10000", "12", "01-31 12:34"):
        assert text in printed
    assert name in "".join(line.split()[0] for line in printed.splitlines() if line.strip())


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run: name a folder below which"):
        status_table(tmp_path)
