"""Stored groups as they are, all or those that a filter keeps, in the order of one stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayalign.data.group import Group, GroupLengths
from rayalign.data.select import Rows, read_selected_rows
from rayalign.data.store import TokenStore
from rayalign.data.stream import Stream, WindowedOrder
from rayalign.rounds.streams import StoredStream


@dataclass(frozen=True, slots=True)
class Drawn:
    """One group of a step and where it lies; it is read when it is packed."""

    store: TokenStore
    row: int

    @property
    def lengths(self) -> GroupLengths:
        return self.store.lengths(self.row)

    @property
    def name(self) -> str:
        return self.store.index.name(self.row)

    def read(self) -> Group:
        return self.store[self.row]


class StoredGroups:
    """An opened :class:`StoredStream`."""

    def __init__(self, stream: StoredStream, seed: int) -> None:
        self.stores = open_stores(stream)
        self.kept = kept_rows(stream, self.stores)
        self.order = order_of(stream, self.stores, self.kept, seed)

    def of_step(self, step: int) -> list[Drawn]:
        """The groups of ``step``."""
        return self.at(self.order.positions(step))

    def at(self, positions: range) -> list[Drawn]:
        self._fetch_ahead(positions)
        rows = (self.order.row(position) for position in positions)
        return [Drawn(self.stores[source], int(self.kept[source][row])) for source, row in rows]

    def _fetch_ahead(self, positions: range) -> None:
        last = {source: place for source, *place in map(self.order.place, positions)}
        for source, (epoch, index) in last.items():
            self.stores[source].fetch_ahead(self.order.orders[source].needed(epoch, index))

    def epoch(self, step: int) -> float:
        """Epochs finished when ``step`` ends."""
        return self.order.epoch(self.order.positions(step).stop)


def kept_rows(stream: StoredStream, stores: Sequence[TokenStore]) -> tuple[Rows | range, ...]:
    """The rows of every store that the stream draws."""
    return tuple(map(read_selected_rows, stream.kept)) or tuple(range(len(store)) for store in stores)


def order_of(stream: StoredStream, stores: Sequence[TokenStore], kept: Sequence[Rows | range], seed: int) -> Stream:
    """Which of the kept rows has which position."""
    orders = (
        WindowedOrder(seed, f"{stream.name}/{number}", rows_by_shard(store, rows), stream.window)
        for number, (store, rows) in enumerate(zip(stores, kept, strict=True))
    )
    return Stream(
        name=stream.name,
        sizes=tuple(map(len, kept)),
        weights=stream.weights,
        groups_per_step=stream.groups_per_step,
        seed=seed,
        orders=tuple(orders),
    )


def rows_by_shard(store: TokenStore, rows: Rows | range) -> list[int]:
    """How many of ``rows`` lie in each shard."""
    firsts = [shard.first for shard in store.tokens.shards] + [len(store)]
    ends = firsts if isinstance(rows, range) else np.searchsorted(rows, firsts)
    sizes: list[int] = np.diff(ends).tolist()
    return sizes


def drawn_rows(stream: StoredStream) -> tuple[Rows | range, ...]:
    """:func:`kept_rows` of a stream that is not open."""
    return kept_rows(stream, [TokenStore.open(store) for store in stream.stores])


def opened_order(stream: StoredStream, seed: int) -> Stream:
    """:func:`order_of` a stream that is not open."""
    stores = [TokenStore.open(store) for store in stream.stores]
    return order_of(stream, stores, kept_rows(stream, stores), seed)


def open_stores(stream: StoredStream) -> tuple[TokenStore, ...]:
    """The stores of a stream with their columns laid over them."""
    opened = []
    for path, overlays in zip(stream.stores, stream.columns, strict=True):
        store = TokenStore.open(path)
        for overlay in overlays:
            store = store.with_columns(overlay)
        opened.append(store)
    return tuple(opened)
