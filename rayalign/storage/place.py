"""Where durable things lie: a folder of a file system, or a prefix of an object store.

A :data:`Place` is a ``pathlib.Path``, or an :class:`ObjectPath` that has the same few methods. An object store has no
folders, no rename and no append. An object appears whole with one PUT, which is the commit there as the rename is on a
disk. ``file://`` names a folder that is used just so, such as a bucket that is mounted.

Nothing is cached: what another process wrote is seen at once. A store that answers slowly, or asks to be asked less,
is asked again, with a message.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib.util
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import fsspec

from rayalign.errors import MissingExtra, UserError, first_line
from rayalign.paths import expanded

log = logging.getLogger(__name__)
T = TypeVar("T")

EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "file": ("fsspec", "")}
"""By scheme: the package that speaks to it, and the extra that installs that package."""
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"use_listings_cache": False, "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 1}}},
    "gs": {"use_listings_cache": False},
    "file": {},
}
"""No listing is remembered. What fails is asked again here, where that is logged, and not by botocore."""
RETRY_SECONDS = 120.0
"""For so long a store may fail before that is an error."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, ValueError)
"""Answers that stay the same however often one asks."""


class StorageFailed(UserError):
    """The object store did not do what was asked; what is committed there is whole."""


class Facts(NamedTuple):
    """The part of ``os.stat_result`` that an object has too."""

    st_size: int
    st_mtime: float
    """Seconds since the epoch, by the store's own clock."""


@dataclass(frozen=True, slots=True, order=True)
class ObjectPath:
    """An object, or the prefix of several, with the methods of ``pathlib.Path`` of the same names.

    It travels between processes as its address. Credentials are no part of it: each process finds them as its
    provider's own tools do, in the environment.
    """

    scheme: str
    path: str
    """Bucket and key, or a folder's path; without a slash at the end."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str | PurePosixPath) -> ObjectPath:
        return ObjectPath(self.scheme, str(PurePosixPath(self.path) / name))

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.scheme, str(PurePosixPath(self.path).parent))

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    def relative_to(self, other: ObjectPath) -> PurePosixPath:
        return PurePosixPath(self.path).relative_to(other.path)

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> Facts:
        """Raises FileNotFoundError where there is no such object."""
        found = self._info()
        if found is None:
            raise FileNotFoundError(str(self))
        return facts_of(found)

    def read_bytes(self) -> bytes:
        return bytes(self._ask("cat_file", self.path))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        """A store does not say whether there was such an object."""
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm_file", self.path)

    def iterdir(self) -> Iterator[ObjectPath]:
        """What lies directly below; nothing where nothing does."""
        return (ObjectPath(self.scheme, path) for path in self._names())

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """What lies below and has such a name; ``*`` stands for anything but a slash."""
        first, _, rest = pattern.partition("/")
        for place in self.iterdir():
            if fnmatch.fnmatchcase(place.name, first):
                yield from place.glob(rest) if rest else (place,)

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects below at any depth that have such a name."""
        return (self / name for name in self.objects() if fnmatch.fnmatchcase(PurePosixPath(name).name, pattern))

    def objects(self) -> dict[str, Facts]:
        """Every object below, by its name from here."""
        try:
            found = self._ask("find", self.path, detail=True)
        except FileNotFoundError:
            return {}
        return {
            self._own(path).removeprefix(f"{self.path}/"): facts_of(info)
            for path, info in found.items()
            if self._own(path) != self.path
        }

    def put(self, data: bytes) -> None:
        """Make this object hold ``data``: all of it, or what it held before."""
        if self.scheme == "file":
            replace_file(Path(self.path), data)
        else:
            self._write("pipe_file", self.path, data)

    def create(self, data: bytes) -> bool:
        """Make this object hold ``data`` unless it exists; of several that try, one succeeds.

        ``data`` differs from what others would write: after a lost answer it says which of them created the object.
        """
        if self.scheme == "file":
            return create_file(Path(self.path), data)
        try:
            self._write("pipe_file", self.path, data, mode="create")
        except FileExistsError:
            return self.read_bytes() == data
        return True

    def send(self, source: Path) -> None:
        """Make this object hold what the file ``source`` holds."""
        if self.scheme == "file":
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            partial = temporary_of(Path(self.path))
            shutil.copyfile(source, partial)
            os.replace(partial, self.path)
        else:
            self._write("put_file", str(source), self.path)

    def fetch(self, target: Path) -> None:
        """Copy the object into the file ``target``; raises FileNotFoundError where there is none."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._ask("get_file", self.path, str(target))

    def remove(self) -> None:
        """Remove all objects below, and this one."""
        for name in self.objects():
            (self / name).unlink(missing_ok=True)
        if self.scheme == "file":
            shutil.rmtree(self.path, ignore_errors=True)

    def _names(self) -> list[str]:
        try:
            return sorted(self._own(path) for path in self._ask("ls", self.path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _info(self) -> dict[str, Any] | None:
        try:
            return dict(self._ask("info", self.path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _write(self, what: str, *arguments: Any, **options: Any) -> None:
        try:
            self._ask(what, *arguments, **options)
        except FileNotFoundError as error:
            raise StorageFailed(f"{self}: {first_line(error)}. Make the bucket, or name another one") from error

    def _own(self, path: str) -> str:
        """An address as the store's library lists it, as this class writes it."""
        return path.rstrip("/")

    def _ask(self, what: str, *arguments: Any, **options: Any) -> Any:
        return asked(lambda: getattr(file_system(self.scheme), what)(*arguments, **options), self)


Place = Path | ObjectPath
"""Where something durable lies."""


def place_of(text: str | Path | ObjectPath, *, field: str = "path") -> Place:
    """What an address names: a folder by its path, or a prefix by ``s3://``, ``gs://`` or ``file://``.

    Raises:
        UserError: another scheme, an address without a bucket, or credentials in it; ``field`` is the setting.
        MissingExtra: the package that speaks to the store is not installed.
    """
    if isinstance(text, ObjectPath):
        return text
    scheme, mark, rest = str(text).partition("://")
    if not mark:
        return expanded(text, field=field)
    if scheme not in EXTRAS:
        raise UserError(f"{field}: {text}: no {scheme}:// is known here; name a folder, s3://, gs:// or file://")
    path = rest.rstrip("/")
    if any(mark in path for mark in "?@#"):
        raise UserError(f"{field}: {scheme}://…: name bucket and prefix only; the environment has keys and endpoint")
    if not path or ".." in PurePosixPath(path).parts or (scheme == "file") != path.startswith("/"):
        example = "file:///mnt/bucket/runs" if scheme == "file" else f"{scheme}://bucket/runs"
        raise UserError(f"{field}: {text}: give the whole address, such as {example}")
    package, extra = EXTRAS[scheme]
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(package, extra)
    return ObjectPath(scheme, path)


def refuse_unwritable(place: ObjectPath) -> None:
    """Raise UserError where an object store does not take what is written to ``place``, or not exclusively."""
    probe = place / f".probe-{uuid.uuid4().hex}"
    created = [probe.create(b"first"), probe.create(b"second")]
    probe.unlink()
    if created != [True, False]:
        raise UserError(
            f"storage_path: {place}: this store creates an object that exists (it ignores If-None-Match), so that two "
            "processes could hold one lease: use a store that honours conditional writes"
        )


@functools.cache
def file_system(scheme: str) -> Any:
    """The library that speaks to the stores of a scheme; one for all threads of this process."""
    return fsspec.filesystem(scheme, **OPTIONS[scheme])


def asked(question: Callable[[], T], place: object) -> T:
    """What a store answers to ``question``; where it fails for the moment it is asked again, with a message.

    Raises:
        StorageFailed: it failed for :data:`RETRY_SECONDS`.
        OSError: an answer that stays the same, such as FileNotFoundError.
    """
    began, pause = time.monotonic(), FIRST_PAUSE
    while True:
        try:
            return question()
        except FINAL:
            raise
        except Exception as error:
            if isinstance(error, PermissionError) or is_final(error) or time.monotonic() - began > RETRY_SECONDS:
                raise StorageFailed(
                    f"{place}: {first_line(error)}. Check the address, the network, and that this machine's "
                    "environment has the credentials; what is committed is whole, and the same command continues"
                ) from error
            log.warning("%s: %s; asking again in %.1f s", place, first_line(error), pause)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def is_final(error: Exception) -> bool:
    """Whether a store's own library says that it has nothing to ask with."""
    return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "RefreshError", "GoogleAuthError")


def facts_of(info: dict[str, Any]) -> Facts:
    changed = next((info[key] for key in ("LastModified", "mtime", "updated", "created") if info.get(key)), 0.0)
    if isinstance(changed, str):
        changed = datetime.fromisoformat(changed)
    return Facts(int(info.get("size") or 0), changed.timestamp() if isinstance(changed, datetime) else float(changed))


def listed(place: Place, pattern: str) -> list[Place]:
    """What lies below and has such a name, in the order of the names."""
    found: list[Place] = [*place.glob(pattern)]
    return sorted(found, key=str)


def below(place: Place, folder: Place) -> str:
    """The name of ``place`` from ``folder`` on, which it lies below."""
    return PurePosixPath(str(place)).relative_to(PurePosixPath(str(folder))).as_posix()


def write_whole(place: Place, data: bytes) -> None:
    """Write so that ``place`` holds either its old content or all of the new one, whatever happens.

    Several processes may write one place: each brings a whole file of its own.
    """
    if isinstance(place, ObjectPath):
        place.put(data)
    else:
        replace_file(place, data)


def create(place: Place, data: bytes) -> bool:
    """Write ``data`` to a place that does not exist; False where it does. Of several that try, one succeeds."""
    return place.create(data) if isinstance(place, ObjectPath) else create_file(place, data)


def remove(place: Place) -> None:
    """Remove a folder with all that lies below; nothing where there is none."""
    if isinstance(place, ObjectPath):
        place.remove()
    else:
        shutil.rmtree(place, ignore_errors=True)


def replace_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_of(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def create_file(path: Path, data: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return True


def temporary_of(path: Path) -> Path:
    """A name beside ``path`` that no other process uses, and that no manifest takes for content."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
