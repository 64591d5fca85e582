"""Stages addressed by their content: what was made from equal inputs is made once.

A stage lives in ``artifacts/<stage>-<key>/`` and counts when its manifest is there. Its key is a digest of the stage's
name and version, the digests of its inputs and the part of the configuration that it reads. Versions of libraries are
recorded in the manifest, not hashed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rayalign.errors import UserError
from rayalign.storage.lease import PREFIX, lease
from rayalign.storage.manifest import MANIFEST, file_digest
from rayalign.storage.place import Place, StorageFailed, write_whole

STAGE_VERSIONS = {"rows": 1, "tokens": 4, "mismatched": 3, "reference": 1, "filter": 1, "rollouts": 4, "prepared": 1}
"""Raised by hand when a stage's output changes for equal inputs; a golden digest per stage reminds of it."""

PENDING = "\0pending:"
"""Begins what stands for a digest that is not known before a stage, or the ``initial`` run, is made."""
USED = ".used"
"""A file beside the manifest whose time says when the stage was last asked for."""


class Keeper(Protocol):
    """Who is asked for stages: :class:`Artifacts` makes them, :class:`rayalign.comparison.plan.Plan` lists them."""

    @property
    def root(self) -> Place:
        """The folder of all stages of one storage."""
        ...

    @property
    def note(self) -> Callable[[str], None]: ...

    @property
    def asked(self) -> list[Place]:
        """The folders of all stages that were asked for, in order, as often as they were."""
        ...

    def stage(self, name: str, inputs: Mapping[str, Any], build: Callable[[Place], None]) -> Place: ...

    def pending(self, directory: Place) -> str:
        """What stands for the digest of a stage that is not made yet; empty for one that is."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifacts:
    """The content-addressed folder of one storage path."""

    root: Place
    fresh: frozenset[str] = frozenset()
    """Stages that are made again, from nothing and once each, whatever is there."""
    note: Callable[[str], None] = print
    """Receives one line per stage: made, or found."""
    made: set[Place] = field(default_factory=set)
    """What this process has made."""
    asked: list[Place] = field(default_factory=list)

    def __post_init__(self) -> None:
        refuse_unknown(self.fresh)

    def stage(self, name: str, inputs: Mapping[str, Any], build: Callable[[Place], None]) -> Place:
        """The committed directory of stage ``name`` for ``inputs``; ``build(directory)`` makes it if needed.

        Two processes that want one stage share it: the second waits for the first's lease to end and finds the result.
        A directory that was begun and not committed is handed to ``build`` as it is, so that it can continue.
        """
        directory = self.root / f"{name}-{stage_key(name, inputs)}"
        self.asked.append(directory)
        if self._found(name, directory):
            return directory
        with lease(directory, wait=self.note):
            if self._found(name, directory):
                return directory
            if name in self.fresh:
                clear(directory)
            self.note(f"{name}: making {directory.name}")
            build(directory)
            self.made.add(directory)
        if not (directory / MANIFEST).exists():
            raise AssertionError(f"stage {name} ended without a commit in {directory}")
        return directory

    def pending(self, directory: Place) -> str:
        return ""

    def _found(self, name: str, directory: Place) -> bool:
        found = (directory / MANIFEST).exists() and (name not in self.fresh or directory in self.made)
        if found:
            self.note(f"{name}: found {directory.name}")
            with suppress(OSError, StorageFailed):  # a folder that may only be read serves as well
                write_whole(directory / USED, b"")
        return found


def refuse_unknown(fresh: frozenset[str]) -> None:
    """Raise UserError naming what ``--fresh`` calls a stage and is none."""
    unknown = sorted(fresh - STAGE_VERSIONS.keys())
    if unknown:
        raise UserError(f"--fresh {unknown[0]}: there is no such stage; there are {', '.join(STAGE_VERSIONS)}")


def clear(directory: Place) -> None:
    """Remove what a stage wrote, its manifest first, and what an interrupted one noted; the lease stays."""
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in directory.rglob("*"):
        if path.is_file() and not path.name.startswith(PREFIX):
            path.unlink()


def stage_key(name: str, inputs: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name a stage's result; ``inputs`` are plain JSON values."""
    text = json.dumps([name, STAGE_VERSIONS[name], inputs], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(value: Any) -> str:
    """SHA-256 of a plain JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def path_digest(path: Path) -> str:
    """Digest of a file, or of every file below a folder with its name."""
    if path.is_file():
        return file_digest(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest_of({str(file.relative_to(path)): file_digest(file) for file in files})
