"""The rounds of a run as its training workers see them: asked for with their weights, then read like any store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rayalign.data.rows import Layout
from rayalign.data.store import TokenStore
from rayalign.data.stream import Stream
from rayalign.engine.batches import RoundWork, State, Weights
from rayalign.errors import UserError
from rayalign.rounds.columns import prepare_columns
from rayalign.rounds.folder import Request, RoundFolder, poll_seconds
from rayalign.rounds.packing import Packer
from rayalign.rounds.stored import Drawn
from rayalign.rounds.streams import SourceSpec, round_part
from rayalign.rounds.weights import WeightChannel
from rayalign.storage.manifest import MANIFEST, committed, read_manifest
from rayalign.storage.place import Place

log = logging.getLogger(__name__)

WAIT_SECONDS = 3600.0
TELL_SECONDS = 60.0


class RoundsClient:
    """The :class:`rayalign.engine.batches.Rounds` of a run, as one worker sees them; rank 0 does the asking for all.

    Raises ValueError unless exactly one stream of ``spec`` is drawn round by round.
    """

    def __init__(
        self, spec: SourceSpec, *, rank: int = 0, world_size: int = 1, channel: WeightChannel | None = None
    ) -> None:
        parts = [part for stream in spec.streams if (part := round_part(stream)) is not None]
        if len(parts) != 1:
            raise ValueError(f"a run draws the rounds of one stream, not of {len(parts)}")
        stream = parts[0]
        self.spec = spec
        self.world_size = world_size
        self.plan = stream.plan
        self.channel = channel
        self.prepared = stream.prepared
        self.preparation = stream.preparation
        self.num_candidates = stream.num_candidates
        self.folder = RoundFolder(stream.folder)
        self.rank = rank
        self.requests: dict[int, Request] = {}
        """By round: the weights that it must be drawn with."""
        self.opened: tuple[int, TokenStore, Mapping[str, int | float]] | None = None
        sizes = tuple(len(TokenStore.open(store)) for store in stream.prompts.stores)
        self.order = Stream(
            name=stream.prompts.name,
            sizes=sizes,
            weights=stream.prompts.weights,
            groups_per_step=stream.plan.groups_per_step,
            seed=spec.seed,
        )

    def of_step(self, step: int) -> list[Drawn]:
        """The groups of ``step``; waits for their round."""
        number = self.plan.round_of(step)
        store, _ = self._open(number)
        first = self.plan.round_positions(number).start
        return [Drawn(store, position - first) for position in self.plan.positions(step)]

    def epoch(self, step: int) -> float:
        """Passes over the prompts finished when ``step`` ends."""
        return self.order.epoch(self.plan.positions(step).stop)

    def facts(self, step: int) -> Mapping[str, int | float]:
        """What is known of the round of ``step``, for the row of metrics."""
        number = self.plan.round_of(step)
        return {"round": number, **self._open(number)[1]}

    # The weights that rounds are drawn with.

    def wants_weights(self, step: int) -> bool:
        return len(self.plan.rounds_drawn_at(step)) > 0

    def weights_folder(self, step: int, attempt: str, *, written: bool) -> Place | None:
        """A round that lags may still be wanted after a restart, which then no longer has its weights."""
        if self.channel is not None and self.plan.lag == 0 and not written:
            return None
        return self.folder.weights / f"step_{step:06d}-{attempt}"

    def send(self, weights: Weights, state: State) -> None:
        if self.channel is not None:
            self.channel.send(weights, state)

    def follow(self, weights: Weights) -> None:
        """Ask for the rounds that are to be drawn with ``weights``."""
        for number in self.plan.rounds_drawn_at(weights.step):
            self._ask(Request(number=number, weights=weights))

    # Their arrival.

    def opens_round(self, step: int) -> bool:
        return self.opened is None or self.opened[0] != self.plan.round_of(step)

    def wait(self, step: int, stop: Callable[[], bool]) -> bool:
        """Whether the round of ``step`` came before ``stop`` said that the wait is over."""
        return all(
            wait_for(directory, self._failure, stop) for directory in self._directories(self.plan.round_of(step))
        )

    def state(self, step: int) -> dict[str, Any]:
        """The requests for rounds that are trained on from ``step`` on."""
        return {str(number): request.to_json() for number, request in self._needed(step).items()}

    def _needed(self, step: int) -> dict[int, Request]:
        """What later steps need and a restart does not ask for itself, as it does for what ``step``'s weights draw."""
        first = self.plan.round_of(step) if step < self.plan.steps else self.plan.num_rounds
        return {
            number: request
            for number, request in self.requests.items()
            if number >= first and request.weights.step < step
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue as the run that had ``state``, and ask again: another attempt may have asked for other weights."""
        for value in state.values():
            self._ask(self.folder.here(Request.from_json(value)))

    # What a critic says of rounds.

    def place(self, step: int) -> tuple[int, int]:
        """(round, pass over it) of ``step``."""
        return self.plan.round_of(step), self.plan.pass_of(step)

    def whole_round(self, step: int, *, layout: Layout, pad_id: int) -> RoundWork:
        """All groups of the round of ``step``, packed for this worker; waits for them."""
        store = self.round_store(step)
        rows = [row for row in range(len(store)) if store.lengths(row).candidates]
        packer = Packer(
            tokens_per_micro_batch=self.spec.tokens_per_micro_batch,
            row_tokens=self.spec.row_tokens,
            layout=layout,
            pad_id=pad_id,
            rank=self.rank,
            world_size=self.world_size,
        )
        tokens = torch.from_numpy(store.index.whole().num_predicted)
        return RoundWork(
            micro_batches=packer.pack(
                [Drawn(store, row) for row in rows], positions=rows, num_candidates=self.num_candidates
            ),
            first_token=tokens.cumsum(0) - tokens,
            num_tokens=int(tokens.sum()),
        )

    def round_store(self, step: int) -> TokenStore:
        """The round of ``step`` as it was drawn, or with its columns; waits for it."""
        return self._open(self.plan.round_of(step))[0]

    def commit_values(self, step: int, version: str, values: Tensor) -> None:
        """Make the columns of the round of ``step`` with the critic's values of its tokens [N]."""
        assert self.preparation is not None
        prepare_columns(self.round_store(step), self._columns(step, version), self.preparation, old_value=values)

    def use_values(self, step: int, version: str) -> None:
        """Lay the columns over the round of ``step``; waits for them."""
        number = self.plan.round_of(step)
        directory = self._columns(step, version)
        wait_for(directory, self._failure)
        store, facts = self._open(number)
        self.opened = (number, store.with_columns(directory), {**facts, **committed(directory)["meta"]["facts"]})

    def _columns(self, step: int, version: str) -> Place:
        assert self.preparation is not None
        request = self.requests[self.plan.round_of(step)]
        return self.folder.prepared(request, f"{self.preparation.key}-{version}")

    def _ask(self, request: Request) -> None:
        self.requests[request.number] = request
        if self.rank == 0:
            self.folder.ask(request)

    def _open(self, number: int) -> tuple[TokenStore, Mapping[str, int | float]]:
        if self.opened is None or self.opened[0] != number:
            directory, *columns = self._directories(number)
            for awaited in (directory, *columns):
                wait_for(awaited, self._failure)
            manifest = read_manifest(directory)
            assert manifest is not None
            store = TokenStore.open(directory)
            for laid_over in columns:
                store = store.with_columns(laid_over)
            self.opened = (number, store, manifest["meta"]["facts"])
            self.requests = {later: request for later, request in self.requests.items() if later >= number}
        return self.opened[1], self.opened[2]

    def _directories(self, number: int) -> list[Place]:
        """What the driver commits of a round: its groups, and the columns that a method makes of them."""
        request = self.requests[number]
        columns = [self.folder.prepared(request, self.prepared)] if self.prepared is not None else []
        return [self.folder.round(request), *columns]

    def _failure(self) -> str:
        return self.folder.failure.read_text(encoding="utf-8") if self.folder.failure.exists() else ""


def client_of(
    spec: SourceSpec, *, rank: int = 0, world_size: int = 1, channel: WeightChannel | None = None
) -> RoundsClient | None:
    """The client of the rounds that ``spec`` draws; None where it draws none."""
    if all(round_part(stream) is None for stream in spec.streams):
        return None
    return RoundsClient(spec, rank=rank, world_size=world_size, channel=channel)


def wait_for(directory: Place, failure: Callable[[], str], stop: Callable[[], bool] = lambda: False) -> bool:
    """Return once ``directory`` is committed: True; or once ``stop`` says so: False.

    Raises UserError with the driver's message when it gave up, or after an hour, naming what was waited for.
    """
    began = told = time.monotonic()
    while not (directory / MANIFEST).exists():
        if message := failure():
            raise UserError(message)
        if stop():
            return False
        now = time.monotonic()
        if now - began > WAIT_SECONDS:
            raise UserError(
                f"training waited {WAIT_SECONDS / 60:.0f} minutes for {directory.name}, which the rollout pool of the "
                "driver draws: look for its messages, and give it more actors or fewer samples"
            )
        if now - told > TELL_SECONDS:
            log.warning("waiting for %s since %.0f s", directory.name, now - began)
            told = now
        time.sleep(poll_seconds(directory))
    return True
