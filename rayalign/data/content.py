"""What identifies the content of a file, for the keys of what is made from it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rayalign.data.files import file_system_options, open_binary
from rayalign.errors import UserError, first_line
from rayalign.storage.manifest import file_digest

CHUNK_BYTES = 1 << 20
_AT_COMMIT = re.compile(r"hf://datasets/[^@]+@[0-9a-f]{40}/")
FACTS: Final = (
    "ETag", "etag", "e_tag", "md5Hash", "md5", "Content-MD5", "content_md5", "Digest", "checksum", "sha256", "blob_id",
    "generation", "version_id", "VersionId", "LastModified", "Last-Modified", "last_modified", "mtime", "modified",
    "updated", "created",
)  # fmt: skip
"""What file systems say of a file that changes when it is written again."""


def content_key(path: str) -> str:
    """A local file's digest; of a remote one what its server says: entity tag, checksum, or time, and size.

    A file of the Hub at a commit is its address. Where a server says nothing of the kind, the file is read.
    """
    if _AT_COMMIT.match(path):
        return path
    if "://" not in path:
        return _local_digest(path)
    try:
        system, inside = fsspec.core.url_to_fs(path, **file_system_options(path))
        if isinstance(system, LocalFileSystem):
            return _local_digest(inside)
        system.invalidate_cache()
        info: Mapping[str, Any] = system.info(inside)
    except Exception as error:  # whatever the library of this kind of address raises
        raise UserError(f"{path}: cannot be read: {first_line(error.__cause__ or error)}") from error
    facts = {name: str(info[name]) for name in FACTS if info.get(name) is not None}
    return _digest([without_query(path), info.get("size"), facts]) if facts else _read_digest(path)


def _local_digest(path: str) -> str:
    try:
        return file_digest(Path(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def without_query(path: str) -> str:
    """An address without its query, which may be signed."""
    return path.partition("?")[0]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_digest(path: str) -> str:
    digest = hashlib.sha256()
    with open_binary(path) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
