"""Fresh and stored groups in the same step."""

from __future__ import annotations

from rayalign.data.stream import hybrid_positions
from rayalign.rounds.client import RoundsClient
from rayalign.rounds.stored import Drawn, StoredGroups
from rayalign.rounds.streams import MixedStream


class MixedGroups:
    """An opened :class:`MixedStream`: first the fresh groups of a step, then the stored ones."""

    def __init__(self, stream: MixedStream, *, fresh: StoredGroups | RoundsClient, stored: StoredGroups) -> None:
        self.stream = stream
        self.fresh = fresh
        self.stored = stored

    def of_step(self, step: int) -> list[Drawn]:
        """The groups of ``step``."""
        fresh, stored = hybrid_positions(
            step, groups_per_step=self.stream.groups_per_step, fresh_fraction=self.stream.fresh_fraction
        )
        drawn = self.fresh.of_step(step) if isinstance(self.fresh, RoundsClient) else self.fresh.at(fresh)
        return [*drawn, *self.stored.at(stored)]

    def epoch(self, step: int) -> float:
        """Epochs of the stored groups finished when ``step`` ends."""
        _, stored = hybrid_positions(
            step, groups_per_step=self.stream.groups_per_step, fresh_fraction=self.stream.fresh_fraction
        )
        return self.stored.order.epoch(stored.stop)
