"""The driver's side of rounds: draw what training asks for, and commit it before it is used. No Ray here."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rayalign.config.candidates import Drawing
from rayalign.data.store import TokenStore
from rayalign.errors import UserError
from rayalign.placement import Share
from rayalign.remarks import Remarks
from rayalign.rounds.chunk import REST, ChunkSpec
from rayalign.rounds.columns import RoundPreparation, prepare_columns
from rayalign.rounds.drawing import commit_drawn, draw_chunks
from rayalign.rounds.folder import Request, RoundFolder, poll_seconds
from rayalign.rounds.ledger import WHAT_DISTINGUISHES, Ledger, nothing_learned
from rayalign.rounds.plan import RoundPlan
from rayalign.rounds.weights import BOARD, WeightsGone
from rayalign.rounds.workers import PoolClosed, Workers
from rayalign.storage.manifest import MANIFEST, committed, discard
from rayalign.storage.place import Place, write_whole

log = logging.getLogger(__name__)

GONE_SECONDS = 600.0
RETRY_SECONDS = 0.5
"""Between attempts at a round whose weights are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutJob:
    """How a run's rounds are drawn."""

    spec: ChunkSpec
    plan: RoundPlan
    folder: Place
    most: int
    least: int
    """Actors; those above ``least`` are there only while there is something to draw."""
    share: Share
    drawing: Drawing
    max_bad_fraction: float
    alone: bool = False
    """The method learns from one completion of a prompt, by rewards that differ between prompts."""
    preparation: RoundPreparation | None = None
    """What the method makes of every round, once and for all workers."""
    board: str = BOARD
    """Where its trainer's workers and actors learn of weights."""


@contextlib.contextmanager
def serve_rounds(job: RolloutJob, pool: Workers, note: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, draw every round that its training asks for.

    A failure to draw reaches the training workers, which wait for the round, as their own UserError.
    """
    folder = RoundFolder(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    folder.failure.unlink(missing_ok=True)
    stop = threading.Event()

    def serve() -> None:
        gone: dict[str, float] = {}
        idle = Unlabelled(job, note)
        told = Remarks()
        try:
            while not stop.wait(poll_seconds(job.folder)):
                pool.release()
                for request in folder.requests()[:1]:
                    try:
                        draw_round(request, job, folder, pool, note, idle, told)
                    except WeightsGone as error:
                        await_another_attempt(error, gone)
        except PoolClosed:
            return
        except UserError as error:
            write_whole(folder.failure, str(error).encode())
        except BaseException:
            write_whole(folder.failure, f"rollouts failed:\n{traceback.format_exc()}".encode())

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    try:
        yield
    finally:
        stop.set()
        server.join()


def await_another_attempt(error: WeightsGone, gone: dict[str, float]) -> None:
    """The attempt that asked has died; the next one asks again, with weights of its own.

    Raises UserError when it does not: ``gone`` remembers since when each version is missing.
    """
    since = gone.setdefault(error.weights.version, time.monotonic())
    if time.monotonic() - since > GONE_SECONDS:
        raise UserError(
            f"{error}, and for {GONE_SECONDS:.0f} s no other process has asked for the round: look for what ended "
            "the training workers"
        )
    time.sleep(RETRY_SECONDS)


class Unlabelled:
    """Counts the rounds in a row from which nothing can be learned, and ends a run of them.

    A policy that earns nothing yet may have such rounds at first. But as no step on them moves it, only luck ends
    them: ``max_unlabelled_rounds`` in a row end the run, and so do all rounds of a run that has fewer. Where stored
    groups stand beside the fresh ones, they teach, and the round is only told of.
    """

    def __init__(self, job: RolloutJob, note: Callable[[str], None]) -> None:
        self.job = job
        self.note = note

    def see(self, number: int, ledger: Ledger) -> None:
        """Look at a round before it is committed; raises UserError where it is one too many."""
        if ledger.teaches(alone=self.job.alone):
            return
        rounds = 1
        while rounds <= number and self._was_idle(number - rounds):
            rounds += 1
        labelling = self.job.spec.labelling
        scorer, rule = labelling.scorer.label, labelling.label.name
        why = nothing_learned([ledger], scorer=scorer, rule=rule, shape=self.job.spec.shape)
        told = f"round {number + 1}/{self.job.plan.num_rounds}: {why}"
        if self.job.plan.fresh_fraction < 1:
            self.note(f"{told}; only the stored groups of its steps teach")
            return
        if rounds < min(self.job.drawing.policy.max_unlabelled_rounds, self.job.plan.num_rounds):
            self.note(f"{told}; its steps teach nothing")
            return
        in_a_row = f", in {rounds} rounds in a row" if rounds > 1 else ""
        raise UserError(
            f"{told}{in_a_row}: the run learns nothing. Start one of another name with {WHAT_DISTINGUISHES}; "
            "or allow more such rounds: data_policy.max_unlabelled_rounds"
        )

    def _was_idle(self, number: int) -> bool:
        """Whether the committed round ``number`` had nothing to learn from; of several, the newest."""
        stores = [path for path in self.job.folder.glob(f"round_{number:06d}-*") if (path / MANIFEST).exists()]
        if not stores:
            return False
        newest = max(stores, key=lambda path: (path / MANIFEST).stat().st_mtime)
        return not Ledger(**committed(newest)["meta"]["ledger"]).teaches(alone=self.job.alone)


def draw_round(
    request: Request,
    job: RolloutJob,
    folder: RoundFolder,
    pool: Workers,
    note: Callable[[str], None],
    idle: Unlabelled,
    told: Remarks,
) -> None:
    """Commit the round of a request, unless it was before, and forget the request and weights older than its own.

    ``told`` holds what the run's chunks have remarked so far. Raises UserError where too many rounds have nothing to
    learn from.
    """
    directory = folder.round(request)
    if not (directory / MANIFEST).exists():
        began = time.monotonic()
        positions = job.plan.round_positions(request.number)
        name = f"round {request.number + 1}/{job.plan.num_rounds}"
        reports = draw_chunks(
            job.spec,
            positions,
            directory,
            weights=request.weights,
            pool=pool,
            max_bad_fraction=job.max_bad_fraction,
            told=told,
            done=lambda text: note(f"{name}: {text}"),
        )
        if job.spec.options.takes_turns:
            pool.tell(REST)
        commit_drawn(
            directory,
            reports,
            max_bad_fraction=job.max_bad_fraction,
            look=lambda ledger: idle.see(request.number, ledger),
            weights=request.weights,
            request=request.to_json(),
            seconds=time.monotonic() - began,
        )
    if job.preparation is not None:
        columns = folder.prepared(request, job.preparation.key)
        if not (columns / MANIFEST).exists():
            prepare_columns(TokenStore.open(directory), columns, job.preparation)
    for weights in folder.weights.glob("step_*"):
        if int(weights.name[5:].partition("-")[0]) < request.weights.step:
            discard(weights)
    folder.answer(request)
