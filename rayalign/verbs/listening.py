"""Who on this machine reaches Ray? Its listening sockets, and whether the processes behind them ask for a token.

Whoever reaches a port of Ray can run any code as its user. Read from /proc; Ray itself is not asked, nor imported.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rayalign.verbs.findings import Finding

PROCESSES = {
    "gcs_server": "GCS",
    "ray/dashboard/dashboard.py": "dashboard",
    "ray-dashboard-": "dashboard",
    "ray/dashboard/agent.py": "dashboard agent",
    "ray::DashboardAgent": "dashboard agent",
    "ray.util.client.server": "Ray Client",
    "runtime_env/agent/main.py": "runtime_env agent",
    "raylet/raylet": "raylet",
    "ray::": "worker",
}
"""A part of the command line → what listens; the first that fits."""
RENAMED = ("ray::", "ray-")
WELL_KNOWN = {6379: "GCS", 8265: "dashboard", 10001: "Ray Client"}
LISTEN = "0A"
FIX = (
    "start it again with RAY_AUTH_MODE=token (`ray get-auth-token --generate` makes the token) and "
    "--dashboard-host=127.0.0.1; reach the dashboard through `ssh -L` or `kubectl port-forward`"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A port that others reach. ``asks`` is None where the process behind it could not be looked at."""

    what: str
    address: str
    port: int
    asks: bool | None

    def __str__(self) -> str:
        return f"{self.what} at {f'[{self.address}]' if ':' in self.address else self.address}:{self.port}"


def check_ports(proc: Path = Path("/proc")) -> list[Finding]:
    """The findings about listening sockets of Ray; ``proc`` is where the kernel tells of them."""
    if not (proc / "net" / "tcp").exists():
        return [Finding(name="ports", state="note", found="not measured: this system has no /proc/net/tcp")]
    return judge_ports(list(ray_listeners(proc)))


def judge_ports(listeners: Sequence[Listener]) -> list[Finding]:
    """Open without a token is broken; open, and nobody knows, is a warning."""
    findings = []
    groups: tuple[tuple[bool | None, Literal["broken", "warning"], str, str], ...] = (
        (False, "broken", "without a token", FIX),
        (None, "warning", "owner not readable", f"if it is Ray: {FIX}"),
    )
    for asks, state, remark, fix in groups:
        alike = [listener for listener in listeners if listener.asks is asks]
        if alike:
            findings.append(Finding(name="ports", state=state, found=f"{summed_up(alike)}: {remark}", fix=fix))
    if not findings:
        with_token = len([listener for listener in listeners if listener.asks])
        found = (
            f"{with_token} open ports of Ray, all with a token" if with_token else "no port of Ray is open to others"
        )
        findings.append(Finding(name="ports", state="ok", found=found))
    return findings


def summed_up(listeners: Sequence[Listener]) -> str:
    """``GCS at [::]:6379, worker at 10.0.0.5:40001 and 3 more``: one of each kind, in the order of their names."""
    kinds: dict[str, list[str]] = {}
    for listener in sorted(listeners, key=lambda listener: (listener.what, listener.port)):
        kinds.setdefault(listener.what, []).append(str(listener))
    return ", ".join(first + (f" and {len(more)} more" if more else "") for first, *more in kinds.values())


def ray_listeners(proc: Path) -> Iterator[Listener]:
    """Sockets of Ray that listen on more than the loopback interface, and well-known ports whose owner is hidden."""
    open_to_others = {
        inode: (address, port)
        for table in ("tcp", "tcp6")
        for inode, address, port in listening(proc / "net" / table)
        if not ipaddress.ip_address(address).is_loopback
    }
    owners = owners_of(proc, set(open_to_others)) if open_to_others else {}
    for inode, (address, port) in open_to_others.items():
        owner = owners.get(inode)
        if owner is None:
            if port in WELL_KNOWN:
                yield Listener(what=f"{WELL_KNOWN[port]}?", address=address, port=port, asks=None)
            continue
        command = readable(owner / "cmdline")
        what = next((name for part, name in PROCESSES.items() if part in command), None)
        if what is not None:
            yield Listener(what=what, address=address, port=port, asks=asks_for_token(owner))


def asks_for_token(process: Path) -> bool | None:
    """Whether a process of Ray was started in token mode, which Ray hands on; None where its environment is hidden.

    A process that gave itself a title wrote it over a part of its environment: then its parent's says.
    """
    variables = dict(entry.partition("=")[::2] for entry in readable(process / "environ").split("\0"))
    mode = variables.get("RAY_AUTH_MODE")
    if mode is not None:
        return mode.lower() == "token"
    if readable(process / "cmdline").startswith(RENAMED):
        parent = parent_of(process)
        return None if parent is None else asks_for_token(parent)
    return False if any(variables) else None


def parent_of(process: Path) -> Path | None:
    """``/proc/<pid>/stat``: the parent's number is the second field after the name, which is in brackets."""
    fields = readable(process / "stat").rpartition(")")[2].split()
    return process.parent / fields[1] if len(fields) > 1 and fields[1] != "0" else None


def listening(table: Path) -> Iterator[tuple[str, str, int]]:
    """(inode, address, port) of every listening socket in a table of ``/proc/net``."""
    if not table.exists():
        return
    for line in table.read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == LISTEN:
            address, port = fields[1].split(":")
            yield fields[9], decoded(address), int(port, 16)


def decoded(address: str) -> str:
    """The kernel writes addresses as 32-bit words in the machine's byte order; IPv4 inside IPv6 is given as IPv4."""
    words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    parsed = ipaddress.IPv6Address(packed)
    return str(parsed.ipv4_mapped or parsed)


def owners_of(proc: Path, inodes: set[str]) -> dict[str, Path]:
    """inode → the folder of a process that has the socket, for the processes that this user may look at."""
    owners: dict[str, Path] = {}
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:  # another user's, or gone
            continue
        for link in links:
            socket_inode = re.fullmatch(r"socket:\[(\d+)\]", link)
            if socket_inode and socket_inode[1] in inodes:
                owners[socket_inode[1]] = process
    return owners


def readable(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""
