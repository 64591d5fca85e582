"""The few operations that disks and object stores have in common, on a folder used as a store and on a real S3."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import storages
from s3_server import BUCKET
from storages import Faulty

from rayalign.errors import MissingExtra, UserError
from rayalign.storage import place as module
from rayalign.storage.artifacts import clear
from rayalign.storage.lease import claims, lease
from rayalign.storage.manifest import MANIFEST, TornDirectory, commit, discard, read_manifest, verify, write_durably
from rayalign.storage.place import ObjectPath, Place, StorageFailed, create, place_of, remove, write_whole

server, objects, place, faulty = storages.server, storages.objects, storages.place, storages.faulty


def test_what_is_written_is_read_and_listed(place: Place) -> None:
    assert not place.exists() and not list(place.glob("*"))
    for name in ("b", "a", "inner/c.json", "inner/d.txt", "inner/deep/e.json"):
        write_whole(place / name, name.encode())
    write_whole(place / "a", b"anders")
    assert (place / "a").read_text() == "anders" and (place / "inner" / "c.json").read_bytes() == b"inner/c.json"
    assert sorted(path.name for path in place.iterdir()) == ["a", "b", "inner"]
    assert sorted(path.name for path in place.glob("inner/*.json")) == ["c.json"]
    assert sorted(str(path.relative_to(place)) for path in place.rglob("*.json")) == [
        "inner/c.json",
        "inner/deep/e.json",
    ]
    assert (place.is_dir(), place.is_file()) == (True, False)
    assert ((place / "a").is_dir(), (place / "a").is_file()) == (False, True)
    assert not (place / "none").exists() and not (place / "a" / "none").exists()
    assert (place / "a").stat().st_size == 6
    (place / "a").unlink()
    (place / "a").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (place / "a").read_bytes()
    remove(place)
    assert not place.exists()
    remove(place)


def test_names_are_those_of_paths(objects: ObjectPath) -> None:
    deep = objects / "one" / "two.tar.gz"
    path = Path(deep.path)
    assert (deep.name, deep.stem, deep.suffix) == (path.name, path.stem, path.suffix)
    assert (deep.parent, deep.with_name("x")) == (objects / "one", objects / "one/x")
    assert str(deep.relative_to(objects)) == "one/two.tar.gz" and place_of(str(deep)) == deep
    assert pickle.loads(pickle.dumps(deep)) == deep and sorted([deep, objects]) == [objects, deep]


def test_of_many_creators_one_succeeds(place: Place) -> None:
    barrier, made = threading.Barrier(8), []

    def work(number: int) -> None:
        barrier.wait()
        if create(place / "claim", f"{number}".encode()):
            made.append(number)

    workers = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(made) == 1 and (place / "claim").read_text() == str(made[0])


def test_a_commit_is_the_last_object(place: Place) -> None:
    write_whole(place / "a.bin", bytes(range(256)))
    write_whole(place / "inner" / "b.txt", b"beta")
    write_whole(place / ".moment", b"of the moment")
    assert read_manifest(place) is None
    with pytest.raises(TornDirectory, match="was never committed"):
        verify(place)
    commit(place, {"step": 3})
    assert verify(place)["files"] == {
        "a.bin": {"bytes": 256, "sha256": "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"},
        "inner/b.txt": {"bytes": 4, "sha256": "f44e64e75f3948e9f73f8dfa94721c4ce8cbb4f265c4790c702b2d41cfbf2753"},
    }
    write_whole(place / "a.bin", b"short")
    with pytest.raises(TornDirectory, match="a.bin has 5 bytes, its manifest says 256"):
        verify(place)
    (place / "a.bin").unlink()
    with pytest.raises(TornDirectory, match="a.bin is missing"):
        verify(place)
    discard(place)
    assert read_manifest(place) is None and not list(place.glob("*"))


def test_of_two_commits_of_one_name_one_is_whole(place: Place) -> None:
    """Two writers that ignore the lease: each manifest is one of them, never a mixture."""
    write_whole(place / "a", b"content")
    writers = [threading.Thread(target=commit, args=[place, {"writer": number}]) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    manifest = read_manifest(place)
    assert manifest is not None and manifest["writer"] in range(4)


def test_leases_hold_on_a_store(objects: ObjectPath) -> None:
    with lease(objects):
        (claim,) = claims(objects)
        assert json.loads(claim.read_bytes())["pid"] == os.getpid()
    assert not list(objects.glob("*"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s4://bucket/x", "no s4:// is known here"),
        ("s3://", "give the whole address, such as s3://bucket/runs"),
        ("s3:///runs", "give the whole address, such as s3://bucket/runs"),
        ("file://runs", "give the whole address, such as file:///mnt/bucket/runs"),
        ("s3://bucket/../other", "give the whole address"),
        ("s3://key:secret@bucket/runs", "name bucket and prefix only; the environment has keys and endpoint"),
        ("s3://bucket/runs?endpoint_override=x", "name bucket and prefix only"),
    ],
)
def test_other_addresses_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^storage_path: .*{said}") as raised:
        place_of(text, field="storage_path")
    assert "secret" not in str(raised.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"s3fs is not installed; run: pip install 'rayalign\[s3\]'"):
        place_of("s3://bucket/runs")
    assert place_of("runs") == Path("runs")


# What a real store does beside its work.


def test_a_store_that_is_slow_is_asked_again_with_a_message(
    faulty: type[Faulty], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    place = place_of(f"s3://{BUCKET}/{tmp_path.name}/slow")
    faulty.failures = 12
    with caplog.at_level(logging.WARNING):
        write_whole(place, b"content")
    assert place.read_bytes() == b"content"
    assert "SlowDown" in caplog.text or "reduce your request rate" in caplog.text
    assert "asking again in" in caplog.text


def test_who_created_a_claim_knows_it_though_the_answer_was_lost(faulty: type[Faulty], tmp_path: Path) -> None:
    place = place_of(f"s3://{BUCKET}/{tmp_path.name}/claim")
    faulty.lose_answers = 1
    assert create(place, b"mine")
    assert not create(place, b"theirs") and place.read_bytes() == b"mine"


def test_a_store_that_does_not_answer_is_an_error(
    faulty: type[Faulty], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    faulty.failures = 10**6
    with pytest.raises(StorageFailed, match="Check the address, the network, and that this machine's environment"):
        write_whole(place_of(f"s3://{BUCKET}/{tmp_path.name}/none"), b"content")


def test_a_bucket_that_is_not_there_is_named(server: str | None) -> None:
    if server is None:
        pytest.skip("needs a server: make test-s3")
    with pytest.raises(StorageFailed, match="s3://no-such-bucket/x: .*Make the bucket, or name another one"):
        write_whole(place_of("s3://no-such-bucket/x"), b"content")


WRITER = """
import os, sys
from rayalign.storage.place import place_of, write_whole
place = place_of(sys.argv[1])
number = 0
while True:
    number += 1
    write_whole(place, (f"{number:08d}" * 50_000).encode())
    print("began", flush=True)
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_old_or_new_content(objects: ObjectPath) -> None:
    """At 10 moments of a loop of writes of 400 kB."""
    target = objects / "content"
    for repeat in range(10):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"began\n"
            timer = threading.Timer(0.02 * repeat, process.kill)
            timer.start()
            process.wait()
            timer.join()
        content = target.read_text()
        assert len(content) == 400_000 and content == content[:8] * 50_000
    write_durably(target, "after")
    assert target.read_text() == "after" and (objects / MANIFEST).exists() is False


def test_a_stage_that_is_made_again_begins_with_nothing_but_its_lease(tmp_path: Path) -> None:
    for name in ("MANIFEST.json", "a.tokens", ".000000.report.json", ".units.json", ".used", ".lease-000001"):
        (tmp_path / name).write_text("x")
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lease-000001"]
