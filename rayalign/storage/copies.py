"""Committed folders of a run on an object store: sent and fetched whole, their manifests last.

``<uri>/<run>/<name>/…`` has the files of the folder ``name`` below the run's own, its manifest last: that one PUT is
the commit there as the rename is here. What comes back is believed as little as what lies here: names stay inside the
folder, and digests are verified.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType

from rayalign.errors import UserError, first_line
from rayalign.storage.disk import room_for
from rayalign.storage.manifest import MANIFEST, TornDirectory, parsed, verify
from rayalign.storage.place import sync_directory

CHUNK_BYTES = 8 * 1024 * 1024


class MirrorFailed(UserError):
    """The object store did not do what was asked; everything that is committed here is whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """Where the copies of one run lie: plain values, so that they travel between processes.

    Credentials are no part of it: the environment of each process has them, as its provider's own tools want them.
    """

    uri: str
    """s3://, gs:// or file://; without user or key."""
    folder: str
    """The run's, below ``uri``."""

    def __str__(self) -> str:
        return f"{self.uri.partition('?')[0].rstrip('/')}/{self.folder}"


@dataclass(frozen=True, slots=True)
class Copies:
    """A mirror that is open. Names are paths below the run's folder, here and there."""

    files: Any
    root: str

    def sizes(self) -> dict[str, int]:
        """Bytes of every file there, by its name."""
        found = self.files.get_file_info(FileSelector(self.root, recursive=True, allow_not_found=True))
        return {
            PurePosixPath(info.path).relative_to(self.root).as_posix(): info.size
            for info in found
            if info.type == FileType.File
        }

    def has(self, name: str) -> bool:
        return bool(self.files.get_file_info(f"{self.root}/{name}").type == FileType.File)

    def send(self, source: Path, name: str) -> None:
        target = f"{self.root}/{name}"
        if self.files.type_name == "local":  # an object store has no folders
            self.files.create_dir(target.rpartition("/")[0], recursive=True)
        with source.open("rb") as file, self.files.open_output_stream(target) as stream:
            shutil.copyfileobj(file, stream, CHUNK_BYTES)

    def fetch(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.files.open_input_stream(f"{self.root}/{name}") as stream, target.open("wb") as file:
            shutil.copyfileobj(stream, file, CHUNK_BYTES)
            file.flush()
            os.fsync(file.fileno())

    def manifest_text(self, name: str) -> bytes | None:
        """What says that the copy of a folder is whole; None where it is not there."""
        try:
            with self.files.open_input_stream(f"{self.root}/{name}/{MANIFEST}") as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def manifest(self, name: str) -> tuple[bytes, dict[str, Any]]:
        """The same, and what it says; raises :class:`TornDirectory` where it is not there, or damaged."""
        text = self.manifest_text(name)
        if text is None:
            raise TornDirectory(f"{name} is missing")
        return text, parsed(text, name)

    def holds(self, directory: Path, name: str) -> bool:
        """Whether the copy ``name`` is that of what is committed in ``directory``."""
        return self.manifest_text(name) == (directory / MANIFEST).read_bytes()

    def send_folder(self, directory: Path, name: str) -> None:
        """Make ``name`` the copy of what is committed in ``directory``.

        Raises:
            TornDirectory: it is not whole here; nothing was sent.
        """
        files = verify(directory)["files"]
        self.withdraw(name)
        for file in files:
            self.send(directory / file, f"{name}/{file}")
        self.send(directory / MANIFEST, f"{name}/{MANIFEST}")

    def fetch_folder(self, name: str, target: Path, *, digest: str | None = None) -> None:
        """Fetch the copy ``name`` into ``target`` and verify it; ``digest`` is the one that its manifest must have.

        Raises:
            TornDirectory: it is not what its manifest says, or its manifest is another or names files elsewhere.
            DiskFull: there is no room for it here.
        """
        shutil.rmtree(target, ignore_errors=True)
        text, manifest = self.manifest(name)
        if digest is not None and manifest["manifest_sha256"] != digest:
            raise TornDirectory(f"{name} is not the one that was trained on")
        files = manifest["files"]
        for file in files:
            refuse_outside(file)
        with room_for(target, sum(int(facts["bytes"]) for facts in files.values())):
            for file in files:
                try:
                    self.fetch(f"{name}/{file}", target / file)
                except FileNotFoundError as error:
                    raise TornDirectory(f"{name}/{file} is missing") from error
            target.mkdir(parents=True, exist_ok=True)
            (target / MANIFEST).write_bytes(text)
        verify(target)

    def withdraw(self, name: str) -> None:
        """From here on the copy of a folder does not count."""
        if self.has(f"{name}/{MANIFEST}"):
            self.files.delete_file(f"{self.root}/{name}/{MANIFEST}")

    def remove(self, name: str) -> None:
        """A folder, its manifest first, so that what is left of it never counts."""
        self.withdraw(name)
        self.files.delete_dir(f"{self.root}/{name}")


@contextlib.contextmanager
def opened(mirror: Mirror) -> Iterator[Copies]:
    """The mirror's files; what the store says against it becomes a message.

    Raises:
        MirrorFailed: it does not answer, or refuses.
    """
    try:
        files, root = FileSystem.from_uri(mirror.uri)
        yield Copies(files, f"{root.rstrip('/')}/{mirror.folder}")
    except UserError:
        raise
    except (OSError, ArrowException) as error:
        raise MirrorFailed(
            f"checkpoint.mirror: {mirror}: {first_line(error)}. Check the address, and that this machine's environment "
            "has the credentials; what is committed in the workspace is whole, and the same command continues"
        ) from error


@contextlib.contextmanager
def arriving(place: Path) -> Iterator[Path]:
    """A folder beside ``place`` that takes its place once the block has ended well; else it goes."""
    partial = place.parent / f".fetching-{place.name}"
    try:
        yield partial
        shutil.rmtree(place, ignore_errors=True)
        os.replace(partial, place)
        sync_directory(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_outside(name: str) -> None:
    """Raise :class:`TornDirectory` for the name of a file that is not below the folder that names it."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise TornDirectory(f"its manifest names {name!r}, which is no file of it")
