"""How far the runs below a folder are, damaged ones included."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rayalign.errors import UserError
from rayalign.report.status import table


def shown(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table(folder))
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_runs_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "torn"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "run.json").write_text(json.dumps({"status": "finished", "steps": 4, "updated": "today"}))
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 3, "loss": 1}\n{"step": 4, "loss": 0.5}\n{"step"')
    (tmp_path / "b" / "run.json").write_text(json.dumps({"status": "running", "steps": 9, "updated": "now"}))
    (tmp_path / "torn" / "run.json").write_text('{"status"')
    text = shown(tmp_path)
    assert "/a │ finished │ 4/4 │ 0.5000 │ today" in text
    assert "/b │ running │ 0/9 │ – │ now" in text
    assert "/torn │ unreadable │ 0/? │ – │" in text


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run: name a folder below which"):
        table(tmp_path)
