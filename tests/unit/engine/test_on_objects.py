"""A run on an object store: what its node had is lost, and another one continues it with the very same bits.

On a folder used as a store (``file://``) always, and on a real S3 server where ``RAYALIGN_MOTO_SERVER`` names one.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import storages
from tiny_runs import Scenario, objective, save_tiny, store, synthetic_groups, train_alone, train_spec

from rayalign.engine.checkpoint.checkpoint import step_of
from rayalign.engine.metrics import read_metrics
from rayalign.engine.state import TrainSpec, checkpointer_of
from rayalign.storage import cache
from rayalign.storage.cache import fetched
from rayalign.storage.manifest import MANIFEST, verify
from rayalign.storage.place import ObjectPath, Place, below, write_whole

STEPS = 6
server, objects = storages.server, storages.objects


class Lost(Exception):
    """The machine is gone."""


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``node(name)`` makes this process one of another node, whose cache is empty."""

    def enter(name: str) -> None:
        monkeypatch.setenv(cache.ROOT_VARIABLE, str(tmp_path / f"node-{name}"))

    enter("first")
    return enter


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    folder = tmp_path_factory.mktemp("objects")
    model = save_tiny(folder / "model")
    pairs = store(folder / "pairs", synthetic_groups([2] * 10), reference=model, groups_per_step=4)
    return Scenario(model=model, streams=(pairs,), objectives=(objective("dpo"),), steps=STEPS)


@pytest.fixture(scope="module")
def whole(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    spec = train_spec(tmp_path_factory.mktemp("whole") / "run", scenario)
    train_alone(spec, scenario)
    return spec


def lost_after(step: int) -> Any:
    def on_step(row: Mapping[str, Any]) -> None:
        if row["step"] == step:
            raise Lost

    return on_step


def on(directory: Place, scenario: Scenario, **changes: Any) -> TrainSpec:
    return replace(train_spec(Path("unused"), scenario, **changes), directory=directory)


def losses(spec: TrainSpec) -> list[float]:
    return [row["loss"] for row in read_metrics(spec.directory / "metrics.jsonl")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_lost_node_changes_no_bit(
    asynchronous: bool, objects: ObjectPath, scenario: Scenario, whole: TrainSpec, node: Any
) -> None:
    spec = on(objects / "run", scenario, checkpoint_asynchronous=asynchronous)
    with pytest.raises(Lost):
        train_alone(spec, scenario, on_step=lost_after(5))
    assert [row["step"] for row in read_metrics(spec.directory / "metrics.jsonl")][:4] == [1, 2, 3, 4]
    node("second")
    seen: list[int] = []
    final = train_alone(spec, scenario, on_step=lambda row: seen.append(row["step"]))
    assert seen == [5, 6] and final == spec.directory / "final"
    assert losses(spec) == losses(whole) and len(losses(whole)) == STEPS
    assert (final / "model.safetensors").read_bytes() == (whole.directory / "final/model.safetensors").read_bytes()
    node("third")
    verify(fetched(final))


def test_what_is_kept_is_what_a_disk_keeps(objects: ObjectPath, scenario: Scenario, whole: TrainSpec) -> None:
    spec = on(objects / "run", scenario)
    train_alone(spec, scenario)

    def content(directory: Place) -> set[str]:
        found: list[Place] = [path for path in directory.rglob("*") if path.is_file()]
        return {without_attempt(below(path, directory)) for path in found}

    assert content(spec.directory) == content(whole.directory)
    checkpoints = sorted(step_of(path) for path in (spec.directory / "checkpoints").iterdir())
    assert checkpoints == [4, 6]


def without_attempt(name: str) -> str:
    first, _, rest = name.partition("-a")
    return f"{first}{rest[rest.find('/') :]}" if rest else name


@pytest.mark.parametrize("damage", ["another byte", "a file less", "no manifest"])
def test_a_newest_checkpoint_that_is_not_whole_is_skipped(
    damage: str, objects: ObjectPath, scenario: Scenario, node: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spec = on(objects / "run", scenario, checkpoint_keep=9)
    train_alone(spec, scenario)
    (newest,) = (path for path in (spec.directory / "checkpoints").iterdir() if step_of(path) == STEPS)
    if damage == "another byte":
        content = bytearray((newest / "model.safetensors").read_bytes())
        content[len(content) // 2] ^= 4
        write_whole(newest / "model.safetensors", bytes(content))
    else:
        (newest / ("model.safetensors" if damage == "a file less" else MANIFEST)).unlink()
    node("second")
    found = checkpointer_of(spec, attempt="").newest()
    assert found is not None and found.step == 4
    assert "skipping a checkpoint that is not whole" in caplog.text


PROGRAM = """
import pickle, sys
from tiny_runs import train_alone
spec, scenario = pickle.load(open(sys.argv[1], "rb"))
train_alone(spec, scenario, on_step=lambda row: print(row["step"], flush=True))
"""
FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_loses_and_repeats_nothing(
    objects: ObjectPath, scenario: Scenario, whole: TrainSpec, tmp_path: Path
) -> None:
    """Ten kills after the second step of a start: while a checkpoint is written, sent and committed."""
    spec = on(objects / "run", scenario)
    job = tmp_path / "job"
    job.write_bytes(pickle.dumps((spec, scenario)))
    paths = os.pathsep.join([str(FIXTURES), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}

    def started(number: int) -> subprocess.Popen[str]:
        own = {**environment, cache.ROOT_VARIABLE: str(tmp_path / f"node-{number}")}
        command = [sys.executable, "-c", PROGRAM, str(job)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own)

    for number in range(10):
        with started(number) as process:
            assert process.stdout is not None
            for _ in range(2):
                process.stdout.readline()
            time.sleep(0.03 * number)  # which moment it is, is left to chance
            process.kill()
    with started(10) as last:
        _, told = last.communicate(timeout=300)
    assert last.returncode == 0, told
    assert losses(spec) == losses(whole)
    final = (spec.directory / "final" / "model.safetensors").read_bytes()
    assert final == (whole.directory / "final" / "model.safetensors").read_bytes()
