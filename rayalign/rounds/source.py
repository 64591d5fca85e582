"""For any step, the micro-batches of this worker, whatever the data policy."""

from __future__ import annotations

from rayalign.data.micro_batches import check_budget, count_step
from rayalign.data.rows import Layout
from rayalign.data.store import TokenStore
from rayalign.engine.batches import StreamWork
from rayalign.errors import UserError
from rayalign.rounds.client import RoundsClient
from rayalign.rounds.mixed import MixedGroups
from rayalign.rounds.packing import Packer
from rayalign.rounds.stored import StoredGroups
from rayalign.rounds.streams import AnyStream, MixedStream, RoundStream, SourceSpec, StoredStream, round_part

Groups = StoredGroups | RoundsClient | MixedGroups


class StreamSource:
    """The :class:`rayalign.engine.batches.Batches` of a run, as one worker sees them.

    ``rounds`` is the client that reads the run's rounds, where it draws any.

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
        rounds: RoundsClient | None = None,
    ) -> None:
        self.spec = spec
        self.rounds = rounds
        self.stores: list[TokenStore] = []
        """Everything that is stored already and trained on."""
        self.groups: dict[str, Groups] = {stream.name: self._open(stream) for stream in spec.streams}
        self.packer = Packer(
            tokens_per_micro_batch=spec.tokens_per_micro_batch,
            row_tokens=spec.row_tokens,
            layout=layout,
            pad_id=pad_id,
            rank=rank,
            world_size=world_size,
        )
        for store in self.stores:
            check_budget(
                store, tokens_per_micro_batch=spec.tokens_per_micro_batch, row_tokens=spec.row_tokens, layout=layout
            )

    def get(self, step: int) -> tuple[StreamWork, ...]:
        """Work of step ``step`` (from 0), one entry per stream; waits for groups that are being drawn."""
        return tuple(self._work(stream, step) for stream in self.spec.streams)

    def _open(self, stream: AnyStream) -> Groups:
        if isinstance(stream, MixedStream):
            fresh = self._open_part(stream.fresh)
            return MixedGroups(stream, fresh=fresh, stored=self._open_stored(stream.stored))
        return self._open_part(stream)

    def _open_part(self, stream: StoredStream | RoundStream) -> StoredGroups | RoundsClient:
        if isinstance(stream, StoredStream):
            return self._open_stored(stream)
        if self.rounds is None:
            raise ValueError(f"stream {stream.name!r} is drawn round by round, and there is no client of its rounds")
        return self.rounds

    def _open_stored(self, stream: StoredStream) -> StoredGroups:
        groups = StoredGroups(stream, self.spec.seed)
        self.stores.extend(groups.stores)
        return groups

    def _work(self, stream: AnyStream, step: int) -> StreamWork:
        groups = self.groups[stream.name]
        every = groups.of_step(step)
        first = step * len(every)  # every step of a stream has the same number of groups
        # A prompt without candidates was quarantined when they were made: it has its place and teaches nothing.
        kept = [slot for slot, group in enumerate(every) if group.lengths.candidates]
        drawn = [every[slot] for slot in kept]
        lengths = [group.lengths for group in drawn]
        if not drawn:
            raise UserError(f"step {step + 1} has no group to train on: all {len(every)} prompts were quarantined")
        rounds = self.rounds if round_part(stream) is not None else None
        return StreamWork(
            stream=stream.name,
            micro_batches=self.packer.pack(
                drawn, positions=[first + slot for slot in kept], num_candidates=num_candidates(stream)
            ),
            counts=count_step(lengths),
            groups_per_step=len(every),
            epoch=groups.epoch(step),
            num_tokens=sum(length.packed for length in lengths),
            describe=lambda position: every[position - first].name,
            facts=rounds.facts(step) if rounds is not None else {},
        )


def num_candidates(stream: AnyStream) -> int:
    """K of the stream's batches."""
    if isinstance(stream, MixedStream):
        return max(stream.fresh.num_candidates, stream.stored.num_candidates)
    return stream.num_candidates
