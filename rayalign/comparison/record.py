"""What a comparison measured → the record that the report is written from."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from rayalign.comparison.baseline import baseline_label
from rayalign.config import resume
from rayalign.config.compare import Cell, Comparison
from rayalign.config.dump import diff, dump
from rayalign.config.run import RunConfig
from rayalign.config.scoring import ScorerConfig
from rayalign.data.stream import hybrid_positions
from rayalign.engine.metrics import read_metrics
from rayalign.judge.measure import Prompt
from rayalign.report import points as report
from rayalign.report.trials import Cost, TuningRecord
from rayalign.rounds.stored import drawn_rows
from rayalign.rounds.streams import MixedStream, RoundStream, StoredStream
from rayalign.run.identity import same_source
from rayalign.run.provenance import provenance
from rayalign.run.train import filter_of, stores_of
from rayalign.runtime.worker import TrainJob
from rayalign.storage.artifacts import digest_of
from rayalign.storage.manifest import committed, read_manifest

if TYPE_CHECKING:
    from rayalign.comparison.evaluate import Evaluation, Points

LEDGER = {
    "tokens_generated": "rollout/tokens",
    "labels": "rollout/labels",
    "scorer_calls": "rollout/scorer_calls",
}
"""What a round's ledger counts, as its rows of metrics call it."""
CURVE_METRICS_EXCLUDED = frozenset({"seconds", "seconds_waiting_for_data", "seconds_saving"})
KL_ESTIMATORS = (
    report.Measure(
        name="kl_rb",
        label="kl_rb",
        unit="nats per reply",
        description=(
            "KL(π‖π_ref), Rao–Blackwellised: along the policy's own samples at temperature 1, the exact KL of the"
            " next-token distributions over the whole vocabulary, summed over the tokens of a reply. Missing where the"
            " vocabularies of the two models differ in size."
        ),
    ),
    report.Measure(
        name="k1",
        label="k1",
        unit="nats per reply",
        description="The same by k1, of greater variance: log π − log π_ref of the policy's own samples.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """A cell on its way: its job once its stages are committed; once trained, its points or its failure.

    One that the budget has stopped has the points of what was trained.
    """

    cell: Cell
    run: RunConfig
    job: TrainJob | None
    points: tuple[Points, ...]
    failure: str
    stopped: str = ""
    """Where it was when the budget was used up: ``stopped at step 40 of 100: budget``."""


def comparison_record(
    comparison: Comparison,
    evaluation: Evaluation,
    reference: Points,
    baseline: Points | None,
    results: Sequence[CellResult],
    *,
    tuning: Sequence[TuningRecord] = (),
    started: datetime.datetime,
    command: Sequence[str],
) -> report.ComparisonRecord:
    """Everything that the report says, before any statistics."""
    config, spec = evaluation.config, evaluation.spec
    by_id = {result.cell.id: result for result in results}
    base = results[0].run
    entries = entry_labels(comparison.cells)

    def record_of(cell: Cell) -> report.CellRecord:
        if cell.id not in by_id:
            return skipped_cell(cell, base)
        return done_cell(by_id[cell.id], base, entries.get(cell.id, ""))

    return report.ComparisonRecord(
        name=comparison.name,
        text=report.ReportText(
            title=comparison.report.title or comparison.name,
            opening=comparison.report.opening,
            caveats=(*comparison.report.caveats, *assumptions(comparison)),
            kl_levels=comparison.report.kl_levels,
            curves=comparison.report.curves,
        ),
        scorers=tuple(scorer_measure(scorer) for scorer in config.scorers),
        diagnostics=tuple(scorer_measure(scorer) for scorer in config.diagnostics),
        judge=judge_measure(config.judge) if config.judge is not None else None,
        kl_estimators=KL_ESTIMATORS,
        prompt_sets=tuple(prompt_set(name, prompts) for name, prompts in spec.prompt_sets.items()),
        sampling=report.Sampling(
            seed=spec.sampling.seed,
            temperature=spec.sampling.temperature,
            max_new_tokens=spec.sampling.max_new_tokens,
            top_p=spec.sampling.top_p,
        ),
        reference=reference,
        baseline=report.Baseline(label=baseline_label(config.baseline), points=baseline) if baseline else None,
        cells=tuple(map(record_of, comparison.cells)),
        tuning=tuple(tuning),
        measured=evaluation.measured_by,
        provenance=record_provenance(results, started=started, command=command),
    )


def prompt_set(name: str, prompts: Sequence[Prompt]) -> report.PromptSet:
    return report.PromptSet(name=name, prompts=tuple(prompt.text for prompt in prompts))


def entry_labels(cells: Sequence[Cell]) -> dict[str, str]:
    """Cell id → what the tables call all cells that differ from it in ``seed`` only; of cells that have such others."""
    runs = [(cell, cell.run) for cell in cells if cell.run is not None]
    groups: dict[str, list[Cell]] = {}
    for cell, run in runs:
        same = {field: value for field, value in dump(run).items() if field not in ("name", "seed")}
        groups.setdefault(digest_of(same), []).append(cell)
    taken = set(chain.from_iterable((cell.id, cell.label) for cell in cells))
    found: dict[str, str] = {}
    seeds = {cell.id: run.seed for cell, run in runs}
    for group in groups.values():
        if len({seeds[cell.id] for cell in group}) < max(2, len(group)):
            continue  # one seed, or a run under two names, which is no replication
        first = group[0]
        shared = [label for axis, label in first.coordinates.items() if axis != "seed"]
        label = ", ".join(shared) or next(run.display_name for cell, run in runs if cell is first)
        label = f"{label} (all seeds)" if label in taken else label
        taken.add(label)
        found |= {cell.id: label for cell in group}
    return found


def assumptions(comparison: Comparison) -> list[str]:
    """What cells take for granted about their data, as sentences for the report."""
    runs = [(cell.label, cell.run) for cell in comparison.cells if cell.run is not None]
    found = [
        f"{label}: completions without behavior log-probabilities count as drawn from the reference."
        for label, run in runs
        if getattr(run.method.config, "behavior", "") == "assume_reference"
    ]
    evaluate = next((run.evaluate for _, run in runs if run.evaluate), None)
    if evaluate is not None:
        shown: list[tuple[ScorerConfig, str]] = [(scorer, "is shown here as a result") for scorer in evaluate.scorers]
        shown += [(evaluate.judge, "decides wins here")] if evaluate.judge is not None else []
        for scorer, use in shown:
            labels = [label for label, run in runs if run.scorer is not None and same_source(run.scorer, scorer)]
            if labels:
                found.append(
                    f"{scorer.label} scored completions that {', '.join(labels)} trained on, and {use} as well: a gain "
                    "under it alone says little."
                )
    return found


def scorer_measure(scorer: ScorerConfig) -> report.Measure:
    return report.Measure(
        name=scorer.label,
        label=scorer.label.replace("_", " "),
        unit=getattr(scorer, "unit", ""),
        description=getattr(scorer, "description", ""),
    )


def judge_measure(judge: ScorerConfig) -> report.Measure:
    """A judge as the report explains it."""
    if judge.name == "llm":
        how = (
            "As judge: sees both replies in both orders, and the mean of the two verdicts counts; one that turns with "
            "the order counts as a half."
        )
    else:
        how = "As judge: the reply with the higher score wins, equal scores tie."
    own = getattr(judge, "description", "")
    return scorer_measure(judge).model_copy(update={"unit": "", "description": f"{own} {how}".strip()})


def done_cell(result: CellResult, base: RunConfig, entry: str) -> report.CellRecord:
    rows = []
    if result.job is not None and cell_status(result) in ("done", "stopped"):
        rows = read_metrics(result.job.spec.directory / "metrics.jsonl")
    return report.CellRecord(
        id=result.cell.id,
        label=result.cell.label,
        method=result.run.method.name,
        display_name=result.run.display_name,
        data_policy=result.run.data_policy.name,
        seed=result.run.seed,
        entry="" if result.stopped else entry,
        status=cell_status(result),
        reason=result.failure or result.stopped,
        config_changes=config_changes(base, result.run),
        cost=cell_cost(result.job, rows) if result.job is not None and rows else Cost(),
        filter=filter_record(result.job),
        points=tuple(chain.from_iterable(result.points)),
        metrics=tuple(map(curve_metrics, rows)),
    )


def curve_metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row of ``metrics.jsonl`` the report may draw."""
    return {key: value for key, value in row.items() if key not in CURVE_METRICS_EXCLUDED}


def cell_status(result: CellResult) -> Literal["done", "failed", "skipped", "stopped"]:
    if result.failure:
        return "failed"
    if not result.stopped:
        return "done"
    return "stopped" if result.points else "skipped"


def skipped_cell(cell: Cell, base: RunConfig) -> report.CellRecord:
    coordinates = cell.coordinates
    return report.CellRecord(
        id=cell.id,
        label=cell.label,
        method=coordinates.get("method", base.method.name),
        display_name=coordinates.get("method", base.display_name),
        data_policy=coordinates.get("data_policy", base.data_policy.name),
        seed=base.seed,
        status="skipped",
        reason=cell.skipped_reason,
    )


def config_changes(base: RunConfig, run: RunConfig) -> tuple[report.ConfigChange, ...]:
    return tuple(
        report.ConfigChange(field=change.field, base=value_text(change.left), value=value_text(change.right))
        for change in diff(base, run)
        if change.field != "name"
    )


def value_text(value: Any) -> str:
    return "–" if value is None else str(value)


def cell_cost(job: TrainJob, rows: Sequence[Mapping[str, Any]]) -> Cost:
    """What training used: every label that a step saw, each counted once."""
    ledgers = drawn_ledgers(job, rows)
    return Cost(
        tokens_trained=rows[-1]["num_tokens"],
        tokens_generated=sum(ledger["tokens_generated"] for ledger in ledgers),
        labels_used=stored_labels(job, len(rows)) + sum(ledger["labels"] for ledger in ledgers),
        scorer_calls=sum(ledger["scorer_calls"] for ledger in ledgers),
        device_seconds=sum(row["seconds"] * row["workers"] for row in rows) * job.share.devices,
    )


def filter_record(job: TrainJob | None) -> report.Filter | None:
    facts = filter_of(job) if job is not None else None
    return report.Filter.model_validate(facts) if facts is not None else None


def drawn_ledgers(job: TrainJob, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What drawing and scoring cost, of every store that was made so: rounds, and what was drawn or labelled once.

    Of a round that a lost workspace had, its rows tell.
    """
    found = [manifest["meta"] for store in stores_of(job) if (manifest := read_manifest(store)) is not None]
    here = {meta["request"]["number"] for meta in found if "request" in meta}
    told = [row for row in rows if row.keys() >= {"round", *LEDGER.values()}]
    lost = {row["round"]: row for row in told if row["round"] not in here}
    ledgers: list[Mapping[str, Any]] = [meta["ledger"] for meta in found if "ledger" in meta]
    for row in lost.values():
        ledgers.append({name: row[key] for name, key in LEDGER.items()})
    return ledgers


def stored_labels(job: TrainJob, steps: int) -> int:
    """Labels of the data that a run has seen, each counted once."""
    main = job.source.streams[0]
    if isinstance(main, RoundStream):
        return 0
    part, taken = (main, steps * main.groups_per_step) if isinstance(main, StoredStream) else mixed_share(main, steps)
    sizes = zip(part.stores, drawn_rows(part), strict=True)
    return min(sum(len(rows) for store, rows in sizes if "ledger" not in committed(store)["meta"]), taken)


def mixed_share(main: MixedStream, steps: int) -> tuple[StoredStream, int]:
    fresh, _ = hybrid_positions(steps, groups_per_step=main.groups_per_step, fresh_fraction=main.fresh_fraction)
    return main.stored, steps * main.groups_per_step - fresh.start


def record_provenance(
    results: Sequence[CellResult], *, started: datetime.datetime, command: Sequence[str]
) -> report.Provenance:
    facts = provenance()
    return report.Provenance(
        commands=(" ".join(command),),
        git_revision=facts["git_revision"],
        versions=facts["versions"],
        config_digests={result.cell.id: digest_of(list(resume.identity(result.run))) for result in results},
        seeds={result.cell.id: result.run.seed for result in results},
        machine={"system": platform.platform(), "processor": platform.machine(), "cores": str(os.cpu_count())},
        started=started.isoformat(timespec="seconds"),
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
