"""A committed directory is whole, or says what is wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rayalign.storage.manifest import MANIFEST, TornDirectory, commit, read_manifest, verify, write_durably


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    directory = tmp_path / "stage"
    (directory / "inner").mkdir(parents=True)
    (directory / "a.bin").write_bytes(bytes(range(256)))
    (directory / "inner" / "b.txt").write_text("beta")
    (directory / ".lease-000001").write_text("of the moment")
    commit(directory, {"step": 3, "shape": (2, 3)})
    return directory


def test_manifest_names_every_file_with_its_size_and_digest(committed: Path) -> None:
    manifest = verify(committed)
    assert manifest["step"] == 3 and manifest["shape"] == [2, 3]
    assert manifest["files"] == {
        "a.bin": {"bytes": 256, "sha256": "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"},
        "inner/b.txt": {"bytes": 4, "sha256": "f44e64e75f3948e9f73f8dfa94721c4ce8cbb4f265c4790c702b2d41cfbf2753"},
    }
    assert read_manifest(committed) == manifest


def test_nothing_committed(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    with pytest.raises(TornDirectory, match="was never committed"):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["a.bin", "inner/b.txt"])
def test_damage_to_a_file_is_named(committed: Path, name: str) -> None:
    path = committed / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(TornDirectory, match=f"{name} has {len(whole) - 1} bytes, its manifest says {len(whole)}"):
        verify(committed)
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(TornDirectory, match=f"{name} does not have the digest"):
        verify(committed)
    path.unlink()
    with pytest.raises(TornDirectory, match=f"{name} is missing"):
        verify(committed)


def test_no_byte_of_the_manifest_can_change_unnoticed(committed: Path) -> None:
    path = committed / MANIFEST
    whole = path.read_bytes()
    manifest = verify(committed)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(bytes(damaged))
        try:
            assert verify(committed) == manifest  # such as one kind of space for another
        except TornDirectory:
            continue
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TornDirectory):
            read_manifest(committed)


def test_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_durably(path, "old")

    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_durably(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_durably(path, json.dumps({"ä": 1}, ensure_ascii=False))
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}
