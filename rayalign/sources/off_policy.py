"""Stored groups as they are, in the order of one stream."""

from __future__ import annotations

from dataclasses import dataclass

from rayalign.data.group import Group, GroupLengths
from rayalign.data.store import TokenStore
from rayalign.data.stream import Stream
from rayalign.sources.streams import StoredStream


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
        self.order = Stream(
            name=stream.name,
            sizes=tuple(len(store) for store in self.stores),
            weights=stream.weights,
            groups_per_step=stream.groups_per_step,
            seed=seed,
        )

    def draw(self, step: int) -> list[Drawn]:
        """The groups of ``step``."""
        return self.at(self.order.positions(step))

    def at(self, positions: range) -> list[Drawn]:
        rows = (self.order.row(position) for position in positions)
        return [Drawn(self.stores[source], row) for source, row in rows]

    def epoch(self, step: int) -> float:
        """Epochs finished when ``step`` ends."""
        return self.order.epoch(self.order.positions(step).stop)


def open_stores(stream: StoredStream) -> tuple[TokenStore, ...]:
    """The stores of a stream with their columns laid over them."""
    opened = []
    for path, overlays in zip(stream.stores, stream.columns, strict=True):
        store = TokenStore.open(path)
        for overlay in overlays:
            store = store.with_columns(overlay)
        opened.append(store)
    return tuple(opened)
