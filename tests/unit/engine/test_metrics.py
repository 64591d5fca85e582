"""One row per step in metrics.jsonl, whatever was interrupted; the same rows in the trackers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayalign.engine.checkpoint.checkpoint import DESCRIBED
from rayalign.engine.metrics import MetricsFile, TensorBoard, WandB, read_metrics
from rayalign.errors import MissingExtra


def write_steps(path: Path, first: int, last: int, *, after: int) -> None:
    file = MetricsFile(path, after)
    for step in range(first, last + 1):
        file.write({"step": step, "loss": step / 10})
    file.close()


def test_rows_after_the_checkpoint_are_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 7, after=0)
    write_steps(path, 5, 6, after=4)
    assert read_metrics(path) == [{"step": step, "loss": step / 10} for step in range(1, 7)]
    write_steps(path, 1, 2, after=0)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_torn_last_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3, after=0)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        rows = whole[:length].count(b"}")
        write_steps(path, rows + 1, 4, after=3)
        assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_a_writer_of_a_lost_attempt_reaches_the_file_no_more(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old = MetricsFile(path, 0)
    old.write({"step": 1})
    new = MetricsFile(path, 1)
    old.write({"step": 2, "lost": True})
    new.write({"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    old.close()
    new.close()


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1, "loss": 0.1, "kl": math.nan, "ratio": math.inf})
    file.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1, "kl": None, "ratio": None}]


def test_tensorboard_holds_the_rows_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, 0)
    for step in (1, 2, 3):
        board.write({"step": step, "loss": float(step), "note": "not a number"})
    board.close()
    board = TensorBoard(tmp_path, 1)
    for step in (2, 3):
        board.write({"step": step, "loss": 10.0 * step})
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0), (3, 30.0)]


def test_a_missing_tracker_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"pip install 'rayalign\[tracking\]'"):
        WandB(tmp_path, {})


@pytest.mark.parametrize(("environment", "project"), [({}, "rayalign"), ({"WANDB_PROJECT": "mine"}, "mine")])
def test_a_run_of_wandb_is_that_of_the_directory_in_the_users_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], project: str
) -> None:
    """Its id does not change with settings that only describe the run; wandb itself is no part of the environment."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **arguments: asked.append(arguments)))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for identity in ({"data": "1", DESCRIBED: {"path": "a"}}, {"data": "1", DESCRIBED: {"path": "b"}}, {"data": "2"}):
        WandB(tmp_path, identity)
    assert {arguments["project"] for arguments in asked} == {project}
    ids = [arguments["id"] for arguments in asked]
    assert ids[0] == ids[1] != ids[2]
    assert asked[0]["config"] == {"data": "1", DESCRIBED: {"path": "a"}}


def test_rows_are_plain_json(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", 1, 1, after=0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.1}
