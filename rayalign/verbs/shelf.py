"""``rayalign artifacts``: what lies in the folder of stages, which runs use it, and what is unused."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from rayalign.errors import UserError
from rayalign.report.status import read_run_json, runs
from rayalign.storage.artifacts import STAGE_VERSIONS, USED
from rayalign.storage.lease import PREFIX, Held, forget, holder_in_words, lease
from rayalign.storage.manifest import MANIFEST, discard
from rayalign.storage.place import Facts, ObjectPath, Place, below, listed

FOLDER = "artifacts"
STAGE = re.compile(rf"({'|'.join(STAGE_VERSIONS)})-[0-9a-f]{{16}}")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One stage's folder; without a manifest it is what an attempt left that did not end."""

    directory: Place
    committed: bool
    num_bytes: int
    created: float
    used: float
    """When it was last asked for, or last written to; seconds since the epoch, as ``created``."""
    users: Mapping[str, str]
    """Run → its status, of the runs whose ``run.json`` names the stage."""

    @property
    def wanted_by(self) -> list[str]:
        """Runs that may still resume: all that are not finished."""
        return [f"{name} ({status})" for name, status in self.users.items() if status != "finished"]


def ls(storage: Place, console: Console) -> None:
    """Print every stage of a storage path.

    Raises:
        UserError: there is no such folder.
    """
    folder = artifacts_folder(storage)
    table = Table(title=str(folder))
    for column in ("stage", "key", "bytes", "created", "last used", "used by"):
        table.add_column(column, no_wrap=column == "key")
    found = list(artifacts(folder))
    for item in found:
        stage, _, key = item.directory.name.partition("-")
        first, *others = item.users or [""]
        users = f"{first} and {len(others)} more" if others else first
        table.add_row(
            stage,
            key,
            decimal(item.num_bytes),
            date_of(item.created),
            date_of(item.used),
            users or unused_stage_state(item),
        )
    console.print(table)
    console.print(
        f"{len(found)} stages, {decimal(sum(item.num_bytes for item in found))}", highlight=False, soft_wrap=True
    )


def gc(storage: Place, *, unused_for: str, dry_run: bool, console: Console) -> None:
    """Remove the stages that no run has asked for in ``unused_for``, and what dead attempts left in that time.

    What is being written stays, and what a run wants that is not finished; its ``run.json`` says so.

    Raises:
        UserError: there is no such folder, or ``unused_for`` is no time.
    """
    folder, oldest = artifacts_folder(storage), time.time() - parse_duration(unused_for)
    found = list(artifacts(folder))
    removed = []
    for item in found:
        if item.used > oldest:
            continue
        kept = ", ".join(item.wanted_by) or holder_in_words(item.directory)
        if kept or not (dry_run or remove_stage(item.directory, oldest)):
            console.print(f"kept {item.directory.name}: {kept or 'it is used again'}", highlight=False, soft_wrap=True)
            continue
        removed.append(item)
        word = "would remove" if dry_run else "removed"
        facts = (
            f"{decimal(item.num_bytes)}, last used {date_of(item.used)}{'' if item.committed else ', never finished'}"
        )
        console.print(f"{word} {item.directory.name}: {facts}", highlight=False, soft_wrap=True)
    word = "would be removed" if dry_run else "removed"
    total = decimal(sum(item.num_bytes for item in removed))
    console.print(f"{len(removed)} of {len(found)} stages {word}: {total}", highlight=False, soft_wrap=True)


def artifacts_folder(storage: Place) -> Place:
    """The folder of stages of a storage path, which may be given itself.

    Raises:
        UserError: there is none, or what is there was not made by stages.
    """
    folder = storage if storage.name == FOLDER else storage / FOLDER
    entries: list[Place] = [*folder.iterdir()] if folder.is_dir() else []
    if not folder.is_dir() or (entries and not any(is_stage(entry) for entry in entries)):
        raise UserError(f"{storage} holds no artifacts: name a storage_path such as runs, or its folder {FOLDER}")
    return folder


def is_stage(path: Place) -> bool:
    is_link = isinstance(path, Path) and path.is_symlink()
    return STAGE.fullmatch(path.name) is not None and path.is_dir() and not is_link


def artifacts(folder: Place) -> Iterator[Artifact]:
    """Every stage, in the order of the names; other things that lie there are left alone."""
    users = users_of(folder.parent)
    for directory in filter(is_stage, listed(folder, "*")):
        manifest = directory / MANIFEST
        times = list(map(modified_time, (manifest, directory / USED)))
        committed = times[0] > 0
        files = files_in(directory)
        if not committed:
            times = [*(facts.st_mtime for facts in files), *folder_times(directory)]
        yield Artifact(
            directory=directory,
            committed=committed,
            num_bytes=sum(facts.st_size for facts in files),
            created=times[0] if committed else min(times),
            used=max(times),
            users=users.get(directory.name, {}),
        )


def users_of(storage: Place) -> dict[str, dict[str, str]]:
    """Stage → the runs below ``storage`` that name it, and how far they are.

    Raises:
        UserError: a ``run.json`` cannot be read, so that what its run uses is not known.
    """
    found: dict[str, dict[str, str]] = {}
    for run in runs(storage):
        facts = read_run_json(run / "run.json")
        if "status" not in facts:
            raise UserError(f"{run / 'run.json'} cannot be read, so what its run uses is not known: remove it first")
        named = [*facts.get("stages", ()), *(Path(entry["store"]).name for entry in facts.get("data", ()))]
        for stage in named:
            found.setdefault(stage, {})[below(run, storage)] = facts["status"]
    return found


def remove_stage(directory: Place, oldest: float) -> bool:
    """Remove a stage under its lease, its manifest first; False where somebody writes to it or has just used it."""
    try:
        with lease(directory):
            if max(map(modified_time, (directory / MANIFEST, directory / USED))) > oldest:
                return False
            if isinstance(directory, ObjectPath):
                discard(directory)  # this claim too: nothing is left that another one could wait for
                return True
            (directory / MANIFEST).unlink(missing_ok=True)
            for path in directory.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif not path.name.startswith(PREFIX):
                    path.unlink(missing_ok=True)
    except Held:
        return False
    forget(directory)
    with suppress(OSError):  # somebody who wants the stage has come and makes it again
        directory.rmdir()
    return True


def parse_duration(text: str) -> float:
    """``30d`` in seconds."""
    match = re.fullmatch(r"(\d+)([smhdw])", text)
    if match is None:
        raise UserError(f"--unused-for {text}: write a number and one of {', '.join(UNITS)}, such as 30d")
    return float(int(match[1]) * UNITS[match[2]])


def unused_stage_state(item: Artifact) -> str:
    """What is said of a stage that no run names."""
    if item.committed:
        return "–"
    return "being made" if holder_in_words(item.directory) else "never finished"


def modified_time(path: Place) -> float:
    """0 where there is no such file."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def files_in(directory: Place) -> list[Facts]:
    """What is known of every file below; what goes meanwhile is left out."""
    if isinstance(directory, ObjectPath):
        return list(directory.objects().values())
    found = []
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            stat = path.stat()
            if path.is_file():
                found.append(Facts(stat.st_size, stat.st_mtime))
    return found


def folder_times(directory: Place) -> list[float]:
    """When the folder itself was written to: an object store has none."""
    return [directory.stat().st_mtime] if isinstance(directory, Path) else []


def date_of(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
