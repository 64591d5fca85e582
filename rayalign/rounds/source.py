"""For any step, the micro-batches of this worker, whatever the data policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayalign.data.micro_batches import MicroBatch, check_budget, count_step, plan_step
from rayalign.data.pack import pack
from rayalign.data.rows import Layout
from rayalign.data.store import TokenStore
from rayalign.engine.batches import Rounds, RoundWork, State, StreamWork, Weights
from rayalign.errors import UserError
from rayalign.rounds.client import FreshGroups
from rayalign.rounds.mixed import MixedGroups
from rayalign.rounds.stored import Drawn, StoredGroups
from rayalign.rounds.streams import AnyStream, MixedStream, RoundStream, SourceSpec, StoredStream
from rayalign.rounds.weights import WeightChannel
from rayalign.types import PackedBatch

Groups = StoredGroups | FreshGroups | MixedGroups


class StreamSource:
    """The :class:`rayalign.engine.batches.GroupSource` of a run, as one worker sees it.

    Raises:
        PlanError: a stored group is too large for a micro-batch; its file and line are in the message.
    """

    def __init__(
        self,
        spec: SourceSpec,
        *,
        layout: Layout,
        pad_id: int,
        rank: int = 0,
        world_size: int = 1,
        channel: WeightChannel | None = None,
    ) -> None:
        self.spec = spec
        self.channel = channel
        self.layout: Layout = layout
        self.pad_id = pad_id
        self.rank = rank
        self.world_size = world_size
        self.groups: dict[str, Groups] = {stream.name: self._open(stream) for stream in spec.streams}
        for store in self.stores:
            check_budget(
                store, tokens_per_micro_batch=spec.tokens_per_micro_batch, row_tokens=spec.row_tokens, layout=layout
            )

    def get(self, step: int) -> tuple[StreamWork, ...]:
        """Work of step ``step`` (from 0), one entry per stream; waits for groups that are being drawn."""
        return tuple(self._work(stream, step) for stream in self.spec.streams)

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """Everything that is stored already and trained on."""
        parts = (part for groups in self.groups.values() for part in _parts(groups))
        return tuple(store for part in parts if isinstance(part, StoredGroups) for store in part.stores)

    # Following the policy: see rayalign.engine.batches.FollowsPolicy.

    def wants_weights(self, step: int) -> bool:
        return any(part.wants_weights(step) for part in self._fresh)

    def weights_folder(self, step: int, attempt: str, *, written: bool) -> Path | None:
        return self._fresh[0].weights_folder(step, attempt, written=written)

    def send(self, weights: Weights, state: State) -> None:
        self._fresh[0].send(weights, state)

    def follow(self, weights: Weights) -> None:
        for part in self._fresh:
            part.follow(weights)

    def opens_round(self, step: int) -> bool:
        return any(part.opens_round(step) for part in self._fresh)

    def wait(self, step: int, stop: Callable[[], bool]) -> bool:
        return all(part.wait(step, stop) for part in self._fresh)

    def state(self, step: int) -> dict[str, Any]:
        return self._fresh[0].state(step) if self._fresh else {}

    def rounds(self, step: int) -> Rounds:
        return self._fresh[0].rounds(step) if self._fresh else Rounds()

    def restore(self, state: Mapping[str, Any]) -> None:
        for part in self._fresh:
            part.restore(state)

    # A critic's values of rounds: see rayalign.engine.batches.TakesValues.

    def place(self, step: int) -> tuple[int, int]:
        plan = self._fresh[0].plan
        return plan.round_of(step), plan.pass_of(step)

    def whole_round(self, step: int) -> RoundWork:
        store = self._fresh[0].round_store(step)
        lengths = [store.lengths(row) for row in range(len(store))]
        rows = [row for row, length in enumerate(lengths) if length.candidates]
        drawn = [Drawn(store, row) for row in rows]
        plan = self._plan(drawn)
        tokens = torch.from_numpy(store.index.num_predicted)
        return RoundWork(
            micro_batches=tuple(
                self._packed(micro, drawn, rows, self._fresh[0].num_candidates) for micro in plan[self.rank]
            ),
            first_token=tokens.cumsum(0) - tokens,
            num_tokens=int(tokens.sum()),
        )

    def commit_values(self, step: int, version: str, values: Tensor) -> None:
        self._fresh[0].commit_values(step, version, values)

    def use_values(self, step: int, version: str) -> None:
        self._fresh[0].use_values(step, version)

    @property
    def _fresh(self) -> list[FreshGroups]:
        return [part for groups in self.groups.values() for part in _parts(groups) if isinstance(part, FreshGroups)]

    def _open(self, stream: AnyStream) -> Groups:
        if isinstance(stream, StoredStream):
            return StoredGroups(stream, self.spec.seed)
        if isinstance(stream, RoundStream):
            return FreshGroups(stream, self.spec.seed, rank=self.rank, channel=self.channel)
        fresh = self._open(stream.fresh)
        assert not isinstance(fresh, MixedGroups)
        return MixedGroups(stream, fresh=fresh, stored=StoredGroups(stream.stored, self.spec.seed))

    def _work(self, stream: AnyStream, step: int) -> StreamWork:
        groups = self.groups[stream.name]
        every = groups.draw(step)
        first = step * len(every)  # every step of a stream has the same number of groups
        # A prompt without candidates was quarantined when they were made: it has its place and teaches nothing.
        kept = [slot for slot, group in enumerate(every) if group.lengths.candidates]
        drawn = [every[slot] for slot in kept]
        lengths = [group.lengths for group in drawn]
        if not drawn:
            raise UserError(f"step {step + 1} has no group to train on: all {len(every)} prompts were quarantined")
        plan = self._plan(drawn)
        fresh = [part for part in _parts(groups) if isinstance(part, FreshGroups)]
        return StreamWork(
            stream=stream.name,
            micro_batches=tuple(
                self._packed(micro, drawn, [first + slot for slot in kept], num_candidates(stream))
                for micro in plan[self.rank]
            ),
            counts=count_step(lengths),
            groups_per_step=len(every),
            epoch=groups.epoch(step),
            num_tokens=sum(length.packed for length in lengths),
            describe=lambda position: every[position - first].name,
            facts=fresh[0].facts(step) if fresh else {},
        )

    def _plan(self, drawn: Sequence[Drawn]) -> tuple[tuple[MicroBatch, ...], ...]:
        """The micro-batches of every worker."""
        return plan_step(
            [group.lengths for group in drawn],
            num_workers=self.world_size,
            tokens_per_micro_batch=self.spec.tokens_per_micro_batch,
            row_tokens=self.spec.row_tokens,
            layout=self.layout,
            describe=lambda slot: drawn[slot].name,
        )

    def _packed(
        self, micro: MicroBatch, drawn: Sequence[Drawn], positions: Sequence[int], candidates: int
    ) -> PackedBatch:
        return pack(
            [drawn[slot].read() for slot in micro.slots],
            positions=[positions[slot] for slot in micro.slots],
            num_candidates=candidates,
            pad_id=self.pad_id,
            row_tokens=self.spec.row_tokens,
            layout=self.layout,
            dummy=micro.dummy,
        )


def num_candidates(stream: AnyStream) -> int:
    """K of the stream's batches."""
    if isinstance(stream, MixedStream):
        return max(stream.fresh.num_candidates, stream.stored.num_candidates)
    return stream.num_candidates


def _parts(groups: Groups) -> tuple[StoredGroups | FreshGroups, ...]:
    return (groups.fresh, groups.stored) if isinstance(groups, MixedGroups) else (groups,)
