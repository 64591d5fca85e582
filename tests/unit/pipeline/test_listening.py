"""Which ports of Ray others reach, from the kernel's tables: real sockets, and processes of a made-up /proc."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from rayalign.verbs.listening import Listener, check_ports, decoded, judge_ports, listening, ray_listeners

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def kernels(address: str) -> str:
    """An address as this machine's kernel writes it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))


class Proc:
    """A folder that looks like /proc."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "net").mkdir(parents=True)
        for table in ("tcp", "tcp6"):
            (folder / "net" / table).write_text(HEADER)

    def socket(self, address: str, port: int, *, inode: int, state: str = "0A") -> None:
        with (self.folder / "net" / ("tcp6" if ":" in address else "tcp")).open("a") as table:
            row = f"{kernels(address)}:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 1000 0"
            table.write(f"   0: {row} {inode} 1 0 100 0 0 10 0\n")

    def process(self, pid: int, command: str, environment: str, *, inode: int | None = None, parent: int = 1) -> None:
        folder = self.folder / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "cmdline").write_text(command.replace(" ", "\0"))
        (folder / "environ").write_text(environment.replace(" ", "\0"))
        (folder / "stat").write_text(f"{pid} (a) name) S {parent} 0 0 0")
        if inode is not None:
            (folder / "fd" / "7").symlink_to(f"socket:[{inode}]")


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path / "proc")


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "10.1.2.3", "::", "::1", "fd00::1:2"])
def test_addresses(address: str) -> None:
    assert decoded(kernels(address)) == address


def test_ipv4_inside_ipv6() -> None:
    assert decoded(kernels("::ffff:127.0.0.1")) == "127.0.0.1"


def test_real_sockets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = {(address, port) for _, address, port in listening(Path("/proc/net/tcp"))}
        assert ("127.0.0.1", port) in found
        inode = os.readlink(f"/proc/self/fd/{server.fileno()}").removeprefix("socket:[").removesuffix("]")
        assert any(entry[0] == inode for entry in listening(Path("/proc/net/tcp")))
    assert ("127.0.0.1", port) not in {(address, port) for _, address, port in listening(Path("/proc/net/tcp"))}


def test_a_cluster_without_a_token_is_broken(proc: Proc) -> None:
    proc.socket("::", 6379, inode=11)
    proc.process(101, "/venv/ray/core/src/ray/gcs/gcs_server --port=6379", "HOME=/x", inode=11)
    proc.socket("0.0.0.0", 8265, inode=12)
    proc.process(102, "python /venv/ray/dashboard/dashboard.py --host=0.0.0.0", "RAY_AUTH_MODE=disabled", inode=12)
    proc.socket("0.0.0.0", 10001, inode=13)
    proc.process(103, "python -m ray.util.client.server --port=10001", "A=b", inode=13)
    (finding,) = check_ports(proc.folder)
    assert finding.state == "broken" and "RAY_AUTH_MODE=token" in finding.fix
    assert finding.found == (
        "GCS at [::]:6379, Ray Client at 0.0.0.0:10001, dashboard at 0.0.0.0:8265: without a token"
    )  # fmt: skip


def test_a_token_or_loopback_is_fine(proc: Proc) -> None:
    proc.socket("10.0.0.5", 6379, inode=11)
    proc.process(101, "gcs_server --port=6379", "HOME=/x RAY_AUTH_MODE=token", inode=11)
    proc.socket("127.0.0.1", 8265, inode=12)
    proc.process(102, "python ray/dashboard/dashboard.py", "A=b", inode=12)
    (finding,) = check_ports(proc.folder)
    assert (finding.state, finding.found) == ("ok", "1 open ports of Ray, all with a token")


def test_other_programs_and_connections_are_not_ray(proc: Proc) -> None:
    proc.socket("0.0.0.0", 80, inode=11)
    proc.process(101, "nginx", "A=b", inode=11)
    proc.socket("10.0.0.5", 6379, inode=12, state="01")
    proc.process(102, "gcs_server", "A=b", inode=12)
    (finding,) = check_ports(proc.folder)
    assert (finding.state, finding.found) == ("ok", "no port of Ray is open to others")


def test_a_known_port_of_a_hidden_process_is_a_warning(proc: Proc) -> None:
    proc.socket("0.0.0.0", 8265, inode=11)
    proc.socket("0.0.0.0", 9000, inode=12)
    (finding,) = check_ports(proc.folder)
    assert finding.state == "warning" and finding.found == "dashboard? at 0.0.0.0:8265: owner not readable"


@pytest.mark.parametrize(("mode", "asks"), [("RAY_AUTH_MODE=token", True), ("HOME=/x", False)])
def test_a_process_with_a_title_is_judged_by_its_parent(proc: Proc, mode: str, asks: bool) -> None:
    proc.process(100, "raylet/raylet", mode)
    proc.socket("0.0.0.0", 44275, inode=11)
    proc.process(101, "ray::DashboardAgent", "", inode=11, parent=100)
    assert list(ray_listeners(proc.folder)) == [
        Listener(what="dashboard agent", address="0.0.0.0", port=44275, asks=asks)
    ]


def test_without_proc(tmp_path: Path) -> None:
    (finding,) = check_ports(tmp_path)
    assert finding.state == "note" and "not measured" in finding.found


def test_many_ports_are_summed_up() -> None:
    seen = [Listener(what="worker", address="::", port=port, asks=False) for port in (9, 7, 8)]
    (finding,) = judge_ports([*seen, Listener(what="GCS", address="10.0.0.5", port=6379, asks=False)])
    assert finding.found == "GCS at 10.0.0.5:6379, worker at [::]:7 and 2 more: without a token"


def test_both_states_are_said() -> None:
    seen = [Listener(what="GCS", address="::", port=1, asks=asks) for asks in (True, False, None)]
    assert [finding.state for finding in judge_ports(seen)] == ["broken", "warning"]
