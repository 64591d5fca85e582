"""What the streams of a run are made of; plain values and paths, so that they travel between processes."""

from __future__ import annotations

from dataclasses import dataclass

from rayalign.rounds.columns import RoundPreparation
from rayalign.rounds.plan import RoundPlan
from rayalign.storage.place import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredStream:
    """A mixture of token stores, drawn in the order of one stream."""

    name: str
    stores: tuple[Place, ...]
    columns: tuple[tuple[Place, ...], ...]
    """Column directories (reference log-probs, say) laid over each store."""
    weights: tuple[float, ...]
    groups_per_step: int
    num_candidates: int
    """K of the stream's batches; groups with fewer are masked."""
    kept: tuple[Place, ...] = ()
    """One file of rows per store (:mod:`rayalign.data.select`), which alone are drawn; none: every row is."""
    window: int | None = None
    """Shards of a store that are shuffled together; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStream:
    """Groups that are drawn from the policy, round by round, for the prompts of a stored stream."""

    name: str
    prompts: StoredStream
    """Its positions are those of the fresh groups; its candidates, if it has any, are not trained on."""
    plan: RoundPlan
    folder: Place
    """Holds the rounds, the weights that they are drawn with, and what was asked for."""
    num_candidates: int
    prepared: str | None = None
    """Key of the columns that the driver makes of every round; None where it makes none."""
    preparation: RoundPreparation | None = None
    """What the training workers make of every round, with the values of the critic that they hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedStream:
    """Fresh and stored groups in one step, in fixed proportion."""

    name: str
    fresh: StoredStream | RoundStream
    stored: StoredStream
    fresh_fraction: float
    groups_per_step: int
    """Fresh and stored together."""


AnyStream = StoredStream | RoundStream | MixedStream


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """What a worker needs to make its own micro-batches."""

    streams: tuple[AnyStream, ...]
    seed: int
    tokens_per_micro_batch: int
    row_tokens: int | None


def stored_parts(stream: AnyStream) -> tuple[StoredStream, ...]:
    """The stores behind a stream: of groups, or of prompts for fresh ones."""
    if isinstance(stream, StoredStream):
        return (stream,)
    if isinstance(stream, RoundStream):
        return (stream.prompts,)
    return (*stored_parts(stream.fresh), stream.stored)


def round_part(stream: AnyStream) -> RoundStream | None:
    """The part of a stream that is drawn round by round, if there is one."""
    if isinstance(stream, MixedStream):
        return round_part(stream.fresh)
    return stream if isinstance(stream, RoundStream) else None
