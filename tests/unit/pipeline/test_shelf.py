"""Which stages are there and for whom, and which of them are removed: none that is written, wanted or fresh."""

from __future__ import annotations

import json
import os
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from rayalign.errors import UserError
from rayalign.storage.artifacts import USED, Artifacts
from rayalign.storage.lease import lease, owner_identity
from rayalign.storage.manifest import commit
from rayalign.verbs.shelf import artifacts, gc, ls, parse_duration

DAY = 86400.0


def make(storage: Path, name: str, *, content: str = "x" * 1000) -> Path:
    def build(directory: Path) -> None:
        (directory / "data").write_text(content)
        commit(directory, {})

    return Artifacts(root=storage / "artifacts", note=lambda line: None).stage(name, {"content": content}, build)


def age(directory: Path, days: float) -> None:
    then = time.time() - days * DAY
    for path in [*directory.iterdir(), directory]:
        os.utime(path, (then, then))


def run(storage: Path, name: str, status: str, *stages: Path) -> None:
    (storage / name).mkdir(parents=True)
    facts = {"status": status, "stages": [stage.name for stage in stages], "data": []}
    (storage / name / "run.json").write_text(json.dumps(facts))


def collected(storage: Path, *, unused_for: str = "30d", dry_run: bool = False) -> str:
    text = StringIO()
    gc(storage, unused_for=unused_for, dry_run=dry_run, console=Console(file=text, width=200))
    return text.getvalue()


def test_what_nobody_has_asked_for_goes(tmp_path: Path) -> None:
    old, new, hit = make(tmp_path, "tokens"), make(tmp_path, "reference"), make(tmp_path, "rows")
    age(old, 31)
    age(new, 29)
    age(hit, 400)
    make(tmp_path, "rows")  # is found, and so used today
    size = sum(path.stat().st_size for path in old.iterdir())
    text = collected(tmp_path, dry_run=True)
    assert f"would remove {old.name}: " in text and "1 of 3 stages would be removed" in text and old.exists()
    text = collected(tmp_path / "artifacts")
    assert f"removed {old.name}: {size / 1000:.1f} kB, last used " in text
    assert text.endswith(f"1 of 3 stages removed: {size / 1000:.1f} kB\n")
    assert not old.exists() and new.exists() and hit.exists()
    assert make(tmp_path, "tokens") == old and (old / "data").exists()


def test_what_an_unfinished_run_wants_stays(tmp_path: Path) -> None:
    done, waiting, both = (make(tmp_path, "tokens", content=name) for name in ("done", "waiting", "both"))
    for directory in (done, waiting, both):
        age(directory, 40)
    run(tmp_path, "first", "finished", done, both)
    run(tmp_path, "grid/cells/dpo", "stopped", waiting, both)
    text = collected(tmp_path)
    assert f"kept {waiting.name}: grid/cells/dpo (stopped)" in text
    assert [directory.exists() for directory in (done, waiting, both)] == [False, True, True]


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    held = make(tmp_path, "tokens")
    age(held, 40)
    with lease(held):
        os.utime(held / ".lease-000001", (time.time(), time.time()))
        assert f"kept {held.name}: " in collected(tmp_path)
        assert "is being written by process" in collected(tmp_path, dry_run=True)
    assert (held / "data").exists()


def test_what_a_dead_attempt_left_goes_once_it_is_old(tmp_path: Path) -> None:
    make(tmp_path, "rows")
    dead = tmp_path / "artifacts" / "tokens-0123456789abcdef"
    (dead / "part").mkdir(parents=True)
    (dead / "shard").write_text("half")
    dead_lease = {**owner_identity(), "token": "t", "pid": 2**22 + 1, "since": "once"}
    (dead / ".lease-000001").write_text(json.dumps(dead_lease))
    assert "0 of 2 stages removed" in collected(tmp_path)  # a run may go on with it
    age(dead, 31)
    assert f"removed {dead.name}: " in collected(tmp_path) and not dead.exists()


def test_things_that_are_no_stages_are_left_alone(tmp_path: Path) -> None:
    stage = make(tmp_path, "rows")
    others = [stage.with_name("notes"), stage.with_name("tokens-abc"), stage.with_name("mine-0123456789abcdef")]
    for path in others:
        path.mkdir()
        (path / "file").write_text("")
        age(path, 100)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    age(elsewhere, 100)
    stage.with_name("rows-0123456789abcdef").symlink_to(elsewhere)
    assert "0 of 1 stages removed" in collected(tmp_path)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("storage", [".", "absent", "artifacts", "project"])
def test_a_folder_without_stages_is_refused(storage: str, tmp_path: Path) -> None:
    (tmp_path / "project" / "artifacts" / "build").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no artifacts: name a storage_path such as runs"):
        collected(tmp_path / storage)
    assert (tmp_path / "project" / "artifacts" / "build").exists()


def test_a_run_that_cannot_be_read_keeps_everything(tmp_path: Path) -> None:
    stage = make(tmp_path, "rows")
    age(stage, 100)
    run(tmp_path, "torn", "running")
    (tmp_path / "torn" / "run.json").write_text('{"status": "runn')
    with pytest.raises(UserError, match="torn/run.json cannot be read"):
        collected(tmp_path)
    assert stage.exists()


def test_times() -> None:
    assert [parse_duration(text) for text in ("90s", "5m", "12h", "30d", "2w")] == [90, 300, 43200, 30 * DAY, 14 * DAY]
    for text in ("30", "d", "1.5h", "-1d", "30 days"):
        with pytest.raises(UserError, match="write a number and one of s, m, h, d, w, such as 30d"):
            parse_duration(text)


def test_the_list_says_what_is_there_and_for_whom(tmp_path: Path) -> None:
    tokens, reference = make(tmp_path, "tokens"), make(tmp_path, "reference")
    age(tokens, 10)
    (tokens / USED).touch()
    run(tmp_path, "first", "finished", tokens)
    run(tmp_path, "second", "running", tokens)
    [begun, second] = artifacts(tmp_path / "artifacts")
    assert (begun.directory, second.directory) == (reference, tokens)
    assert second.used - second.created == pytest.approx(10 * DAY, abs=100)
    assert (second.users, second.wanted_by) == ({"first": "finished", "second": "running"}, ["second (running)"])
    assert begun.used == begun.created and begun.users == {}
    text = StringIO()
    ls(tmp_path, Console(file=text, width=200))
    [line] = [line for line in text.getvalue().splitlines() if "tokens" in line and "│" in line]
    row = [part.strip() for part in line.split("│")[1:-1]]
    assert row[:2] == ["tokens", tokens.name.partition("-")[2]] and row[-1] == "first and 1 more"
    assert "2 stages, " in text.getvalue()
