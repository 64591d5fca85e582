"""Stores on object storage: a sparse local copy whose records are fetched by byte ranges when they are asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import fsspec

from rayalign.data.shard import write_whole
from rayalign.storage.manifest import MANIFEST, TornDirectory, write_durably

INDEX_SUFFIX = ".index"
RECORD_SUFFIXES = (".tokens", ".columns")


def mirror(uri: str, cache_dir: Path) -> Path:
    """A local directory with the manifest and the indexes of the store (or columns) at ``uri``, and holes for records.

    It is named by the store's digest, so that the processes of a node share it. Raises TornDirectory where an index
    does not have the digest in the manifest.
    """
    system, root = fsspec.core.url_to_fs(uri)
    text = system.cat_file(f"{root}/{MANIFEST}").decode()
    manifest = json.loads(text)
    for name in (manifest["digest"], *manifest["files"]):
        if Path(name).name != name or name == "..":
            raise TornDirectory(f"{uri}/{MANIFEST} names {name!r}, which lies outside")
    directory: Path = cache_dir / manifest["digest"]
    if (directory / MANIFEST).exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, facts in manifest["files"].items():
        if name.endswith(INDEX_SUFFIX):
            data = system.cat_file(f"{root}/{name}")
            if hashlib.sha256(data).hexdigest() != facts["sha256"]:
                raise TornDirectory(f"{uri}/{name} does not have the digest in its manifest")
            write_whole(directory / name, data)
        elif name.endswith(RECORD_SUFFIXES):
            with (directory / name).open("ab"):
                os.truncate(directory / name, facts["bytes"])
    write_durably(directory / MANIFEST, text)
    return directory


def read_ranges(uri: str, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes of every (file, start, stop) below ``uri``; concurrent where the file system can."""
    if not ranges:
        return []
    system, root = fsspec.core.url_to_fs(uri)
    names, starts, stops = zip(*ranges, strict=True)
    paths = [f"{root}/{name}" for name in names]
    return [bytes(data) for data in system.cat_ranges(paths, list(starts), list(stops), on_error="raise")]
