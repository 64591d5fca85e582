"""Which Ray is joined, what its processes inherit, and where results go. No Ray is started here."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from rayalign.errors import UserError
from rayalign.placement import Node
from rayalign.runtime.session import DEFAULTS, Session, connect, inherited_environment, running_cluster
from rayalign.storage.place import ObjectPath, place_of

NODE = Node(id="a", name="a", cpus=2, gpus=0)
HERE = Session(started_here=True, nodes=(NODE,))
CLUSTER = Session(started_here=False, nodes=(NODE,))


@pytest.mark.parametrize(
    ("named", "noted", "expected"),
    [
        ("10.0.0.1:6379", "10.0.0.2:6379", "10.0.0.1:6379"),
        ("auto", None, "auto"),
        ("local", "10.0.0.2:6379", None),
        (None, None, None),
    ],
)
def test_running_cluster(
    named: str | None, noted: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if named is not None:
        monkeypatch.setenv("RAY_ADDRESS", named)
    if noted is not None:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(noted)
    assert running_cluster() == expected


def test_a_cluster_of_this_machine_is_joined_while_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was killed leaves its note behind; Ray would wait minutes for it."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as living:
        address = f"127.0.0.1:{living.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert running_cluster() == address
    assert running_cluster() is None


def test_environment_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "7")
    monkeypatch.setenv("PYTHONPATH", "mine")
    before = dict(os.environ)
    with inherited_environment([tmp_path]):
        assert os.environ["PYTHONPATH"] == f"{tmp_path}{os.pathsep}mine"
        assert os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] == "7"
        assert os.environ.keys() >= DEFAULTS.keys()
    assert dict(os.environ) == before


def test_relative_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYALIGN_STORAGE", raising=False)
    assert HERE.storage("runs") == tmp_path / "runs"
    with pytest.raises(UserError, match="runs is relative, .* set RAYALIGN_STORAGE to one"):
        CLUSTER.storage("runs")
    monkeypatch.setenv("RAYALIGN_STORAGE", str(tmp_path / "shared"))
    assert CLUSTER.storage("runs") == tmp_path / "shared" / "runs"
    assert CLUSTER.storage(str(tmp_path / "absolute")) == tmp_path / "absolute"


def test_storage_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/runs cannot be made: Not a directory"):
        HERE.storage(str(tmp_path / "file" / "runs"))
    with pytest.raises(UserError, match="storage_path: ftp://host/runs: no ftp:// is known here"):
        HERE.storage("ftp://host/runs")


def test_an_object_store_is_tried_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"file://{tmp_path}/runs"
    assert CLUSTER.storage(address) == place_of(address)
    assert not list((tmp_path / "runs").iterdir())
    monkeypatch.setattr(ObjectPath, "create", lambda self, data: True)
    with pytest.raises(UserError, match="creates an object that exists .it ignores If-None-Match"):
        CLUSTER.storage(address)


@pytest.mark.parametrize(("place", "told"), [("x" * 120, "AF_UNIX path length"), ("file", "Not a directory")])
def test_ray_cannot_keep_its_files_there(
    place: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / place))
    with pytest.raises(UserError, match=f"Ray cannot keep its files below {tmp_path / place} .*{told}.*set RAY_TMPDIR"):
        connect().__enter__()


@pytest.mark.parametrize("started_here", [True, False])
def test_storage_of_an_unknown_user(started_here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    session = HERE if started_here else CLUSTER
    with pytest.raises(UserError, match="storage_path: ~nobody-here/runs leads nowhere"):
        session.place("~nobody-here/runs")
    monkeypatch.setenv("RAYALIGN_STORAGE", "~nobody-here")
    with pytest.raises(UserError, match="RAYALIGN_STORAGE: ~nobody-here leads nowhere"):
        CLUSTER.place("runs")
