"""Committed checkpoints also on an object store, so that a run goes on where its workspace is lost.

``<uri>/<run>/checkpoints/<name>/…`` has the files of each local checkpoint, its manifest last: that one PUT is the
commit there as the rename is here. ``metrics.jsonl`` goes before it, ``run.json`` when it changes. What comes back is
believed as little as what lies here: names stay inside the folder, digests are verified, another run's is refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType

from rayalign.engine.checkpoint import NAME, Checkpointer, IncompatibleCheckpoint, differences, manifest_of, step_of
from rayalign.engine.disk import room_for
from rayalign.errors import UserError, first_line
from rayalign.manifest import MANIFEST, TornDirectory, committed, sync_directory, verify

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
METRICS, RUN = "metrics.jsonl", "run.json"
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
    """A mirror that is open."""

    files: Any
    root: str

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of every checkpoint there, by its path below ``checkpoints/``."""
        base = f"{self.root}/{CHECKPOINTS}"
        found = self.files.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
        return {
            PurePosixPath(info.path).relative_to(base).as_posix(): info.size
            for info in found
            if info.type == FileType.File
        }

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

    def has(self, name: str) -> bool:
        return bool(self.files.get_file_info(f"{self.root}/{name}").type == FileType.File)

    def remove(self, name: str) -> None:
        """A checkpoint, its manifest first, so that what is left of it never counts."""
        folder = f"{self.root}/{CHECKPOINTS}/{name}"
        if self.has(f"{CHECKPOINTS}/{name}/{MANIFEST}"):
            self.files.delete_file(f"{folder}/{MANIFEST}")
        self.files.delete_dir(folder)


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
            "has the credentials; what is committed in the workspace is whole, and the same command goes on"
        ) from error


def upload(mirror: Mirror, directory: Path, *, step: int) -> None:
    """Bring the copies up to what is committed in a run's ``directory`` after ``step`` steps, the newest first.

    What an earlier call could not send is sent now, what is not whole here is not, and what retention has removed here
    goes there too; a copy beyond ``step`` stays as a local checkpoint does.

    Raises:
        MirrorFailed: not all of it could be sent.
    """
    found = {path.name: path for path in (directory / CHECKPOINTS).glob("step_*") if NAME.fullmatch(path.name)}
    local = {name: path for name, path in found.items() if manifest_of(path) is not None}
    with opened(mirror) as copies:
        there = copies.sizes()
        for name in sorted(local, key=lambda name: step_of(local[name]), reverse=True):
            manifest = local[name] / MANIFEST
            if there.get(f"{name}/{MANIFEST}") == manifest.stat().st_size:
                continue
            try:
                files = verify(local[name])["files"]
            except TornDirectory as damage:
                log.warning("not copied to %s, since it is not whole: %s", mirror, damage)
                continue
            for file in files:
                copies.send(local[name] / file, f"{CHECKPOINTS}/{name}/{file}")
            copies.send(directory / METRICS, METRICS)
            copies.send(manifest, f"{CHECKPOINTS}/{name}/{MANIFEST}")
        for name in {path.partition("/")[0] for path in there} - local.keys():
            if NAME.fullmatch(name) and step_of(Path(name)) <= step:
                copies.remove(name)


def upload_run(mirror: Mirror, directory: Path) -> None:
    """Send ``run.json``; where that fails it is only told, for the next one is sent soon."""
    try:
        with opened(mirror) as copies:
            copies.send(directory / RUN, RUN)
    except MirrorFailed as error:
        log.warning("%s", error)


def restore(mirror: Mirror, directory: Path, checkpointer: Checkpointer, *, note: Callable[[str], None]) -> Path | None:
    """Fetch what ``directory`` lacks of the copies, where they have a newer whole checkpoint; the newest one's place.

    With it come the rows of metrics before it, ``run.json`` where there is none here, and the older checkpoints that
    retention had left. The newest comes last, so that a call that was killed is made good by the next one. A copy that
    is not whole is skipped and told.

    Raises:
        MirrorFailed: the store does not answer.
        IncompatibleCheckpoint: a copy is another run's.
        DiskFull: there is no room for it here.
    """
    here = checkpointer.newest()
    have = here.step if here is not None else 0
    root, newest = directory / CHECKPOINTS, None
    with opened(mirror) as copies:
        there = [path.partition("/")[0] for path in copies.sizes() if path.endswith(f"/{MANIFEST}")]
        places = sorted((root / name for name in there if NAME.fullmatch(name)), key=step_of)
        refuse_others(mirror, copies, [place.name for place in places if manifest_of(place) is None], checkpointer)
        if not places or step_of(places[-1]) <= have:
            return None
        for place in places:
            if step_of(place) <= have and manifest_of(place) is not None:
                continue
            partial = root / f".fetching-{place.name}"
            try:
                fetch_checkpoint(mirror, copies, place.name, partial, checkpointer)
                if newest is None:
                    fetch_facts(copies, directory)
                shutil.rmtree(place, ignore_errors=True)
                os.replace(partial, place)
                sync_directory(root)
            except TornDirectory as damage:
                note(f"skipping a copy that is not whole: {mirror}/{CHECKPOINTS}/{place.name}: {damage}")
            else:
                newest = place
                note(f"fetched {place.name} from {mirror}")
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return newest


def fetch_facts(copies: Copies, directory: Path) -> None:
    """The rows of metrics, and ``run.json`` where there is none."""
    for name in (METRICS, *(() if (directory / RUN).exists() or not copies.has(RUN) else (RUN,))):
        partial = directory / f".fetching-{name}"
        copies.fetch(name, partial)
        os.replace(partial, directory / name)


def fetch_checkpoint(mirror: Mirror, copies: Copies, name: str, target: Path, checkpointer: Checkpointer) -> None:
    """Fetch a copy into ``target`` and verify it.

    Raises:
        TornDirectory: it is not what its manifest says, or its manifest names files elsewhere.
        IncompatibleCheckpoint: it is another run's.
    """
    shutil.rmtree(target, ignore_errors=True)
    copies.fetch(f"{CHECKPOINTS}/{name}/{MANIFEST}", target / MANIFEST)
    manifest = committed(target)
    refuse_other(mirror, name, manifest, checkpointer)
    files = manifest["files"]
    for file in files:
        refuse_outside(file)
    with room_for(target, sum(int(facts["bytes"]) for facts in files.values())):
        for file in files:
            try:
                copies.fetch(f"{CHECKPOINTS}/{name}/{file}", target / file)
            except FileNotFoundError as error:
                raise TornDirectory(f"{file} is missing") from error
    verify(target)


def refuse_others(mirror: Mirror, copies: Copies, names: Sequence[str], checkpointer: Checkpointer) -> None:
    """Raise :class:`IncompatibleCheckpoint` where one of ``names`` is another run's, which retention here would remove.

    A manifest that is not whole says nothing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            copies.fetch(f"{CHECKPOINTS}/{name}/{MANIFEST}", Path(scratch) / MANIFEST)
            with contextlib.suppress(TornDirectory):
                refuse_other(mirror, name, committed(Path(scratch)), checkpointer)


def refuse_other(mirror: Mirror, name: str, manifest: Mapping[str, Any], checkpointer: Checkpointer) -> None:
    """Raise :class:`IncompatibleCheckpoint` where a copy's ``manifest`` is another run's."""
    changed = differences(manifest["identity"], json.loads(json.dumps(dict(checkpointer.identity))))
    if changed:
        raise IncompatibleCheckpoint(
            f"{mirror}/{CHECKPOINTS}/{name} was written by another run: {'; '.join(changed)}. Give this run another "
            "name, or another checkpoint.mirror"
        )


def refuse_outside(name: str) -> None:
    """Raise :class:`TornDirectory` for the name of a file that is not below the folder that names it."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise TornDirectory(f"its manifest names {name!r}, which is no file of it")
