"""What the driver shows of files that workers write."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rayalign.storage.progress import Tail, logging_to, watching


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_tail_gives_whole_lines_that_are_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    append(path, "old\n")
    tail = Tail(path)
    append(path, "a\nb\nha")
    assert tail.lines() == [b"a", b"b"]
    append(path, "lf\n")
    assert (tail.lines(), tail.lines()) == ([b"half"], [])


def test_tail_begins_again_when_the_file_was_replaced(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    tail = Tail(path)
    assert tail.lines() == []
    append(path, "1\n2\n3\n")
    assert tail.lines() == [b"1", b"2", b"3"]
    append(other, "1\n2\n")
    os.replace(other, path)
    append(path, "4\n")
    assert tail.lines() == [b"1", b"2", b"4"]


def test_the_newest_row_and_every_warning_are_shown(tmp_path: Path) -> None:
    rows: list[Mapping[str, Any]] = []
    notes: list[str] = []
    with watching(tmp_path, row=rows.append, note=notes.append):
        append(tmp_path / "metrics.jsonl", "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
        append(tmp_path / "train.log", "continues\nskipping\n")
    assert rows[-1] == {"step": 3}
    assert notes == ["continues", "skipping"]


def test_warnings_of_the_package_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("rayalign"), "handlers", [])
    with logging_to(tmp_path):
        assert not (tmp_path / "train.log").exists()
        logging.getLogger("rayalign.engine.loop").warning("%s continues", "dpo")
        logging.getLogger("rayalign.engine.loop").info("not this")
    logging.getLogger("rayalign.engine.loop").warning("another run")
    assert (tmp_path / "train.log").read_text() == "dpo continues\n"
