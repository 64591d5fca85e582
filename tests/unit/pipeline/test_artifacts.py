"""Stages addressed by content: made once, found again, gone on with, made anew when asked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from workspaces import wait_until

from rayalign.storage.artifacts import STAGE_VERSIONS, Artifacts, digest_of, path_digest, stage_key
from rayalign.storage.manifest import commit

INPUTS = {"store": "abc", "temperature": 1.0}


def write(directory: Path, text: str = "result") -> None:
    (directory / "result.txt").write_text(text)
    commit(directory, {})


def artifacts(root: Path, notes: list[str] | None = None, **options: frozenset[str]) -> Artifacts:
    return Artifacts(root=root, note=(notes if notes is not None else []).append, **options)


def test_key_is_a_digest_of_name_version_and_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(["tokens", STAGE_VERSIONS["tokens"], INPUTS], sort_keys=True)
    assert stage_key("tokens", INPUTS) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert stage_key("tokens", dict(reversed(INPUTS.items()))) == stage_key("tokens", INPUTS)
    others = {stage_key("reference", INPUTS), stage_key("tokens", {**INPUTS, "temperature": 2.0})}
    monkeypatch.setitem(STAGE_VERSIONS, "tokens", 2)
    assert len(others | {stage_key("tokens", INPUTS)}) == 3


def test_a_stage_is_made_once(tmp_path: Path) -> None:
    notes: list[str] = []
    store = artifacts(tmp_path, notes)
    first = store.stage("tokens", INPUTS, write)
    assert store.stage("tokens", INPUTS, lambda directory: pytest.fail("made twice")) == first
    assert notes == [f"tokens: making {first.name}", f"tokens: found {first.name}"]
    assert [path.name for path in first.iterdir() if path.name.startswith(".")] == [".used"]


def test_what_an_interrupted_build_left_is_gone_on_with(tmp_path: Path) -> None:
    store = artifacts(tmp_path)

    def interrupted(directory: Path) -> None:
        (directory / "shard-0").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.stage("tokens", INPUTS, interrupted)

    def rest(directory: Path) -> None:
        assert (directory / "shard-0").read_text() == "half"
        write(directory)

    assert (store.stage("tokens", INPUTS, rest) / "MANIFEST.json").exists()


def test_a_build_that_commits_nothing_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="stage tokens ended without a commit"):
        artifacts(tmp_path).stage("tokens", INPUTS, lambda directory: None)


def test_fresh_makes_a_stage_again(tmp_path: Path) -> None:
    first = artifacts(tmp_path).stage("tokens", INPUTS, write)
    fresh = artifacts(tmp_path, fresh=frozenset({"tokens"}))
    assert fresh.stage("tokens", INPUTS, lambda directory: write(directory, "newer")) == first
    assert (first / "result.txt").read_text() == "newer"
    assert fresh.stage("rows", INPUTS, write).name.startswith("rows-")


def test_of_two_that_want_one_stage_the_second_waits_and_finds_it(tmp_path: Path) -> None:
    building, told = threading.Event(), threading.Event()
    notes: list[str] = []

    def slow(directory: Path) -> None:
        building.set()
        assert told.wait(60)
        write(directory)

    def note(line: str) -> None:
        notes.append(line)
        told.set()

    first = threading.Thread(target=lambda: artifacts(tmp_path).stage("tokens", INPUTS, slow))
    first.start()
    assert building.wait(60)
    found = Artifacts(root=tmp_path, note=note).stage("tokens", INPUTS, lambda directory: pytest.fail("made twice"))
    first.join()
    assert notes[0].startswith(f"waiting: {found} is being written by process")
    assert notes[1:] == [f"tokens: found {found.name}"]


MAKES = """
import sys, time
from pathlib import Path
from rayalign.storage.manifest import commit
from rayalign.storage.artifacts import Artifacts

root, building, go = map(Path, sys.argv[1:])

def build(directory):
    building.touch()
    end = time.monotonic() + 60
    while not go.exists() and time.monotonic() < end:
        time.sleep(0.01)
    (directory / "result.txt").write_text("the first job's")
    commit(directory, {})

Artifacts(root=root).stage("tokens", {"store": "abc", "temperature": 1.0}, build)
"""


def test_two_jobs_that_want_one_stage_share_it(tmp_path: Path) -> None:
    root, building, go = tmp_path / "artifacts", tmp_path / "building", tmp_path / "go"
    with subprocess.Popen([sys.executable, "-c", MAKES, str(root), str(building), str(go)]) as first:
        wait_until(lambda: building.exists() or first.poll() is not None, "the stage of the first job")
        notes: list[str] = []

        def note(line: str) -> None:
            notes.append(line)
            go.touch()

        second = Artifacts(root=root, note=note)
        found = second.stage("tokens", INPUTS, lambda directory: pytest.fail("made twice"))
    assert first.returncode == 0
    assert (found / "result.txt").read_text() == "the first job's"
    assert notes[0].startswith(f"waiting: {found} is being written by process {first.pid} on ")
    assert notes[1:] == [f"tokens: found {found.name}"]


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("1")
    assert path_digest(tmp_path / "data" / "a.jsonl") == hashlib.sha256(b"1").hexdigest()
    whole = path_digest(tmp_path / "data")
    assert whole == digest_of({"a.jsonl": hashlib.sha256(b"1").hexdigest()})
    (tmp_path / "data" / "a.jsonl").rename(tmp_path / "data" / "b.jsonl")
    assert path_digest(tmp_path / "data") != whole
