"""What a training run is, and what one worker knows of it between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayalign.config.training import CheckpointConfig, OptimConfig
from rayalign.data.rows import Layout
from rayalign.engine.batches import Batches
from rayalign.engine.checkpoint.checkpoint import Checkpointer
from rayalign.engine.frozen import ScoringSpec
from rayalign.engine.model.precision import EXACT, Precision
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.objective import Objective
from rayalign.engine.step import Runner
from rayalign.engine.strategy.base import Strategy
from rayalign.storage.place import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticSpec:
    """The second model of a method that has a critic: what it starts from, and how it is optimized."""

    model: ModelSpec
    optim: OptimConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """Everything one worker must know to train; plain values, so that it travels between processes."""

    directory: Place
    """``<storage_path>/<name>``: metrics.jsonl, checkpoints/, final/."""
    model: ModelSpec
    objectives: tuple[Objective, ...]
    optim: OptimConfig
    steps: int
    """Steps of the whole run: ``optim.steps``, or what ``optim.epochs`` takes."""
    seed: int
    identity: Mapping[str, Any]
    """What this run is (digests of data, model and configuration): a checkpoint of another is refused."""
    checkpoint: CheckpointConfig
    checkpoint_at: tuple[int, ...] = ()
    """Further steps whose checkpoint is written and kept until the run ends."""
    evaluate_at: tuple[int, ...] = ()
    """Steps after which loss and metrics are measured on held-out groups."""
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    """What the saved tokenizer writes conversations with; None: its own. A model with a scalar head has its own."""
    saved: Precision = EXACT
    """The precision of ``final/``; checkpoints are float32, so that training continues exactly."""
    export_adapter: bool = True
    """``final/`` holds the adapter alone too, which peft reads upon the model that the run began with."""
    track: tuple[str, ...] = ()
    critic: CriticSpec | None = None
    """Trained beside the policy, by :mod:`rayalign.engine.critic`."""
    reference_in_place: bool = False
    """The reference is the policy with its adapter off, scored in this process."""
    reference: ScoringSpec | None = None
    """A reference that the workers hold beside the policy, and score with; with neither, data carry its log-probs."""
    reference_made: Mapping[str, str] | None = None
    """With what the stored reference log-probs were computed; None where rollout actors compute them."""
    check_initial_logratio: bool = False
    """True when the reference is the initial policy: then every logratio of step 0 must be 0 up to rounding."""


def checkpointer_of(spec: TrainSpec, *, attempt: str) -> Checkpointer:
    """What writes and finds the checkpoints of a run."""
    return Checkpointer(
        root=spec.directory / "checkpoints",
        attempt=attempt,
        keep=spec.checkpoint.keep,
        always_keep=spec.checkpoint_at,
        best=spec.checkpoint.best,
        identity=spec.identity,
    )


MakeBatches = Callable[[Layout, int], Batches]
"""(layout that the model is proven to read, id of padding) → the groups of every step."""


@runtime_checkable
class Notices(Protocol):
    """What the cluster lets the workers know while they train: that some of them will not be there for long."""

    def due(self) -> bool:
        """Whether it is time to ask; rank 0's answer counts."""
        ...

    def heard(self) -> str | None:
        """Why a checkpoint is wanted now, if it is; all workers ask after the same step and hear the same."""
        ...


class NoNotices:
    """Notices of workers that are never taken away: none."""

    def due(self) -> bool:
        return False

    def heard(self) -> str | None:
        return None


@dataclass(slots=True, kw_only=True)
class Run:
    """One worker's state between steps."""

    spec: TrainSpec
    strategy: Strategy
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    runner: Runner
    optimizer: torch.optim.Optimizer
    checkpointer: Checkpointer
    step: int = 0
    """Steps done."""
    num_tokens: int = 0
    saved: int = 0
    """The step of the newest checkpoint; 0 where there is none."""
    seconds_saving: float = 0.0
    """That training waited for checkpoints since the newest row."""
    stopping: bool = False
    """The run was asked to end; the same on every worker."""
    notices: Notices = field(default_factory=NoNotices)
    urgent: bool = False
    """The newest step is to be saved before anything else; the same on every worker."""
    skipped_steps: int = 0
    """Steps left out in the whole run so far: their loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    row: Mapping[str, Any] = field(default_factory=dict)
    """Metrics of the newest step that was not skipped; none before this process's first."""
