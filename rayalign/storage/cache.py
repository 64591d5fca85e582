"""A node's own copies of what lies on an object store, and folders to write in before something is sent there.

A copy is named by the digest of its content, so it never is out of date. All processes of a node share it, and one of
them fetches it. What was used longest ago goes when there is no room. ``$RAYALIGN_CACHE`` is the folder,
``~/.cache/rayalign`` where that is not set, and ``$RAYALIGN_CACHE_GB`` bounds it. What lies on a disk is not copied.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rayalign.errors import UserError
from rayalign.paths import expanded
from rayalign.storage.disk import free_bytes, full_disk
from rayalign.storage.manifest import (
    MANIFEST,
    SENT,
    FileFacts,
    TornDirectory,
    committed,
    file_digest,
    is_content,
    refuse_outside,
    verify,
)
from rayalign.storage.place import ObjectPath, Place

ROOT_VARIABLE, LIMIT_VARIABLE = "RAYALIGN_CACHE", "RAYALIGN_CACHE_GB"
DEFAULT_ROOT, DEFAULT_GB = "~/.cache/rayalign", 100.0
RECENT_SECONDS = 600.0
"""What was used so recently stays, even where the cache is too large: it may be about to be opened."""
STALE_SECONDS = 86400.0
"""What a process that died has left is removed when it is so old."""
PARTIAL = ".partial-"
OF_THE_MOMENT = (".lease-", ".clock-", SENT, MANIFEST)
"""Begin the names of objects that belong to no content."""
TRANSFERS = 8
"""Files of one folder that are fetched or sent at a time."""


@dataclass(frozen=True, slots=True)
class Cache:
    """Copies below ``root``: ``<key>`` is a file or folder, ``<key>.lock`` says how large it is and who uses it."""

    root: Path
    limit_bytes: int

    @contextlib.contextmanager
    def held(self, key: str, size: int, fetch: Callable[[Path], None]) -> Iterator[Path]:
        """The copy ``key`` of ``size`` bytes, which stays while the block runs; ``fetch(path)`` makes it if needed.

        Raises:
            UserError: there is no room on this node's disk.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        while True:
            with self._lock(key).open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                if self._is_current(file, key) and (self.root / key).exists():
                    os.utime(self._lock(key))
                    yield self.root / key
                    return
            self._fill(key, size, fetch)

    def _fill(self, key: str, size: int, fetch: Callable[[Path], None]) -> None:
        with self._lock(key).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not self._is_current(file, key) or (self.root / key).exists():
                return
            self._make_room(size)
            partial = self.root / f"{PARTIAL}{uuid.uuid4().hex}"
            try:
                fetch(partial)
                file.truncate(0)
                file.write(str(size).encode())
                file.flush()
                os.replace(partial, self.root / key)
            except Exception as error:
                reason = full_disk(error)
                if reason is None:
                    raise
                raise UserError(
                    f"{self.root}: a copy of {size:,} bytes does not fit ({reason}; {free_bytes(self.root):,} are "
                    f"free): set {ROOT_VARIABLE} to a folder on a larger disk of this node, or {LIMIT_VARIABLE} lower"
                ) from error
            finally:
                remove_any(partial)

    def _make_room(self, wanted: int) -> None:
        """Remove what was used longest ago until ``wanted`` more bytes are within the limit, as far as that may go."""
        entries = sorted(self.root.glob("*.lock"), key=used)
        sizes = {lock: size_in(lock) for lock in entries}
        total = sum(sizes.values()) + wanted
        for lock in entries:
            if total <= self.limit_bytes or time.time() - used(lock) < RECENT_SECONDS:
                break
            if self._evict(lock):
                total -= sizes[lock]
        for path in self.root.glob(f"{PARTIAL}*"):
            if time.time() - used(path) > STALE_SECONDS:
                remove_any(path)

    def _evict(self, lock: Path) -> bool:
        """Whether a copy that no process uses was removed."""
        with contextlib.suppress(OSError), lock.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_current(file, lock.stem):
                remove_any(self.root / lock.stem)
                lock.unlink()
                return True
        return False

    def _lock(self, key: str) -> Path:
        return self.root / f"{key}.lock"

    def _is_current(self, file: BinaryIO, key: str) -> bool:
        """Whether the lock file that was opened is still the one of ``key``: eviction removes it."""
        try:
            return os.fstat(file.fileno()).st_ino == self._lock(key).stat().st_ino
        except FileNotFoundError:
            return False


def node_cache() -> Cache:
    """The cache of this node, as its environment says.

    Raises:
        UserError: the limit is no number above 0.
    """
    root = expanded(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT, field=ROOT_VARIABLE)
    text = os.environ.get(LIMIT_VARIABLE) or str(DEFAULT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise UserError(f"{LIMIT_VARIABLE}: {text}: write a number of gigabytes above 0")
    return Cache(root, int(limit * 1e9))


@contextlib.contextmanager
def local_file(place: Place, *, size: int, sha256: str) -> Iterator[Path]:
    """A file that this node's programs can open and map, of these bytes; it stays while the block runs.

    Raises:
        TornDirectory: it is missing, or another one.
    """
    if isinstance(place, Path):
        yield place
        return
    with node_cache().held(sha256, size, lambda target: fetch_file(place, target, size=size, sha256=sha256)) as path:
        yield path


@contextlib.contextmanager
def local_folder(directory: Place) -> Iterator[Path]:
    """A committed folder as this node's programs can read it; it stays while the block runs.

    Raises:
        TornDirectory: it was never committed, or is not what its manifest says.
    """
    if isinstance(directory, Path):
        yield directory
        return
    manifest = committed(directory)
    size = sum(int(facts["bytes"]) for facts in manifest["files"].values())
    with node_cache().held(
        manifest["manifest_sha256"], size, lambda target: fetch_folder(directory, manifest["files"], target)
    ) as path:
        yield path


def fetched(directory: Place) -> Path:
    """A committed folder as this node's programs can read it, for :data:`RECENT_SECONDS` at least."""
    with local_folder(directory) as path:
        return path


def whole(directory: Place) -> dict[str, Any]:
    """The manifest of a committed folder, every byte compared with its digests here, or when it was fetched.

    Raises:
        TornDirectory: it was never committed, or is not what its manifest says.
    """
    if isinstance(directory, Path):
        return verify(directory)
    with local_folder(directory) as path:
        return committed(path)


@contextlib.contextmanager
def working(directory: Place) -> Iterator[Path]:
    """A folder to write files of ``directory`` in: itself on a disk; else one of this node, sent when the block ends.

    What an exception interrupts is not sent. Files whose names end in ``.tmp`` never are.
    """
    if isinstance(directory, Path):
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    scratch = node_cache().root / f"{PARTIAL}{uuid.uuid4().hex}"
    scratch.mkdir(parents=True)
    try:
        yield scratch
        send_folder(scratch, directory)
    finally:
        remove_any(scratch)


@contextlib.contextmanager
def gathered(directory: Place, names: Iterable[str]) -> Iterator[Path]:
    """Files of ``directory`` in a folder of this node; what is written there besides is sent when the block ends.

    On a disk the folder is ``directory`` itself. ``names`` are fetched, and are not sent again unless they change.
    """
    if isinstance(directory, Path):
        yield directory
        return
    scratch = node_cache().root / f"{PARTIAL}{uuid.uuid4().hex}"
    scratch.mkdir(parents=True)

    def fetch(name: str) -> tuple[str, tuple[int, int]]:
        (directory / name).fetch(scratch / name)
        return name, written_as(scratch / name)

    try:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            before = dict(pool.map(fetch, names))
            yield scratch
            new = [path.name for path in scratch.iterdir() if before.get(path.name) != written_as(path)]
            list(pool.map(lambda name: (directory / name).send(scratch / name), new))
    finally:
        remove_any(scratch)


def written_as(path: Path) -> tuple[int, int]:
    """Differs once a file is written again."""
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns


def send_folder(source: Path, directory: ObjectPath) -> None:
    """Send the files of ``source``, and then what they are, which the commit of ``directory`` believes."""
    paths = [path for path in sorted(source.rglob("*")) if path.is_file() and path.suffix != ".tmp"]
    names = {path: path.relative_to(source).as_posix() for path in paths}

    def send(path: Path) -> FileFacts:
        (directory / names[path]).send(path)
        return {"bytes": path.stat().st_size, "sha256": file_digest(path)}

    with ThreadPoolExecutor(TRANSFERS) as pool:
        facts = dict(zip(names.values(), pool.map(send, paths), strict=True))
    content = {name: facts[name] for path, name in names.items() if is_content(path)}
    if content:
        (directory / f"{SENT}{uuid.uuid4().hex}").put(json.dumps(content).encode())


def fetch_folder(directory: ObjectPath, files: dict[str, FileFacts], target: Path) -> None:
    """Copy a committed folder, every file as its manifest says; raises :class:`TornDirectory` where one is not."""
    for name in files:
        refuse_outside(name, directory / MANIFEST)

    def fetch(name: str) -> None:
        size, sha256 = int(files[name]["bytes"]), str(files[name]["sha256"])
        fetch_file(directory / name, target / name, size=size, sha256=sha256)

    target.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(fetch, files))
    (directory / MANIFEST).fetch(target / MANIFEST)


def fetch_file(place: ObjectPath, target: Path, *, size: int, sha256: str) -> None:
    try:
        place.fetch(target)
    except FileNotFoundError as error:
        raise TornDirectory(f"{place} is missing") from error
    if target.stat().st_size != size:
        raise TornDirectory(f"{place} has {target.stat().st_size} bytes, its manifest says {size}")
    if file_digest(target) != sha256:
        raise TornDirectory(f"{place} does not have the digest in its manifest")


def used(path: Path) -> float:
    """When it was used last; 0 where it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def size_in(lock: Path) -> int:
    try:
        return int(lock.read_bytes() or 0)
    except (FileNotFoundError, ValueError):
        return 0


def remove_any(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
