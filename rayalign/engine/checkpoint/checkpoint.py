"""What a checkpoint holds, how it is committed, and which one a run continues from.

``checkpoints/step_000100-a<attempt>/`` is a Hugging Face model directory (safetensors, tokenizer, generation config).
It is loaded as any other. The optimizer's state is beside the weights. Every stream's position, the learning rate and
the random state are functions of the step, so the step is all that they need. Two attempts never write into one
directory: the attempt is in its name.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayalign.config.training import BestConfig
from rayalign.engine.batches import State
from rayalign.engine.model.pretrained import save_pretrained
from rayalign.errors import UserError
from rayalign.storage.cache import whole, working
from rayalign.storage.manifest import MANIFEST, TornDirectory, commit, discard, read_manifest, write_durably
from rayalign.storage.place import Place

DESCRIBED = "described"
"""Key of an identity: settings that explain its digests, and decide nothing themselves."""
NAME = re.compile(r"step_(\d{6,})-a([A-Za-z0-9]+)")

log = logging.getLogger(__name__)


class IncompatibleCheckpoint(UserError):
    """A directory belongs to another run: other data, another method, another model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    directory: Place
    step: int
    """Optimizer steps done."""
    facts: Mapping[str, Any]
    """What :meth:`Checkpointer.save` was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointer:
    """Writes and finds the checkpoints of one run below ``root``."""

    root: Place
    attempt: str
    keep: int
    """Steps that retention leaves, the newest ones."""
    always_keep: tuple[int, ...]
    """Steps that retention does not remove."""
    best: BestConfig | None = None
    """Retention leaves the best one too, and ``best.json`` names it."""
    identity: Mapping[str, Any]
    """What the run is (its configuration, digests of data and model); a checkpoint with another one is refused."""

    def save(
        self,
        step: int,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        facts: Mapping[str, Any],
        state: State | None = None,
    ) -> Place:
        """Commit the state after ``step`` steps, then remove what retention no longer keeps. Rank 0 calls this.

        What else the state is, such as the optimizer's, lies in folders of :meth:`directory` already; ``state`` is
        what :func:`rayalign.engine.model.pretrained.save_pretrained` takes.
        """
        directory = self.directory(step)
        with working(directory) as folder:
            save_pretrained(model, tokenizer, folder, stop_ids=stop_ids, state=state)
        commit(directory, {"step": step, "attempt": self.attempt, "identity": dict(self.identity), "facts": facts})
        self.prune(step)
        return directory

    def directory(self, step: int) -> Place:
        """Where this attempt writes the checkpoint of ``step``."""
        return self.root / f"step_{step:06d}-a{self.attempt}"

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; one that is not whole is skipped with a warning that names the damage.

        Raises:
            IncompatibleCheckpoint: it is another run's.
        """
        for directory in self.directories():
            try:
                manifest = whole(directory)
            except TornDirectory as damage:
                log.warning("skipping a checkpoint that is not whole: %s", damage)
                continue
            refuse_other_run(directory, manifest["identity"], self.identity)
            return Checkpoint(directory=directory, step=int(manifest["step"]), facts=manifest["facts"])
        return None

    def directories(self) -> list[Place]:
        """Checkpoint directories, newest step first; of one step, the one written last."""
        found = [path for path in self.root.glob("step_*") if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (step_of(path), written(path)), reverse=True)

    def prune(self, step: int) -> None:
        """Up to ``step``, leave the newest ``keep``, the best and ``always_keep``, once each; uncommitted remains go.

        A checkpoint beyond ``step`` is damaged, or the run would have continued from it; the next of its step
        replaces it.
        """
        kept: set[int] = set()
        recent: set[int] = set()
        manifests = {path: manifest_of(path) for path in self.directories() if step_of(path) <= step}
        best = self.choose(manifests)
        for directory, manifest in manifests.items():
            own = step_of(directory)
            if own in kept or manifest is None:
                discard(directory)
            elif own in self.always_keep:
                kept.add(own)
            elif len(recent) < self.keep:
                kept.add(own)
                recent.add(own)
            elif directory == best:
                kept.add(own)
            else:
                discard(directory)

    def choose(self, manifests: Mapping[Place, Mapping[str, Any] | None]) -> Place | None:
        """The best checkpoint of those whose step was measured, newest first; told in ``best.json``."""
        if self.best is None:
            return None
        metric = self.best.metric
        found: dict[int, tuple[Place, float]] = {}
        for directory, manifest in manifests.items():
            value = manifest["facts"].get("metrics", {}).get(metric) if manifest is not None else None
            if value is not None:
                found.setdefault(step_of(directory), (directory, value))
        step = best_step(self.best, {own: value for own, (_, value) in found.items()})
        if step is None:
            return None
        directory, value = found[step]
        told = {"step": step, "directory": directory.name, "metric": metric, "mode": self.best.mode, "value": value}
        write_durably(self.root / "best.json", json.dumps(told) + "\n")
        return directory


def manifest_of(directory: Place) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None where it was not committed, or says nothing that can be read."""
    try:
        return read_manifest(directory)
    except TornDirectory:
        return None


def written(directory: Place) -> float:
    """When a checkpoint was written: the folder on a disk, the commit on an object store; 0 where there is none yet."""
    try:
        return (directory if isinstance(directory, Path) else directory / MANIFEST).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def is_committed(directory: Place) -> bool:
    return manifest_of(directory) is not None


def newest_step(root: Place) -> int:
    """The step of the newest committed checkpoint below ``root``, damaged or not; 0 where there is none."""
    steps = [step_of(path.parent) for path in root.glob(f"step_*/{MANIFEST}") if NAME.fullmatch(path.parent.name)]
    return max(steps, default=0)


def step_of(directory: Place) -> int:
    match = NAME.fullmatch(directory.name)
    assert match is not None
    return int(match.group(1))


def refuse_other_run(directory: Place, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise :class:`IncompatibleCheckpoint` naming every setting in which two identities differ."""
    changed = identity_differences(theirs, ours)
    if changed:
        raise IncompatibleCheckpoint(
            f"{directory} was written by another run: {'; '.join(changed)}. "
            f"Give this run another name, or remove {directory.parent} to start over."
        )


def identity_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """``key: theirs there, ours here`` for every leaf of two nested mappings that is not the same as JSON.

    What is :data:`DESCRIBED` is reported only with another difference, which it may explain.
    """
    there, here = dict(identity_leaves(theirs)), dict(identity_leaves(ours))
    keys = sorted(there.keys() | here.keys())
    pairs = [(key, there.get(key, "nothing"), here.get(key, "nothing")) for key in keys]
    found = {key: f"{key}: {left} there, {right} here" for key, left, right in pairs if left != right}
    decides = any(not key.startswith(f"{DESCRIBED}.") for key in found)
    return list(found.values()) if decides else []


def deciding_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without what is :data:`DESCRIBED`."""
    return {key: value for key, value in identity.items() if key != DESCRIBED}


def identity_leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from identity_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, sort_keys=True)


def best_step(best: BestConfig, values: Mapping[int, float]) -> int | None:
    """The best of step → value; of equal ones the first."""
    sign = 1 if best.mode == "min" else -1
    return min(values, key=lambda step: (sign * values[step], step), default=None)


def refuse_unknown_metric(best: BestConfig, names: Collection[str], *, evaluated: Collection[str]) -> None:
    """Raise UserError unless rows have the metric: ``names``, or ``eval_`` and one of ``evaluated``."""
    known = {*names, *(f"eval_{name}" for name in evaluated)}
    if best.metric not in known:
        listed = ", ".join(sorted(name for name in known if not name.startswith("seconds")))
        raise UserError(
            f"checkpoint.best.metric: no row of metrics has {best.metric!r}; rows of this run have {listed}"
        )
