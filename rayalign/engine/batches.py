"""What the training loop consumes: the groups of one step, already packed for this worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from rayalign.data.micro_batches import StepCounts
from rayalign.data.rows import Layout
from rayalign.storage.place import Place
from rayalign.types import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamWork:
    """One stream's part of one step on one worker."""

    stream: str
    micro_batches: tuple[PackedBatch, ...]
    """This worker's; every worker has the same number, dummies included."""
    counts: StepCounts
    """Counts of the whole step over all workers: the denominators of the loss."""
    groups_per_step: int
    epoch: float
    """Epochs of this stream finished when the step ends."""
    num_tokens: int
    """Tokens of the step's groups over all workers, each prompt counted once."""
    describe: Callable[[int], str] = "position {} of the stream".format
    """Names the group at a position of the stream in errors, such as its file and line."""
    facts: Mapping[str, int | float] = field(default_factory=dict)
    """What the source knows of these groups, for the row of metrics."""


@runtime_checkable
class Batches(Protocol):
    """The groups of any step, in any order of asking: reading consumes nothing, so a restart loses nothing."""

    def get(self, step: int) -> tuple[StreamWork, ...]:
        """Work of step ``step`` (from 0), one entry per stream. May wait, outside any collective."""
        ...


State = Mapping[str, Tensor]
"""All parameters and buffers of a model by name, those of every shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The policy as it was before a step, exported for the actors that sample it."""

    step: int
    attempt: str
    digest: str
    """Digest of every bit of the weights."""
    directory: Place | None
    """Where they lie in Hugging Face layout; None where they were sent and not written."""
    canary: tuple[float, ...]
    """What the training forward says of a fixed sequence, nats: see :mod:`rayalign.engine.canary`."""
    num_bytes: int
    seconds_sending: float = 0.0
    """The trainer's part of the refresh: digest, canary, and writing or sending."""

    @property
    def version(self) -> str:
        """Names these weights and the attempt that made them."""
        return f"step_{self.step:06d}-{self.attempt}-{self.digest[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundWork:
    """All groups of a round, and this worker's part of them."""

    micro_batches: tuple[PackedBatch, ...]
    """Every worker has the same number, dummies included; ``group_index`` is a group's place in the round."""
    first_token: Int[Tensor, " G"]
    """Where each group's tokens begin among the round's N, group after group."""
    num_tokens: int
    """N."""


@runtime_checkable
class Rounds(Protocol):
    """The rounds that a run draws from its policy, as training asks for them.

    Every worker calls every method alike, except where rank 0 is named. An off-policy run has none.
    """

    def wants_weights(self, step: int) -> bool:
        """Whether rounds are drawn with the weights that step ``step`` begins with."""
        ...

    def weights_folder(self, step: int, attempt: str, *, written: bool) -> Place | None:
        """Where those weights are to be written; None where it is enough to send them, unless they are ``written``."""
        ...

    def send(self, weights: Weights, state: State) -> None:
        """Hand the weights to the actors that sample them; rank 0 alone calls this."""
        ...

    def follow(self, weights: Weights) -> None:
        """Ask for the rounds that are drawn with ``weights``, which are committed."""
        ...

    def opens_round(self, step: int) -> bool:
        """Whether ``step`` is the first that needs its round, so that :meth:`Batches.get` would wait for it."""
        ...

    def wait(self, step: int, stop: Callable[[], bool]) -> bool:
        """Wait for the round of ``step``, outside any collective; False where ``stop`` says so before it is there."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after ``step`` steps must hold so that a restart asks for the same groups; plain JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue as the run that had ``state``."""
        ...

    def place(self, step: int) -> tuple[int, int]:
        """(round, pass over it) of ``step``."""
        ...

    def whole_round(self, step: int, *, layout: Layout, pad_id: int) -> RoundWork:
        """The round of ``step``, all of it, for a critic to value; waits until it is drawn."""
        ...

    def commit_values(self, step: int, version: str, values: Tensor) -> None:
        """Prepare the round of ``step`` with the critic's ``values`` [N] and commit the columns; rank 0 alone."""
        ...

    def use_values(self, step: int, version: str) -> None:
        """Train on the round of ``step`` with the columns that were committed as ``version``."""
        ...


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    if batch.input_ids.device == device:
        return batch
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def map_tensors(batch: PackedBatch, change: Callable[[Tensor], Tensor]) -> PackedBatch:
    """The batch with every tensor of it changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return {name: changed(column) for name, column in value.items()}

    return PackedBatch(**{name: changed(getattr(batch, name)) for name in PackedBatch.__slots__})
