"""Stored groups as they are: for any step, the micro-batches of this worker."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from rayalign.data.pack import pack
from rayalign.data.plan import MicroBatch, check_budget, count_step, plan_step
from rayalign.data.rows import Layout
from rayalign.data.store import TokenStore
from rayalign.data.stream import Stream
from rayalign.engine.source import StreamWork
from rayalign.types import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredStream:
    """A mixture of token stores, drawn in the order of one stream."""

    name: str
    stores: tuple[Path, ...]
    columns: tuple[tuple[Path, ...], ...]
    """Column directories (reference log-probs, say) laid over each store."""
    weights: tuple[float, ...]
    groups_per_step: int
    num_candidates: int
    """K of the stream's batches; groups with fewer are masked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """What a worker needs to make its own micro-batches; plain values, so that it travels between processes."""

    streams: tuple[StoredStream, ...]
    seed: int
    tokens_per_micro_batch: int
    row_tokens: int | None


class OffPolicySource:
    """The :class:`rayalign.engine.source.GroupSource` of stored groups, as one worker sees it.

    Raises:
        PlanError: a group is too large for a micro-batch; its file and line are in the message.
    """

    def __init__(self, spec: SourceSpec, *, layout: Layout, pad_id: int, rank: int = 0, world_size: int = 1) -> None:
        self.spec = spec
        self.layout: Layout = layout
        self.pad_id = pad_id
        self.rank = rank
        self.world_size = world_size
        self.stores = {stream.name: open_stores(stream) for stream in spec.streams}
        for store in chain.from_iterable(self.stores.values()):
            check_budget(
                store, tokens_per_micro_batch=spec.tokens_per_micro_batch, row_tokens=spec.row_tokens, layout=layout
            )
        self.orders = {
            stream.name: Stream(
                name=stream.name,
                sizes=tuple(len(store) for store in self.stores[stream.name]),
                weights=stream.weights,
                groups_per_step=stream.groups_per_step,
                seed=spec.seed,
            )
            for stream in spec.streams
        }

    def get(self, step: int) -> tuple[StreamWork, ...]:
        """Work of step ``step`` (from 0), one entry per stream."""
        return tuple(self._work(stream, self.orders[stream.name].positions(step)) for stream in self.spec.streams)

    def _work(self, stream: StoredStream, positions: range) -> StreamWork:
        order, stores = self.orders[stream.name], self.stores[stream.name]
        rows = [order.row(position) for position in positions]
        lengths = [stores[source].lengths(row) for source, row in rows]
        plan = plan_step(
            lengths,
            num_workers=self.world_size,
            tokens_per_micro_batch=self.spec.tokens_per_micro_batch,
            row_tokens=self.spec.row_tokens,
            layout=self.layout,
        )

        def packed(micro: MicroBatch) -> PackedBatch:
            return pack(
                [stores[source][row] for source, row in (rows[slot] for slot in micro.slots)],
                positions=[positions[slot] for slot in micro.slots],
                num_candidates=stream.num_candidates,
                pad_id=self.pad_id,
                row_tokens=self.spec.row_tokens,
                layout=self.layout,
                dummy=micro.dummy,
            )

        def describe(position: int) -> str:
            source, row = order.row(position)
            return stores[source].index.name(row)

        return StreamWork(
            stream=stream.name,
            micro_batches=tuple(packed(micro) for micro in plan[self.rank]),
            counts=count_step(lengths),
            groups_per_step=len(positions),
            epoch=order.epoch(positions.stop),
            num_tokens=sum(length.packed for length in lengths),
            describe=describe,
        )


def open_stores(stream: StoredStream) -> tuple[TokenStore, ...]:
    """The stores of a stream with their columns laid over them."""
    opened = []
    for path, overlays in zip(stream.stores, stream.columns, strict=True):
        store = TokenStore.open(path)
        for overlay in overlays:
            store = store.with_columns(overlay)
        opened.append(store)
    return tuple(opened)
