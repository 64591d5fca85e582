"""Does this machine do what runs rely on? Storage, disk, shared memory, limits, clocks. Measured apart from judged."""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rayalign.errors import first_line
from rayalign.storage.manifest import write_durably
from rayalign.storage.place import sync_directory
from rayalign.verbs.findings import Finding, State

GIB = 1 << 30
FEW_FILES, ENOUGH_FILES = 1024, 8192
"""Ray warns below 4,096 descriptors and recommends 8,192."""
OBJECT_STORE_SHARE = 0.3
"""Share of the memory that Ray wants in /dev/shm; where that is smaller, it writes to the disk instead."""
SKEW_SECONDS = 1.0

Operation = tuple[str, Callable[[Path], None]]


class Misbehaves(OSError):
    """A file system did something else than it said."""


def replaces(folder: Path) -> None:
    """A file is written, flushed and renamed over another, with its folder flushed."""
    write_durably(folder / "file", "first")
    write_durably(folder / "file", "second")
    if (folder / "file").read_text() != "second":
        raise Misbehaves("a renamed file does not have the new content")


def renames_folder(folder: Path) -> None:
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "file").write_text("whole")
    (folder / "unfinished").rename(folder / "finished")
    sync_directory(folder)
    if (folder / "finished" / "file").read_text() != "whole":
        raise Misbehaves("a renamed folder lost its content")


def creates_once(folder: Path) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    os.close(os.open(folder / "lease", flags))
    try:
        os.close(os.open(folder / "lease", flags))
    except FileExistsError:
        return
    raise Misbehaves("O_EXCL created a file that was there: two processes would hold one lease")


def touches(folder: Path) -> None:
    path = folder / "touched"
    path.touch()
    os.utime(path, (1e9, 1e9))
    if path.stat().st_mtime != 1e9:
        raise Misbehaves("the time of a file cannot be set: leases would not be renewed")


def appends(folder: Path) -> None:
    path = folder / "appended"
    for line in ("one\n", "two\n"):
        with path.open("a") as file:
            file.write(line)
    with path.open("r+b") as file:
        file.truncate(4)
    if path.read_text() != "one\n":
        raise Misbehaves("appending to a file and cutting it gave something else")


def maps(folder: Path) -> None:
    path = folder / "mapped"
    path.write_bytes(b"tokens")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if mapped[:] != b"tokens":
            raise Misbehaves("a mapped file reads as something else")


OPERATIONS: tuple[Operation, ...] = (
    ("write, fsync and rename a file", replaces),
    ("rename a folder", renames_folder),
    ("create a file exclusively", creates_once),
    ("set a file's time", touches),
    ("append and truncate", appends),
    ("map a file into memory", maps),
)


def check_storage(folder: Path, operations: Sequence[Operation] = OPERATIONS) -> Finding:
    """Do what a run does, in a folder of its own that is removed again, inside ``folder`` or what will hold it."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    probe = existing / f".doctor-{uuid.uuid4().hex}"
    doing = "write"
    try:
        probe.mkdir()
        for name, operation in operations:
            doing = name
            operation(probe)
    except OSError as error:
        return Finding(
            name="storage",
            state="broken",
            found=f"{folder}: cannot {doing}: {first_line(error)}",
            fix="name a local disk or an NFS share (EFS, Filestore) that this user may write to in storage_path; "
            "a bucket mounted as a folder can do less",
        )
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    return Finding(name="storage", state="ok", found=f"{folder}: {'; '.join(name for name, _ in operations)}")


def check_disk(folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return judge_disk(folder, shutil.disk_usage(existing).free)


def judge_disk(folder: Path, free: int) -> Finding:
    state: State = "broken" if free < GIB else "warning" if free < 20 * GIB else "ok"
    fix = "free space, lower checkpoint.keep, or name another storage_path; a checkpoint has 12 bytes per parameter"
    return Finding(name="disk", state=state, found=f"{free / GIB:,.1f} GiB free at {folder}", fix=fix * (state != "ok"))


def check_shared_memory() -> Finding:
    try:
        system = os.statvfs("/dev/shm")
    except OSError:
        return Finding(name="/dev/shm", state="note", found="there is none; Ray writes its objects to the disk")
    return judge_shared_memory(system.f_frsize * system.f_blocks, total_memory())


def total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def judge_shared_memory(size: int, memory: int) -> Finding:
    wanted = int(OBJECT_STORE_SHARE * memory)
    found = f"{size / GIB:,.1f} GiB"
    if size >= wanted:
        return Finding(name="/dev/shm", state="ok", found=found)
    return Finding(
        name="/dev/shm",
        state="warning",
        found=f"{found}, Ray wants {wanted / GIB:,.1f} for its objects and would use the disk",
        fix=f"docker run --shm-size={wanted // GIB + 1}g; on Kubernetes an emptyDir of medium Memory at /dev/shm",
    )


def check_limits() -> Finding:
    return judge_limits(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def judge_limits(hard: int) -> Finding:
    """``hard`` is the limit of open files up to which Ray raises the soft one by itself; -1 is none."""
    if hard == resource.RLIM_INFINITY or hard >= ENOUGH_FILES:
        found = "open files without limit" if hard == resource.RLIM_INFINITY else f"{hard:,} open files"
        return Finding(name="ulimits", state="ok", found=found)
    return Finding(
        name="ulimits",
        state="broken" if hard < FEW_FILES else "warning",
        found=f"{hard:,} open files",
        fix=f"ulimit -Hn {ENOUGH_FILES} before Ray starts; docker run --ulimit nofile=65536:65536",
    )


def judge_clocks(offsets: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """``offsets``: node → (its clock minus this one's, uncertainty), seconds. Nothing to measure is said, too."""
    if not offsets:
        yield Finding(name="clocks", state="note", found="not measured: there is no other node")
        return
    wrong = {node: both for node, both in offsets.items() if abs(both[0]) - both[1] > SKEW_SECONDS}
    for node, (offset, _) in wrong.items():
        fix = "let chrony or systemd-timesyncd set the clocks of all nodes"
        yield Finding(name="clocks", state="warning", found=f"{node} is {offset:+.1f} s off", fix=fix)
    if not wrong:
        node, (offset, uncertainty) = max(offsets.items(), key=lambda item: abs(item[1][0]))
        found = f"{len(offsets)} other nodes, at most {offset:+.3f} ± {uncertainty:.3f} s ({node})"
        yield Finding(name="clocks", state="ok", found=found)
