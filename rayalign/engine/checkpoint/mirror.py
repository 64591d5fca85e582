"""Committed checkpoints also on an object store, so that a run resumes where its workspace is lost.

Below ``<uri>/<run>/`` lie ``checkpoints/<name>/``, and in ``rounds/`` what a checkpoint's manifest names: the round in
progress with the columns made of it, those that were drawn ahead, and the weights for those that were not. A round
comes there before the checkpoint that needs it and goes after it. ``metrics.jsonl`` comes before a checkpoint too,
``run.json`` when it changes. Another run's copies are refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayalign.engine.checkpoint.checkpoint import (
    NAME,
    Checkpointer,
    IncompatibleCheckpoint,
    identity_differences,
    manifest_of,
    step_of,
)
from rayalign.storage.copies import Copies, Mirror, MirrorFailed, arriving_folder, open_mirror
from rayalign.storage.disk import room_for
from rayalign.storage.manifest import MANIFEST, TornDirectory, verify

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
METRICS, RUN = "metrics.jsonl", "run.json"
ROUND = re.compile(r"rounds/(?:round_\d+-\w+|weights/step_\d+-\w+|prepared/round_\d+-\w[\w.-]*)")
"""The name of a folder that a checkpoint may need."""
NamedRounds = Mapping[str, Mapping[str, str]]
"""``begun`` (name → digest) and ``ahead`` (name → name of the weights) of a checkpoint."""


def upload(mirror: Mirror, directory: Path, *, step: int) -> None:
    """Bring the copies up to what is committed in a run's ``directory`` after ``step`` steps, the newest first.

    What an earlier call could not send is sent now, what is not whole here is not, and what retention has removed here
    goes there too; a copy beyond ``step`` stays as a local checkpoint does.

    Raises:
        MirrorFailed: not all of it could be sent.
    """
    found = {path: manifest_of(path) for path in (directory / CHECKPOINTS).glob("step_*") if NAME.fullmatch(path.name)}
    local = {path: manifest["facts"] for path, manifest in found.items() if manifest is not None}
    rounds: list[NamedRounds] = []
    with open_mirror(mirror) as copies:
        for path in sorted(local, key=step_of, reverse=True):
            name = f"{CHECKPOINTS}/{path.name}"
            try:
                rounds.append(rounds_of(local[path]))
                send_rounds(copies, directory, rounds[-1])
                if not copies.holds(path, name):
                    copies.send(directory / METRICS, METRICS)
                    copies.send_folder(path, name)
            except TornDirectory as damage:
                log.warning("not copied to %s, since it is not whole: %s", mirror, damage)
        there = copies.sizes().keys()
        for name in {place.split("/")[1] for place in there if place.startswith(f"{CHECKPOINTS}/")}:
            if NAME.fullmatch(name) and step_of(Path(name)) <= step and directory / CHECKPOINTS / name not in local:
                copies.remove(f"{CHECKPOINTS}/{name}")
        needed = needed_rounds(rounds, there)
        for name in {match.group() for place in there if (match := ROUND.match(place))} - needed:
            copies.remove(name)


def rounds_of(facts: Mapping[str, Any]) -> NamedRounds:
    """What a checkpoint's manifest says of rounds: see :func:`rayalign.engine.checkpoint.saving.rounds_in_manifest`.

    Raises:
        TornDirectory: it does not name the rounds that it needs, as those of earlier versions do not.
    """
    if not facts.get("source"):
        return {"begun": {}, "ahead": {}}
    try:
        return {kind: dict(facts["rounds"][kind]) for kind in ("begun", "ahead")}
    except (KeyError, TypeError, ValueError) as error:
        raise TornDirectory("its manifest does not name the rounds that it needs") from error


def send_rounds(copies: Copies, directory: Path, rounds: NamedRounds) -> None:
    """Send what a checkpoint needs; raises :class:`TornDirectory` where that is not whole here."""
    for name in rounds["begun"]:
        send_needed(copies, directory, name)
    for name, weights in rounds["ahead"].items():
        if manifest_of(directory / name) is None:
            if manifest_of(directory / weights) is not None:
                copies.withdraw(name)  # it is drawn again here, and may differ
            try:
                send_needed(copies, directory, weights)
                continue
            except (TornDirectory, FileNotFoundError) as error:
                # The driver removes weights while this process reads them, but commits the round before.
                if manifest_of(directory / name) is None:
                    raise TornDirectory(f"{directory / name} is not drawn, and its weights are gone") from error
        send_needed(copies, directory, name)


def send_needed(copies: Copies, directory: Path, name: str) -> None:
    if manifest_of(directory / name) is None:
        raise TornDirectory(f"{directory / name} was never committed")
    if not copies.holds(directory / name, name):
        copies.send_folder(directory / name, name)


def needed_rounds(kept: Sequence[NamedRounds], there: Collection[str]) -> set[str]:
    """The folders that checkpoints need; weights only as long as the round that is drawn with them is not ``there``."""
    ahead = {name: weights for rounds in kept for name, weights in rounds["ahead"].items()}
    waiting = {weights for name, weights in ahead.items() if f"{name}/{MANIFEST}" not in there}
    return {name for rounds in kept for name in rounds["begun"]} | ahead.keys() | waiting


def upload_run(mirror: Mirror, directory: Path) -> None:
    """Send ``run.json``; where that fails it is only told, for the next one is sent soon."""
    try:
        with open_mirror(mirror) as copies:
            copies.send(directory / RUN, RUN)
    except MirrorFailed as error:
        log.warning("%s", error)


def restore(mirror: Mirror, directory: Path, checkpointer: Checkpointer, *, note: Callable[[str], None]) -> Path | None:
    """Fetch what ``directory`` lacks of the copies, where they have a newer whole checkpoint; the newest one's place.

    Rounds that the newest one here lacks come in any case. With a newer one come the rounds that it needs, the rows of
    metrics before it, ``run.json`` where there is none here, and the older checkpoints that retention had left. It
    comes last, so that a call that was killed is made good by the next one. A copy that is not whole, or whose rounds
    are not, is skipped and told.

    Raises:
        MirrorFailed: the store does not answer.
        IncompatibleCheckpoint: a copy is another run's.
        DiskFull: there is no room for it here.
    """
    here = checkpointer.newest()
    have = here.step if here is not None else 0
    root, newest = directory / CHECKPOINTS, None
    with open_mirror(mirror) as copies:
        if here is not None:
            try:
                fetch_rounds(copies, directory, rounds_of(here.facts))
            except TornDirectory as damage:
                note(f"{here.directory.name} lacks rounds, and {mirror} does not have them: {damage}")
        found = [place.split("/") for place in copies.sizes()]
        there = [parts[1] for parts in found if parts[0] == CHECKPOINTS and parts[2:] == [MANIFEST]]
        places = sorted((root / name for name in there if NAME.fullmatch(name)), key=step_of)
        refuse_others(mirror, copies, [place.name for place in places if manifest_of(place) is None], checkpointer)
        if not places or step_of(places[-1]) <= have:
            return None
        for place in places:
            if step_of(place) <= have and manifest_of(place) is not None:
                continue
            name = f"{CHECKPOINTS}/{place.name}"
            try:
                _, manifest = copies.manifest(name)
                refuse_other(mirror, name, manifest, checkpointer)
                fetch_rounds(copies, directory, rounds_of(manifest["facts"]))
                with arriving_folder(place) as partial:
                    copies.fetch_folder(name, partial, digest=manifest["manifest_sha256"])
                    if newest is None:
                        fetch_facts(copies, directory)
            except TornDirectory as damage:
                note(f"skipping a copy that is not whole: {mirror}/{name}: {damage}")
            else:
                newest = place
                note(f"fetched {place.name} from {mirror}")
    if newest is not None:
        checkpointer.choose({path: manifest_of(path) for path in checkpointer.directories()})
    return newest


def fetch_rounds(copies: Copies, directory: Path, rounds: NamedRounds) -> None:
    """Fetch what a checkpoint needs and ``directory`` lacks; raises :class:`TornDirectory` where it is not there."""
    for name, digest in rounds["begun"].items():
        fetch_needed(copies, directory, name, digest)
    for name, weights in rounds["ahead"].items():
        drawn = manifest_of(directory / name) is not None or copies.has(f"{name}/{MANIFEST}")
        fetch_needed(copies, directory, name if drawn else weights)


def fetch_needed(copies: Copies, directory: Path, name: str, digest: str | None = None) -> None:
    if not ROUND.fullmatch(name):
        raise TornDirectory(f"its manifest names {name!r}, which is no round")
    with contextlib.suppress(TornDirectory):
        if digest in (None, verify(directory / name)["manifest_sha256"]):
            return
    with arriving_folder(directory / name) as partial:
        copies.fetch_folder(name, partial, digest=digest)


def fetch_facts(copies: Copies, directory: Path) -> None:
    """The rows of metrics, and ``run.json`` where there is none."""
    sizes = copies.sizes()
    for name in (METRICS, *(() if (directory / RUN).exists() or RUN not in sizes else (RUN,))):
        partial = directory / f".fetching-{name}" / name
        with room_for(partial.parent, sizes.get(name, 0)):
            copies.fetch(name, partial)
        os.replace(partial, directory / name)
        partial.parent.rmdir()


def refuse_others(mirror: Mirror, copies: Copies, names: Sequence[str], checkpointer: Checkpointer) -> None:
    """Raise :class:`IncompatibleCheckpoint` where one of ``names`` is another run's, which retention here would remove.

    A manifest that is not whole says nothing.
    """
    for name in (f"{CHECKPOINTS}/{name}" for name in names):
        with contextlib.suppress(TornDirectory):
            refuse_other(mirror, name, copies.manifest(name)[1], checkpointer)


def refuse_other(mirror: Mirror, name: str, manifest: Mapping[str, Any], checkpointer: Checkpointer) -> None:
    """Raise :class:`IncompatibleCheckpoint` where a copy's ``manifest`` is another run's."""
    changed = identity_differences(manifest["identity"], json.loads(json.dumps(dict(checkpointer.identity))))
    if changed:
        raise IncompatibleCheckpoint(
            f"{mirror}/{name} was written by another run: {'; '.join(changed)}. Give this run another "
            "name, or another checkpoint.mirror"
        )
