"""A directory that is either whole or does not count: its manifest is the commit.

Every file is written and flushed first. Then ``MANIFEST.json`` appears, in one rename, or on an object store in one
PUT. It has the sizes and SHA-256 digests of the files, and a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from rayalign.storage.place import ObjectPath, Place, remove, sync_directory, write_whole

MANIFEST = "MANIFEST.json"
DOTTED = frozenset({".metadata"})
"""Names of content that begin with a dot: every distributed checkpoint of torch has one."""
SENT = ".sent-"
"""Begins the name of an object that holds :data:`FileFacts` of others, by those who sent them."""
FileFacts = Mapping[str, Any]
"""``bytes`` and ``sha256`` of a file."""


class TornDirectory(ValueError):
    """A committed directory misses a file, or a file is not what its manifest says."""


def file_digest(path: Place) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    if isinstance(path, ObjectPath):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(place: Place, text: str) -> None:
    """Write ``text`` so that ``place`` holds either its old content or all of the new one, whatever happens."""
    write_whole(place, text.encode("utf-8"))


def file_facts(path: Path) -> dict[str, Any]:
    """Flush a file; what a manifest says of it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def commit(
    directory: Place,
    facts: Mapping[str, Any],
    *,
    known: Mapping[str, FileFacts] | None = None,
    passing: Collection[str] = (),
) -> None:
    """Flush everything below ``directory`` and write its manifest: ``facts`` and the digests of the files.

    Args:
        known: sizes and digests of files that were flushed when they were written.
        passing: files that are about to be removed, and do not belong to the content.

    Raises:
        TornDirectory: an object has another size than its sender says.
    """
    if isinstance(directory, ObjectPath):
        files = facts_of_objects(directory, known or {}, passing)
    else:
        files = facts_of_files(directory, known or {}, passing)
    manifest = {**facts, "files": files}
    text = json.dumps({**manifest, "manifest_sha256": manifest_digest(manifest)}, indent=1, sort_keys=True)
    write_durably(directory / MANIFEST, text + "\n")
    if isinstance(directory, ObjectPath):
        for sent in directory.glob(f"{SENT}*"):
            sent.unlink(missing_ok=True)
    else:
        sync_directory(directory.parent)


def facts_of_files(directory: Path, known: Mapping[str, FileFacts], passing: Collection[str]) -> dict[str, FileFacts]:
    files: dict[str, FileFacts] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_dir():
            sync_directory(path)
        elif is_content(path) and name not in passing:
            files[name] = known[name] if name in known else file_facts(path)
    sync_directory(directory)
    return files


def facts_of_objects(
    directory: ObjectPath, known: Mapping[str, FileFacts], passing: Collection[str]
) -> dict[str, FileFacts]:
    """What their senders say of the objects; only an object without such words is read."""
    there = directory.objects()
    said: dict[str, FileFacts] = {}
    for name in sorted((name for name in there if name.startswith(SENT)), key=lambda name: there[name].st_mtime):
        said |= json.loads((directory / name).read_bytes())
    said |= known
    files: dict[str, FileFacts] = {}
    for name in sorted(there):
        if not is_content(PurePosixPath(name)) or name in passing:
            continue
        if name not in said:
            data = (directory / name).read_bytes()
            said[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files[name] = {key: said[name][key] for key in ("bytes", "sha256")}
        if files[name]["bytes"] != there[name].st_size:
            raise TornDirectory(f"{directory / name} has {there[name].st_size} bytes, not {files[name]['bytes']}")
    return files


def discard(directory: Place) -> None:
    """Remove a directory, its manifest first, so that what is left of it never counts; nothing where there is none."""
    (directory / MANIFEST).unlink(missing_ok=True)
    remove(directory)


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything that a manifest says, whatever its layout."""
    said = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def is_content(path: PurePath | ObjectPath) -> bool:
    """Files whose names begin with a dot are of the moment: leases, unfinished writes."""
    return path.name in DOTTED or (path.name != MANIFEST and not path.name.startswith("."))


def read_manifest(directory: Place) -> dict[str, Any] | None:
    """The manifest, or None where nothing was committed; raises :class:`TornDirectory` where it is damaged."""
    path = directory / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_manifest(text: bytes, path: object) -> dict[str, Any]:
    """What a manifest's ``text`` says; raises :class:`TornDirectory`, naming ``path``, where it is damaged."""
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise TornDirectory(f"{path} is not a whole manifest: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("manifest_sha256") != manifest_digest(manifest):
        raise TornDirectory(f"{path} is not what was written")
    return manifest


def committed(directory: Place) -> dict[str, Any]:
    """The manifest; raises :class:`TornDirectory` where nothing was committed."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise TornDirectory(f"{directory} was never committed (it has no {MANIFEST})")
    return manifest


def verify(directory: Place) -> dict[str, Any]:
    """The manifest of a whole directory; raises :class:`TornDirectory` naming what is missing or altered.

    On an object store sizes are compared; digests are when a file is fetched (:mod:`rayalign.storage.cache`).
    """
    manifest = committed(directory)
    there = directory.objects() if isinstance(directory, ObjectPath) else None
    for name, facts in manifest["files"].items():
        refuse_outside(name, directory / MANIFEST)
        path = directory / name
        if there is not None:
            size = there[name].st_size if name in there else None
        else:
            size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise TornDirectory(f"{path} is missing")
        if size != facts["bytes"]:
            raise TornDirectory(f"{path} has {size} bytes, its manifest says {facts['bytes']}")
        if isinstance(path, Path) and file_digest(path) != facts["sha256"]:
            raise TornDirectory(f"{path} does not have the digest in its manifest")
    return manifest


def refuse_outside(name: str, manifest: object) -> None:
    """Raise :class:`TornDirectory` for the name of a file that is not below the folder that names it."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise TornDirectory(f"{manifest} names {name!r}, which lies outside")
