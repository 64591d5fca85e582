"""A directory that is either whole or does not count: its manifest is the commit.

Every file is written and flushed first; then ``MANIFEST.json`` with their sizes and SHA-256 digests, and a digest of
itself, appears in one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
DOTTED = frozenset({".metadata"})
"""Names of content that begin with a dot: every distributed checkpoint of torch has one."""


class TornDirectory(ValueError):
    """A committed directory misses a file, or a file is not what its manifest says."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either its old content or all of the new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(directory: Path, facts: Mapping[str, Any]) -> None:
    """Flush everything below ``directory`` and write its manifest: ``facts`` and the digests of the files."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            sync_directory(path)
        elif is_content(path):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    manifest = {**facts, "files": files}
    text = json.dumps({**manifest, "manifest_sha256": manifest_digest(manifest)}, indent=1, sort_keys=True)
    write_durably(directory / MANIFEST, text + "\n")
    sync_directory(directory.parent)


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything that a manifest says, whatever its layout."""
    said = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def is_content(path: Path) -> bool:
    """Files whose names begin with a dot are of the moment: leases, unfinished writes."""
    return path.name in DOTTED or (path.name != MANIFEST and not path.name.startswith("."))


def read_manifest(directory: Path) -> dict[str, Any] | None:
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


def committed(directory: Path) -> dict[str, Any]:
    """The manifest; raises :class:`TornDirectory` where nothing was committed."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise TornDirectory(f"{directory} was never committed (it has no {MANIFEST})")
    return manifest


def verify(directory: Path) -> dict[str, Any]:
    """The manifest of a whole directory; raises :class:`TornDirectory` naming what is missing or altered."""
    manifest = committed(directory)
    for name, facts in manifest["files"].items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise TornDirectory(f"{directory / MANIFEST} names {name!r}, which lies outside")
        if not path.is_file():
            raise TornDirectory(f"{path} is missing")
        if path.stat().st_size != facts["bytes"]:
            raise TornDirectory(f"{path} has {path.stat().st_size} bytes, its manifest says {facts['bytes']}")
        if file_digest(path) != facts["sha256"]:
            raise TornDirectory(f"{path} does not have the digest in its manifest")
    return manifest
