"""Groups of a step or of a round → this worker's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayalign.data.micro_batches import plan_step
from rayalign.data.pack import pack
from rayalign.data.rows import Layout
from rayalign.rounds.stored import Drawn
from rayalign.types import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Packer:
    """How one worker packs what all workers plan alike."""

    tokens_per_micro_batch: int
    row_tokens: int | None
    layout: Layout
    pad_id: int
    rank: int
    world_size: int

    def pack(self, drawn: Sequence[Drawn], *, positions: Sequence[int], num_candidates: int) -> tuple[PackedBatch, ...]:
        """This worker's part of ``drawn``, which have ``positions``; every worker has as many micro-batches.

        Raises PlanError where a group is too large for a micro-batch, naming its file and line.
        """
        plan = plan_step(
            [group.lengths for group in drawn],
            num_workers=self.world_size,
            tokens_per_micro_batch=self.tokens_per_micro_batch,
            row_tokens=self.row_tokens,
            layout=self.layout,
            describe=lambda slot: drawn[slot].name,
        )
        packed = []
        for micro in plan[self.rank]:
            batch = pack(
                [drawn[slot].read() for slot in micro.slots],
                positions=[positions[slot] for slot in micro.slots],
                num_candidates=num_candidates,
                pad_id=self.pad_id,
                row_tokens=self.row_tokens,
                layout=self.layout,
                dummy=micro.dummy,
            )
            packed.append(batch)
        return tuple(packed)
