"""A run whose workspace is lost goes on from its copies, which are believed only as far as their digests hold.

On a folder (``file://``) always, and on a real S3 server where ``RAYALIGN_MOTO_SERVER`` names one (``make test-s3``).
"""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mirrors
import pytest
from mirrors import Lost, There, found_again, lost_after
from s3_server import KEYS
from tiny_runs import Scenario, objective, same_optimizer, save_tiny, store, synthetic_groups, train_alone, train_spec

from rayalign.config.training import BestConfig
from rayalign.engine.checkpoint.checkpoint import IncompatibleCheckpoint, step_of
from rayalign.engine.checkpoint.mirror import upload
from rayalign.engine.metrics import read_metrics
from rayalign.engine.state import TrainSpec
from rayalign.storage.copies import Mirror, MirrorFailed, refuse_outside
from rayalign.storage.disk import DiskFull
from rayalign.storage.manifest import MANIFEST, TornDirectory, manifest_digest, verify

STEPS = 6
mirror, server = mirrors.mirror, mirrors.server


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    folder = tmp_path_factory.mktemp("mirror")
    model = save_tiny(folder / "model")
    pairs = store(folder / "pairs", synthetic_groups([2] * 10), reference=model, groups_per_step=4)
    return Scenario(model=model, streams=(pairs,), objectives=(objective("dpo"),), steps=STEPS)


@pytest.fixture(scope="module")
def whole(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    spec = train_spec(tmp_path_factory.mktemp("whole") / "run", scenario)
    train_alone(spec, scenario)
    return spec


def mirrored(directory: Path, scenario: Scenario, mirror: Mirror, **changes: Any) -> TrainSpec:
    return train_spec(directory, scenario, mirror=mirror, **changes)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_lost_workspace_changes_no_bit(
    asynchronous: bool, mirror: Mirror, scenario: Scenario, whole: TrainSpec, tmp_path: Path
) -> None:
    spec = mirrored(tmp_path / "first", scenario, mirror, checkpoint_asynchronous=asynchronous)
    with pytest.raises(Lost):
        train_alone(spec, scenario, on_step=lost_after(5))
    shutil.rmtree(spec.directory)
    again = replace(spec, directory=tmp_path / "elsewhere" / "run")
    place, notes = found_again(again)
    assert place is not None and step_of(place) == 4 and notes[-1] == f"fetched {place.name} from {mirror}"
    verify(place)
    assert sorted(step_of(path) for path in place.parent.iterdir()) == [2, 4] and len(notes) == 2
    assert [row["step"] for row in read_metrics(again.directory / "metrics.jsonl")][:4] == [1, 2, 3, 4]
    seen: list[int] = []
    train_alone(again, scenario, on_step=lambda row: seen.append(row["step"]))
    assert seen == [5, 6]
    curves = [[row["loss"] for row in read_metrics(run.directory / "metrics.jsonl")] for run in (again, whole)]
    assert curves[0] == curves[1] and len(curves[0]) == STEPS
    final = [run.directory / "final" / "model.safetensors" for run in (again, whole)]
    assert final[0].read_bytes() == final[1].read_bytes()
    last = [max((run.directory / "checkpoints").iterdir(), key=step_of) for run in (again, whole)]
    assert same_optimizer(*last)


def test_copies_are_those_that_are_kept_here(mirror: Mirror, scenario: Scenario, tmp_path: Path) -> None:
    """Two are kept, byte for byte, with the rows up to the last; nothing of the others is left."""
    spec = mirrored(tmp_path / "run", scenario, mirror)
    train_alone(spec, scenario)
    there = There(mirror)
    local = [path for path in (spec.directory / "checkpoints").rglob("*") if path.is_file()]
    expected = {path.relative_to(spec.directory).as_posix(): path.read_bytes() for path in local}
    expected["metrics.jsonl"] = (spec.directory / "metrics.jsonl").read_bytes()
    assert there.checkpoints() == [4, 6]
    assert {name: there.read(name) for name in there.names()} == expected
    assert any(name.endswith("trainer/.metadata") for name in expected)


def test_what_was_fetched_by_half_is_fetched_again(mirror: Mirror, scenario: Scenario, tmp_path: Path) -> None:
    """Killed after the older one came: the newer one is still to come, and the rows with it."""
    spec = mirrored(tmp_path / "run", scenario, mirror)
    train_alone(spec, scenario)
    again = replace(spec, directory=tmp_path / "again")
    place, _ = found_again(again)
    assert place is not None
    shutil.rmtree(place)
    (again.directory / "metrics.jsonl").write_bytes(b"")
    remains = again.directory / "checkpoints" / f".fetching-{place.name}"
    remains.mkdir()
    (remains / "model.safetensors").write_bytes(b"half")
    assert found_again(again)[0] == place and verify(place)["step"] == STEPS and not remains.exists()
    rows = [read_metrics(run.directory / "metrics.jsonl") for run in (again, spec)]
    assert rows[0] == rows[1]


def test_nothing_is_fetched_where_the_workspace_is_as_new(mirror: Mirror, scenario: Scenario, tmp_path: Path) -> None:
    spec = mirrored(tmp_path / "run", scenario, mirror)
    train_alone(spec, scenario)
    before = {path: path.stat().st_mtime_ns for path in spec.directory.rglob("*")}
    assert found_again(spec) == (None, [])
    assert {path: path.stat().st_mtime_ns for path in spec.directory.rglob("*")} == before


def test_a_damaged_copy_is_skipped_and_one_that_was_not_committed_is_not_seen(
    mirror: Mirror, scenario: Scenario, tmp_path: Path
) -> None:
    spec = mirrored(tmp_path / "run", scenario, mirror, checkpoint_keep=9)
    train_alone(spec, scenario)
    there = There(mirror)
    weights = there.of(6, "model.safetensors")
    content = bytearray(there.read(weights))
    content[len(content) // 2] ^= 4
    there.write(weights, bytes(content))
    there.files.delete_file(f"{there.root}/{there.of(4, MANIFEST)}")
    again = replace(spec, directory=tmp_path / "again")
    place, notes = found_again(again)
    assert place is not None and step_of(place) == 2
    assert notes[-1].startswith("skipping a copy that is not whole: ") and "does not have the digest" in notes[-1]
    assert [path.name for path in (again.directory / "checkpoints").iterdir()] == [place.name]


def test_a_missing_file_of_a_copy(mirror: Mirror, scenario: Scenario, tmp_path: Path) -> None:
    spec = mirrored(tmp_path / "run", scenario, mirror)
    train_alone(spec, scenario)
    there = There(mirror)
    there.files.delete_file(f"{there.root}/{there.of(6, '.metadata')}")
    place, notes = found_again(replace(spec, directory=tmp_path / "again"))
    assert place is not None and step_of(place) == 4 and "trainer/.metadata is missing" in notes[-1]


def test_a_damaged_checkpoint_here_is_replaced_by_its_copy(mirror: Mirror, scenario: Scenario, tmp_path: Path) -> None:
    spec = mirrored(tmp_path / "run", scenario, mirror)
    train_alone(spec, scenario)
    newest = max((spec.directory / "checkpoints").iterdir(), key=step_of)
    (newest / "model.safetensors").unlink()
    place, _ = found_again(spec)
    assert place == newest and verify(newest)["step"] == STEPS


def test_another_runs_copy_is_refused(mirror: Mirror, scenario: Scenario, tmp_path: Path) -> None:
    spec = mirrored(tmp_path / "run", scenario, mirror)
    train_alone(spec, scenario)
    identity = {**spec.identity, "data": "d2"}
    other = replace(spec, directory=tmp_path / "again", identity=identity)
    with pytest.raises(
        IncompatibleCheckpoint, match='written by another run: data: "d1" there, "d2" here.*another checkpoint'
    ):
        found_again(other)
    assert not list((other.directory / "checkpoints").glob("step_*"))


def test_another_runs_copies_are_refused_where_the_workspace_is_newer(
    mirror: Mirror, scenario: Scenario, tmp_path: Path
) -> None:
    """Nothing is to be fetched, and retention would remove what it does not know."""
    spec = mirrored(tmp_path / "run", scenario, mirror)
    with pytest.raises(Lost):
        train_alone(spec, scenario, on_step=lost_after(5))
    other = train_spec(tmp_path / "other", scenario, identity={**spec.identity, "data": "d2"})
    train_alone(other, scenario)
    with pytest.raises(IncompatibleCheckpoint, match='data: "d1" there, "d2" here.*another checkpoint'):
        found_again(replace(other, mirror=mirror))
    assert There(mirror).checkpoints() == [2, 4]


def test_what_is_not_whole_here_is_not_copied(
    mirror: Mirror, scenario: Scenario, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mirror that is new to a run whose newest checkpoint was damaged: the rest is copied, and the run goes on."""
    spec = train_spec(tmp_path / "run", scenario, checkpoint_keep=9)
    train_alone(spec, scenario)
    for step, damage in ((4, b"other weights"), (6, None)):
        (found,) = (spec.directory / "checkpoints").glob(f"step_{step:06d}-*")
        (found / "model.safetensors").unlink()
        if damage is not None:
            (found / "model.safetensors").write_bytes(damage)
    upload(mirror, spec.directory, step=2)
    assert There(mirror).checkpoints() == [2]
    told = [record.getMessage() for record in caplog.records if "not copied" in record.getMessage()]
    assert ["is missing" in told[0], "has 13 bytes" in told[1]] == [True, True]


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "trainer/../../escaped", "..", "a\\..\\b", ""])
def test_names_that_lead_outside_are_refused(name: str) -> None:
    with pytest.raises(TornDirectory, match="no file of it"):
        refuse_outside(name)


def test_a_copy_that_names_files_outside_writes_none(mirror: Mirror, scenario: Scenario, tmp_path: Path) -> None:
    """Its digests are right: whoever may write there made them."""
    spec = mirrored(tmp_path / "run", scenario, mirror, checkpoint_keep=1)
    train_alone(spec, scenario)
    there = There(mirror)
    name = there.of(6, MANIFEST)
    manifest = json.loads(there.read(name))
    manifest["files"]["../../../escaped"] = {"bytes": 1, "sha256": "0" * 64}
    del manifest["manifest_sha256"]
    there.write(name, json.dumps({**manifest, "manifest_sha256": manifest_digest(manifest)}).encode())
    place, notes = found_again(replace(spec, directory=tmp_path / "again" / "run"))
    assert place is None and "'../../../escaped', which is no file of it" in notes[0]
    assert not list(tmp_path.rglob("escaped"))


def test_a_store_that_fails_costs_copies_and_no_step(
    mirror: Mirror, scenario: Scenario, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps 2 and 4 are not copied, which is told; step 6 ends the run with the reason; the next command sends it."""
    nowhere = Mirror(uri="s3://bucket/x?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:9", folder="run")
    if mirror.uri.startswith("file"):
        blocked = tmp_path / "a-file"
        blocked.write_text("")
        nowhere = Mirror(uri=f"file://{blocked}/copies", folder="run")
    spec = mirrored(tmp_path / "run", scenario, nowhere)
    with pytest.raises(MirrorFailed, match=r"^checkpoint\.mirror: (s3|file)://.*/run: .*Check the address"):
        train_alone(spec, scenario)
    assert [f"step {step} is not mirrored" in caplog.text for step in (2, 4, 6)] == [True, True, False]
    assert "endpoint_override" not in caplog.text
    later = replace(spec, mirror=mirror)
    upload(mirror, later.directory, step=STEPS)
    train_alone(later, scenario)
    assert There(mirror).checkpoints() == [4, 6] and (later.directory / "final" / MANIFEST).exists()


def test_no_key_is_in_what_is_written(mirror: Mirror, scenario: Scenario, tmp_path: Path) -> None:
    spec = mirrored(tmp_path / "run", scenario, mirror)
    train_alone(spec, scenario)
    there = There(mirror)
    written = [path.read_bytes() for path in spec.directory.rglob("*") if path.is_file()]
    for content in [*written, *(there.read(name) for name in there.names()), str(mirror).encode()]:
        assert not any(value.encode() in content for name, value in KEYS.items() if name.startswith("AWS_SECRET"))


def test_the_best_checkpoint_is_named_again(mirror: Mirror, scenario: Scenario, tmp_path: Path) -> None:
    best = BestConfig(metric="loss", mode="min")
    spec = mirrored(tmp_path / "run", scenario, mirror, checkpoint_best=best)
    train_alone(spec, scenario)
    again = replace(spec, directory=tmp_path / "again")
    found_again(again)
    told = [(run.directory / "checkpoints" / "best.json").read_bytes() for run in (again, spec)]
    assert told[0] == told[1]


def test_a_disk_that_is_too_full_for_the_rows_is_said_to_be(mirror: Mirror, scenario: Scenario, tmp_path: Path) -> None:
    """Of a process that may write files of at most 5 MB, into which all but the rows fit."""
    spec = mirrored(tmp_path / "run", scenario, mirror)
    train_alone(spec, scenario)
    There(mirror).write("metrics.jsonl", b"x" * 6_000_000)
    again = replace(spec, directory=tmp_path / "again")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, hard))
    try:
        with pytest.raises(DiskFull, match=r"metrics\.jsonl could not be written .*wants about 6,000,000 bytes"):
            found_again(again)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(again.directory.rglob("step_*")) and not list(again.directory.rglob(".fetching-*"))
    assert found_again(again)[0] is not None
