"""What a checkpoint holds, how it is committed, and which one a run continues from.

``checkpoints/step_000100-a<attempt>/`` is a Hugging Face model directory (safetensors, tokenizer, generation config)
with ``trainer/`` beside the weights: optimizer state and random state. Every stream's position is a function of the
step, so the step is all that data need. Two attempts never write into one directory: the attempt is in its name.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayalign.engine.model import save_pretrained
from rayalign.manifest import TornDirectory, commit, read_manifest, verify

NAME = re.compile(r"step_(\d{6,})-a([A-Za-z0-9]+)")

log = logging.getLogger(__name__)


class IncompatibleCheckpoint(ValueError):
    """A checkpoint belongs to another run: other data, another method, another model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    directory: Path
    step: int
    """Optimizer steps done."""
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointer:
    """Writes and finds the checkpoints of one run below ``root``.

    ``identity`` says what the run is (digests of plan, stores, method, model); a checkpoint with another identity is
    refused rather than continued.
    """

    root: Path
    attempt: str
    keep: int
    always_keep: tuple[int, ...]
    """Steps that retention does not remove."""
    identity: Mapping[str, Any]

    def save(
        self,
        step: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        stop_ids: tuple[int, ...],
        facts: Mapping[str, Any],
    ) -> Path:
        """Commit the state after ``step`` steps, then remove what retention no longer keeps. Rank 0 calls this."""
        directory = self.root / f"step_{step:06d}-a{self.attempt}"
        shutil.rmtree(directory, ignore_errors=True)
        save_pretrained(model, tokenizer, directory, stop_ids=stop_ids)
        trainer = directory / "trainer"
        trainer.mkdir()
        torch.save(optimizer.state_dict(), trainer / "optimizer.pt")
        torch.save(torch.get_rng_state(), trainer / "rng.pt")
        commit(directory, {"step": step, "attempt": self.attempt, "identity": dict(self.identity), **facts})
        self.prune(directory)
        return directory

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; a torn one is skipped with a warning that names the damage."""
        for directory in self.directories():
            try:
                facts = read_manifest(directory) and verify(directory)
            except TornDirectory as damage:
                log.warning("skipping checkpoint %s: %s", directory, damage)
                continue
            if facts:
                self.check_identity(directory, facts)
                return Checkpoint(directory=directory, step=int(facts["step"]), facts=facts)
        return None

    def directories(self) -> list[Path]:
        """Checkpoint directories, newest step first; of one step, the one committed last."""
        found = [path for path in self.root.glob("step_*") if NAME.fullmatch(path.name)] if self.root.is_dir() else []
        return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)

    def check_identity(self, directory: Path, facts: Mapping[str, Any]) -> None:
        theirs = facts.get("identity", {})
        changed = sorted(key for key in self.identity if theirs.get(key) != self.identity[key])
        if changed:
            differences = "; ".join(f"{key}: {theirs.get(key)} there, {self.identity[key]} here" for key in changed)
            raise IncompatibleCheckpoint(
                f"{directory} was written by another configuration ({differences}). "
                "Give this run another name, or remove that directory to start over."
            )

    def prune(self, newest: Path) -> None:
        """Keep the newest ``keep`` steps and ``always_keep``; what a lost attempt left uncommitted goes too."""
        kept_steps: set[int] = set()
        for directory in self.directories():
            if is_committed(directory) and step_of(directory) in self.always_keep:
                continue
            if is_committed(directory) and (len(kept_steps) < self.keep or directory == newest):
                kept_steps.add(step_of(directory))
            else:
                shutil.rmtree(directory)


def is_committed(directory: Path) -> bool:
    try:
        return read_manifest(directory) is not None
    except TornDirectory:
        return False


def step_of(directory: Path) -> int:
    match = NAME.fullmatch(directory.name)
    assert match is not None
    return int(match.group(1))


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights, optimizer and random state; the caller's model and optimizer have the saved shapes already."""
    load_weights(checkpoint.directory, model)
    trainer = checkpoint.directory / "trainer"
    optimizer.load_state_dict(torch.load(trainer / "optimizer.pt", weights_only=True, map_location="cpu"))
    torch.set_rng_state(torch.load(trainer / "rng.pt", weights_only=True))


def load_weights(directory: Path, model: nn.Module) -> None:
    """Load every safetensors file of a Hugging Face directory into ``model``; tied tensors are stored once."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        state |= load_file(path)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    absent = [name for name in missing if name not in tied]
    if absent or unexpected:
        raise TornDirectory(f"{directory}: weights missing {absent[:3]}, unexpected {unexpected[:3]}")
