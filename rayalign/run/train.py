"""``rayalign train``: from a YAML to a committed model, in stages that are shared and can be resumed."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from rayalign.config.dump import dump
from rayalign.config.load import load_run
from rayalign.config.run import RunConfig
from rayalign.engine.checkpoint.checkpoint import identity_differences
from rayalign.engine.model.lora import refuse_missing_peft
from rayalign.engine.strategy.deepspeed import refuse_missing_deepspeed
from rayalign.errors import MissingExtra, Stopped, UserError, first_line
from rayalign.judge import scorer_of
from rayalign.report.status import read_run_json
from rayalign.rollout.engines import refuse_missing_engine
from rayalign.rounds.label import own_rule
from rayalign.rounds.service import serve_rounds
from rayalign.rounds.stored import drawn_rows
from rayalign.rounds.streams import StoredStream, stored_parts
from rayalign.run.display import ProgressBoard
from rayalign.run.job import make_job, zero_file
from rayalign.run.provenance import provenance
from rayalign.run.readers import export_facts, export_sentences, refuse_unusable_models
from rayalign.run.resolve import resolve_run
from rayalign.run.stages import Stages, filter_facts
from rayalign.runtime.gauges import Gauges
from rayalign.runtime.session import connect
from rayalign.runtime.trainer import Trainer
from rayalign.runtime.worker import TrainJob
from rayalign.stop import stopping
from rayalign.storage.artifacts import Artifacts
from rayalign.storage.lease import lease
from rayalign.storage.manifest import read_manifest, write_durably
from rayalign.storage.place import Place, listed
from rayalign.storage.progress import watching

KEPT_FAILURES = 20
FOLDERS = ("", "checkpoints", "final", "rounds")
FILES = ("run.json", "metrics.jsonl", "train.log", "quarantine.jsonl")
"""What a run keeps in its folder."""


def train(path: Path | None, overrides: list[str], *, fresh: frozenset[str], console: Console) -> Place:
    """Train the run that ``path`` and ``overrides`` describe; returns the exported model's directory."""
    folder = import_folder(path)
    sys.path.insert(0, str(folder))
    run = load_run(path, overrides)
    refuse_unsupported(run)
    refuse_unusable_models(run)
    with connect(import_paths=[folder]) as session, ProgressBoard(console, Gauges().set) as board, stopping() as stop:
        session.vital.stop = stop
        storage = session.storage(run.storage_path)
        stages = Stages(artifacts=Artifacts(root=storage / "artifacts", fresh=fresh, note=board.say), session=session)
        job = make_job(run, storage / run.name, stages, processes=resolve_run(run, session).processes, label=run.name)
        with Trainer(stop=stop) as trainer:
            final = run_job(run, job, trainer, board)
            board.say(f"model: {final}")
            session.vital.settle()
    return final


def run_job(run: RunConfig, job: TrainJob, trainer: Trainer, board: ProgressBoard) -> Place:
    """Train one run whose stages are committed and return its ``final/``; a finished run is not done again."""
    refuse_obstacles(job.spec.directory)
    with lease(job.spec.directory):
        if is_finished_run(job):
            board.say(f"{job.run}: finished before, see {job.spec.directory / 'final'}")
            return job.spec.directory / "final"
        history = History.of(job)
        note = partial(write_run_json, run, job, history)
        note("running")
        collect_run_quarantine(job)
        for line in export_sentences(run):
            board.say(f"{job.run}: {line}")
        board.start(job.run, job.spec.steps)
        with contextlib.ExitStack() as stack:
            stack.enter_context(watching(job.spec.directory, row=partial(board.row, job.run), note=board.say))
            if job.rollouts is not None:
                tell = partial(say_of_run, job.run, board)
                stack.enter_context(serve_rounds(job.rollouts, trainer.rollout_pool(job.rollouts), tell))
            try:
                with trainer.stop.patience():
                    final = trainer.fit(job, lost=partial(note_lost_attempt, history, note))
            except Stopped as stopped:
                trainer.close_rollouts()  # what they draw is not waited for; the next attempt continues with it
                note("stopped")
                raise Stopped(f"{job.run}: {stopped}") from stopped
            except KeyboardInterrupt:
                trainer.close_rollouts()
                raise
            except Exception as error:
                history.fail(first_line(error))
                note("failed")
                raise
        collect_run_quarantine(job)
        note("finished")
        return final


def note_lost_attempt(history: History, note: Callable[[str], None], reason: str) -> None:
    """Write down that an attempt was lost and the next one begins."""
    history.fail(reason)
    history.attempts += 1
    note("running")


def say_of_run(run: str, board: ProgressBoard, line: str) -> None:
    board.say(f"{run}: {line}")


def refuse_unsupported(run: RunConfig) -> None:
    if run.model.lora is not None:
        refuse_missing_peft()
    if run.strategy.name == "deepspeed":
        refuse_missing_deepspeed()
        zero_file(run)
    if run.rollout is not None:
        refuse_missing_engine(run.rollout.engine, run.rollout.python, transfer=run.rollout.transfer)
    if run.evaluation_engine == "vllm" and (run.rollout is None or run.rollout.engine != "vllm"):
        refuse_missing_engine("vllm")
    if run.scorer is not None:
        scorer_of(run.scorer)  # what is misspelt is said now, not after hours
    if run.label is not None:
        own_rule(run.label)
    for tracker in run.track:
        if importlib.util.find_spec(tracker) is None:
            raise MissingExtra(tracker, "tracking")


def import_folder(path: Path | None) -> Path:
    """Where the user's own modules are searched: beside the YAML, or in the current folder."""
    return path.resolve().parent if path is not None else Path.cwd()


def refuse_obstacles(directory: Place) -> None:
    """Raise UserError where a file has the name of one of the run's folders, or a folder that of a file."""
    for name in FOLDERS:
        if (directory / name).exists() and not (directory / name).is_dir():
            raise UserError(f"{directory / name} is a file, and the run needs a folder there: remove or rename it")
    for name in FILES:
        if (directory / name).is_dir():
            raise UserError(f"{directory / name} is a folder, and the run needs a file there: remove or rename it")


def is_finished_run(job: TrainJob) -> bool:
    """Whether ``final/`` is this very run's; another configuration's is refused."""
    manifest = read_manifest(job.spec.directory / "final")
    if manifest is None:
        return False
    changed = identity_differences(manifest["identity"], job.spec.identity)
    if changed:
        raise UserError(
            f"{job.spec.directory} holds a finished run of another configuration ({'; '.join(changed)}): "
            "give this run another name, or remove that folder"
        )
    return True


@dataclass(slots=True, kw_only=True)
class History:
    """What happened to a run so far, in this command and those before."""

    started: str
    """This command; ISO 8601."""
    attempts: int
    """Times that a command began with it or its workers were lost."""
    failures: list[str]
    """Why each attempt ended that neither finished nor was asked to stop, the newest ones."""

    @classmethod
    def of(cls, job: TrainJob) -> History:
        """Continue the run's own ``run.json``; a command that left no last word was lost."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        path = job.spec.directory / "run.json"
        before = read_run_json(path) if path.exists() else {}
        if identity_differences(before.get("identity", {}), job.spec.identity):
            before = {}
        history = cls(started=now, attempts=before.get("attempts", 0), failures=before.get("failures", []))
        if before.get("status") == "running":
            history.fail("the command was lost")
        history.attempts += 1
        return history

    @classmethod
    def waiting(cls) -> History:
        """History of a run that no command has begun."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(started=now, attempts=0, failures=[])

    def fail(self, reason: str) -> None:
        self.failures = [*self.failures, f"attempt {self.attempts}: {reason}"][-KEPT_FAILURES:]


def write_run_json(run: RunConfig, job: TrainJob, history: History, status: str) -> None:
    """``run.json``: what was asked, what it ran on, and how far it is."""
    facts = {
        "name": run.name,
        "status": status,
        "attempts": history.attempts,
        "failures": history.failures,
        "started": history.started,
        "updated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": run.seed,
        "steps": job.spec.steps,
        "workers": job.workers if job.fewest is None else [job.fewest, job.workers],
        "threads_per_worker": job.share.threads,
        "config_version": run.config_version,
        "configuration": dump(run),
        "identity": dict(job.spec.identity),
        "export": export_facts(run),
        "data": data_facts(job),
        "stages": [stage.name for stage in job.stages],
        **provenance(),
    }
    write_durably(job.spec.directory / "run.json", json.dumps(facts, indent=1) + "\n")


def announce_run(run: RunConfig, job: TrainJob) -> None:
    """Say in ``run.json`` that a run will begin, so that its stages are kept meanwhile; one that had begun says so."""
    path = job.spec.directory / "run.json"
    if path.exists() and read_run_json(path).get("status") != "waiting":
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_run_json(run, job, History.waiting(), "waiting")


def collect_run_quarantine(job: TrainJob) -> None:
    """``quarantine.jsonl``: the bad rows of every store that the run reads; no bad row, no file."""
    found = [
        path.read_text(encoding="utf-8") for store in stores_of(job) if (path := store / "quarantine.jsonl").exists()
    ]
    if found:
        write_durably(job.spec.directory / "quarantine.jsonl", "".join(found))


def data_facts(job: TrainJob) -> list[dict[str, Any]]:
    """Rows, shards, nodes and bytes of each store that the run reads, as its preparation counted them.

    Of a store that a filter has chosen from, also what it kept of it, and what the filter did to all of them.
    """
    manifests = {store: read_manifest(store) for store in stores_of(job)}
    chosen: dict[Place, dict[str, Any]] = {}
    for part in stored_streams(job):
        if part.kept:
            for store, rows, file in zip(part.stores, drawn_rows(part), part.kept, strict=True):
                chosen[store] = {"kept": len(rows), "filter": filter_facts(file.parent)}
    return [
        {
            "store": str(store),
            "digest": manifest["digest"],
            **manifest["meta"].get("preparation", {}),
            **chosen.get(store, {}),
        }
        for store, manifest in manifests.items()
        if manifest is not None
    ]


def stored_streams(job: TrainJob) -> list[StoredStream]:
    return list(chain.from_iterable(stored_parts(stream) for stream in job.source.streams))


def filter_of(job: TrainJob) -> dict[str, Any] | None:
    """What the run's filter did; None where it has none."""
    files = list(chain.from_iterable(part.kept for part in stored_streams(job)))
    return filter_facts(files[0].parent) if files else None


def stores_of(job: TrainJob) -> list[Place]:
    """Every committed store that a run has read: of groups, of prompts, and its rounds so far."""
    rounds = listed(job.rollouts.folder, "round_*") if job.rollouts is not None else []
    return list(dict.fromkeys([*chain.from_iterable(part.stores for part in stored_streams(job)), *rounds]))
