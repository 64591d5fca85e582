"""A node's copies: of the right content, fetched once for all processes, bounded, not taken from who uses them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import storages

from rayalign.errors import UserError
from rayalign.storage import cache as module
from rayalign.storage.cache import Cache, fetched, local_file, local_folder, node_cache, working
from rayalign.storage.manifest import MANIFEST, TornDirectory, commit, read_manifest, verify
from rayalign.storage.place import ObjectPath, Place, write_whole

server, objects, place = storages.server, storages.objects, storages.place
DATA = b"0123456789" * 100


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(module.ROOT_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def facts(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def folder(directory: Place, **files: bytes) -> Place:
    with working(directory) as local:
        (local / "inner").mkdir()
        for name, data in files.items():
            (local / "inner" / name).write_bytes(data)
        (local / "unfinished.tmp").write_bytes(b"never sent")
    (directory / "unfinished.tmp").unlink(missing_ok=True)
    commit(directory, {"step": 1})
    return directory


def test_a_file_of_a_disk_is_itself(tmp_path: Path, root: Path) -> None:
    with local_file(tmp_path / "x", size=1, sha256="any") as path:
        assert path == tmp_path / "x" and not root.exists()


def test_a_file_is_fetched_once_and_shared_by_its_content(objects: ObjectPath, root: Path) -> None:
    write_whole(objects / "a", DATA)
    with local_file(objects / "a", **facts(DATA)) as path:
        assert path.read_bytes() == DATA and path.parent == root
    (objects / "a").unlink()
    with local_file(objects / "copy", **facts(DATA)) as again:
        assert again == path


@pytest.mark.parametrize(
    ("data", "said"), [(None, "is missing"), (DATA[:-1], "has 999 bytes"), (DATA[:-1] + b"x", "does not have the dig")]
)
def test_another_file_is_refused_and_not_kept(objects: ObjectPath, root: Path, data: bytes | None, said: str) -> None:
    if data is not None:
        write_whole(objects / "a", data)
    with pytest.raises(TornDirectory, match=said), local_file(objects / "a", **facts(DATA)):
        pass
    assert [path.suffix for path in root.iterdir()] == [".lock"]


def test_a_folder_is_written_here_and_read_there(place: Place) -> None:
    directory = folder(place, a=b"alpha", b=DATA)
    manifest = verify(directory)
    assert {name: own["bytes"] for name, own in manifest["files"].items()} == {"inner/a": 5, "inner/b": 1000}
    with local_folder(directory) as local:
        assert verify(local) == manifest and (local / "inner" / "a").read_bytes() == b"alpha"
    assert fetched(directory) == local
    assert not [path.name for path in directory.glob("*") if path.name.startswith(".")]


def test_what_an_error_interrupts_is_not_sent(objects: ObjectPath, root: Path) -> None:
    with pytest.raises(KeyboardInterrupt), working(objects) as local:
        (local / "half").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(objects.glob("*")) and not list(root.iterdir())


def test_several_write_one_folder(objects: ObjectPath) -> None:
    """As the workers of a team write one checkpoint, each on a node of its own."""
    for rank in range(3):
        with working(objects) as local:
            (local / f"part-{rank}").write_bytes(bytes([rank]) * 10)
    write_whole(objects / "small", b"by a single PUT")
    commit(objects, {}, known={"part-0": {"bytes": 10, "sha256": hashlib.sha256(bytes(10)).hexdigest()}})
    with local_folder(objects) as local:
        assert sorted(verify(local)["files"]) == ["part-0", "part-1", "part-2", "small"]


def test_a_damaged_folder_is_refused(objects: ObjectPath) -> None:
    folder(objects, a=b"alpha")
    write_whole(objects / "inner" / "a", b"other")
    with pytest.raises(TornDirectory, match="inner/a does not have the digest"):
        fetched(objects)


def test_names_that_lead_outside_are_refused(objects: ObjectPath) -> None:
    write_whole(objects / "a", b"x")
    commit(objects, {})
    manifest = json.loads((objects / MANIFEST).read_bytes())
    manifest["files"] = {"../escaped": manifest["files"]["a"]}
    manifest["manifest_sha256"] = module_digest(manifest)
    write_whole(objects / MANIFEST, json.dumps(manifest).encode())
    with pytest.raises(TornDirectory, match="lies outside"):
        fetched(objects)


def module_digest(manifest: dict[str, Any]) -> str:
    said = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def test_what_was_used_longest_ago_goes_and_what_is_used_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "small", limit_bytes=250)

    def put(key: str) -> Path:
        with cache.held(key, 100, lambda path: path.write_bytes(b"x" * 100) and None) as path:
            return path

    def age(key: str, seconds: float) -> None:
        when = time.time() - seconds
        os.utime(cache.root / f"{key}.lock", (when, when))

    for key in "abc":
        put(key)
    assert sorted(path.name for path in cache.root.glob("?")) == ["a", "b", "c"]  # all were used a moment ago
    for number, key in enumerate("abc"):
        age(key, 10_000 - number)
    with cache.held("a", 100, lambda path: None):
        age("a", 20_000)
        put("d")
        assert sorted(path.name for path in cache.root.glob("?")) == ["a", "d"]
    put("e")
    assert sorted(path.name for path in cache.root.glob("?")) == ["d", "e"]
    put("f")
    assert sorted(path.name for path in cache.root.glob("?")) == ["d", "e", "f"]
    assert sorted(path.stem for path in cache.root.glob("*.lock")) == ["d", "e", "f"]


def test_remains_of_dead_processes_go_after_a_day(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=10)
    for name, age in ((".partial-old", 90_000), (".partial-new", 10)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    with cache.held("a", 1, lambda path: path.write_bytes(b"x") and None):
        assert [path.name for path in tmp_path.glob(".partial-*")] == [".partial-new"]


@pytest.mark.parametrize("limit", ["0", "-1", "much", "nan"])
def test_a_limit_that_is_none_is_refused(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.LIMIT_VARIABLE, limit)
    with pytest.raises(UserError, match="RAYALIGN_CACHE_GB: .*: write a number of gigabytes above 0"):
        node_cache()


READER = """
import sys, random
from pathlib import Path
from rayalign.storage.cache import Cache
cache = Cache(Path(sys.argv[1]), limit_bytes=3000)
fetched = 0
def fetch(key):
    def make(path):
        global fetched
        fetched += 1
        path.write_bytes(key.encode() * 1000)
    return make
random.seed(int(sys.argv[2]))
import rayalign.storage.cache as module
module.RECENT_SECONDS = 0.0
for _ in range(40):
    key = random.choice("abcdefgh")
    with cache.held(key, 1000, fetch(key)) as path:
        assert path.read_bytes() == key.encode() * 1000
print(fetched)
"""


def test_processes_of_a_node_share_it_while_it_evicts(tmp_path: Path) -> None:
    """Two processes read eight entries through a cache that holds three: no one ever reads a part or nothing."""
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(tmp_path), str(seed)], stdout=subprocess.PIPE)
        for seed in range(2)
    ]
    told = [reader.communicate(timeout=120)[0] for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * 2
    assert 8 <= sum(map(int, told)) <= 80


def test_threads_fetch_an_entry_once(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path, limit_bytes=10**6), []

    def fetch(path: Path) -> None:
        made.append(path)
        path.write_bytes(DATA)

    def read() -> None:
        with cache.held("key", len(DATA), fetch) as path:
            assert path.read_bytes() == DATA

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


SENDER = """
import sys
from rayalign.storage.cache import working
from rayalign.storage.manifest import commit, discard, read_manifest
from rayalign.storage.place import place_of
directory = place_of(sys.argv[1])
number = 0
while True:
    number += 1
    for _ in range(100):  # or there would hardly be a moment with a whole one
        read_manifest(directory)
    discard(directory)
    with working(directory) as local:
        for name in "abc":
            (local / name).write_text(f"{number:08d}" * 20_000)
    commit(directory, {"number": number})
    print("began", flush=True)
"""


@pytest.mark.slow
def test_a_sender_that_is_killed_leaves_a_whole_folder_or_none(objects: ObjectPath, root: Path) -> None:
    """At 10 moments of a loop of removing, sending and committing a folder: 0 torn ones count."""
    whole = 0
    for repeat in range(10):
        with subprocess.Popen([sys.executable, "-c", SENDER, str(objects)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"began\n"
            timer = threading.Timer(0.03 * repeat, process.kill)
            timer.start()
            process.wait()
            timer.join()
        manifest = read_manifest(objects)
        if manifest is None:
            continue
        whole += 1
        with local_folder(objects) as local:
            assert {(local / name).read_text() for name in "abc"} == {f"{manifest['number']:08d}" * 20_000}
    assert whole > 0
