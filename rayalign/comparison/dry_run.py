"""``rayalign compare --dry-run``: the plan of a comparison as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rayalign.comparison.budget import HOUR
from rayalign.comparison.evaluate import evaluated_checkpoints
from rayalign.comparison.forecast import (
    DRAWN,
    NO_PILOT,
    UNPREPARED,
    PilotRun,
    StepTime,
    estimate_step_time,
    planned_steps,
    read_pilot,
    steps_done,
    tokens_to_generate,
    tokens_to_train,
)
from rayalign.comparison.plan import Plan, Planned, PlannedRun, plan, processes_at_once, stage_state
from rayalign.config.compare import Comparison
from rayalign.config.run import EvaluatedRun
from rayalign.errors import UserError
from rayalign.placement import Share, even_share
from rayalign.report.tables import narrow_table
from rayalign.run.resolve import resolve_run
from rayalign.run.stages import Stages
from rayalign.run.train import is_finished_run
from rayalign.runtime.session import Session, preview

SHOWN_CELLS = 3


def dry_run(
    comparison: Comparison, evaluated: EvaluatedRun, *, fresh: frozenset[str], pilot: Path | None, console: Console
) -> None:
    """Print what the comparison would do; nothing is written, and no Ray is started.

    Raises:
        UserError: ``pilot`` holds no run that says how long steps take, or a cell would fail.
    """
    pilots = read_pilot(pilot) if pilot is not None else []
    with preview() as session:
        keeper = Plan(root=session.place(comparison.storage_path) / "artifacts", fresh=fresh)
        planned = plan(comparison, evaluated, keeper, session)
        print_runs(comparison, planned, Stages(artifacts=keeper, session=session), console)
        console.print(stages_table(planned, fresh))
        console.print(plan_summary(planned), highlight=False, soft_wrap=True)
        if comparison.trial_runs:
            console.print(
                f"tune: its {len(comparison.trial_runs)} runs are counted neither in stages nor in tokens and hours; a "
                "cell that it settles is planned with the values before that, and as if nothing of it were there",
                highlight=False,
                soft_wrap=True,
            )
        if pilots:
            print_times(comparison, planned, pilots, session, console)
        else:
            console.print(
                "how long it takes, and what it costs: --pilot with the folder of a run or comparison like this one "
                "that was trained for some steps",
                highlight=False,
                soft_wrap=True,
            )
        refused = sum(bool(run.refused) for run in planned.runs)
    if refused:
        raise UserError(f"{refused} of {len(planned.runs)} runs would fail; the reasons are above")


COLUMNS = ("cell", "objective", "data policy", "seed", "state", "steps", "to train", "to draw")
TUNED, TRAINED = "tuned", "trained"
REMARKS = {
    UNPREPARED: f"{UNPREPARED}: known once the data are prepared",
    DRAWN: f"{DRAWN}: depends on what is drawn while it trains",
    TUNED: f"{TUNED}: with the values that tune picks",
    TRAINED: f"{TRAINED}: an earlier run is kept if its data come out the same",
}
"""What a word or a sign of the table means, in a sentence below it."""
CAPTION = "tokens of the whole run, evaluation not counted; to draw: at most"


def print_runs(comparison: Comparison, planned: Planned, stages: Stages, console: Console) -> None:
    """Every cell: what runs from where to where, its tokens, and below the table why some do not run."""
    found = {run.name: run for run in planned.runs}
    lines: list[list[str]] = []
    remarks: dict[str, None] = {}
    for name, skipped in [
        *([("initial", "")] if comparison.initial is not None else []),
        *((cell.id, cell.skipped_reason) for cell in comparison.cells),
    ]:
        run = found.get(name)
        if run is None:
            lines.append([name, "", "", "", "skipped", "", "", ""])
            remarks[f"{name} is skipped, because {skipped}"] = None
            continue
        line = [name, run.run.display_name, run.run.data_policy.name, str(run.run.seed)]
        if run.refused:
            lines.append([*line, "will fail", "", "", ""])
            remarks[f"{name} will fail, because {run.refused}"] = None
            continue
        counts = (planned_steps(run), tokens_to_train(run), tokens_to_generate(run, stages))
        lines.append([*line, run_state(run), *map(count_or_mark, counts)])
        remarks |= {REMARKS[mark]: None for mark in (run_state(run), *counts) if mark in REMARKS}
    title = f"{comparison.name}: {len(comparison.cells)} cells"
    console.print(narrow_table(COLUMNS, lines, title=title, caption=CAPTION))
    for remark in remarks:
        console.print(remark, highlight=False, markup=False, soft_wrap=True)


def run_state(run: PlannedRun) -> str:
    """How far a run is."""
    if run.tuned:
        return TUNED
    if run.job is not None and is_finished_run(run.job):
        return "finished"
    if run.job is None and (run.directory / "final").exists():
        return TRAINED
    step = max(evaluated_checkpoints(run.directory), default=0)
    return f"from step {step}" if step else "to train"


def stages_table(planned: Planned, fresh: frozenset[str]) -> Table:
    """What is made before training, for whom, and what of it is there."""
    unknown = any(stage.waits_for for stage in planned.stages)
    table = Table(
        title="stages before training",
        title_justify="left",
        caption="?: another key once what it depends on is made" if unknown else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("stage", "for", "state"):
        table.add_column(column, no_wrap=column == "stage")
    for stage, users in planned.stages.items():
        table.add_row(stage.label, list_users(users, len(planned.runs)), stage_state(stage, planned, fresh))
    return table


def list_users(users: Sequence[str], runs: int) -> str:
    """``dpo, ipo``; ``15 cells: dpo, ipo, …`` where there are many."""
    if len(users) <= SHOWN_CELLS:
        return ", ".join(users)
    return f"{len(users)}: {', '.join(users[:SHOWN_CELLS])}, …"


def plan_summary(planned: Planned) -> str:
    cells = sum(run.name != "initial" for run in planned.runs)
    shared = sum(len(users) > 1 for users in planned.stages.values())
    cached = sum(stage.made for stage in planned.stages)
    return f"{len(planned.stages)} stages for {cells} cells, {shared} of them shared, {cached} cached"


def print_times(
    comparison: Comparison, planned: Planned, pilots: Sequence[PilotRun], session: Session, console: Console
) -> None:
    """What is left of every run in hours, by the pilot's seconds per step, and in money where prices are given."""
    prices = comparison.prices
    table = Table(title="what is left to train, at the pilot's speed", caption="evaluation and stages not counted")
    money = [prices.label] if prices is not None else []
    for column in ("cell", "seconds per step", "steps left", "hours", "device-hours", *money):
        table.add_column(column)
    total, unknown = 0.0, 0
    notes: dict[str, None] = {}
    for run in planned.runs:
        if run.refused:
            continue
        workers, each = workers_and_share(run, comparison, session)
        found = estimate_step_time(run.run, pilots, workers=workers, threads=None if each.gpus else each.threads)
        steps = planned_steps(run)
        if found is None or isinstance(steps, str):
            unknown += 1
            table.add_row(run.name, *([NO_PILOT] if found is None else [f"{found.seconds_per_step:.3g}", str(steps)]))
            continue
        left = max(0, steps - steps_done(run))
        hours = left * found.seconds_per_step / HOUR
        devices = workers * each.devices
        total += hours * devices
        cost = [f"{hours * devices * prices.device_hour:.2f}"] if prices is not None else []
        table.add_row(
            run.name, f"{found.seconds_per_step:.3g}", f"{left:,}", f"{hours:.2f}", f"{hours * devices:.2f}", *cost
        )
        notes.update(dict.fromkeys(pilot_remarks(run, found)))
    cost = [f"{total * prices.device_hour:.2f}"] if prices is not None else []
    table.add_row(f"all but {unknown}" if unknown else "all", "", "", "", f"{total:.2f}", *cost)
    console.print(table)
    if prices is None:
        console.print(
            "money: write prices: {device_hour: …} into the comparison", highlight=False, markup=False, soft_wrap=True
        )
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def workers_and_share(run: PlannedRun, comparison: Comparison, session: Session) -> tuple[int, Share]:
    """(workers, what each of them gets)"""
    if run.job is not None:
        return run.job.workers, run.job.share
    cells = [cell for cell in comparison.cells if cell.run is not None]
    workers = resolve_run(run.run, session).workers
    return workers, even_share(session, processes_at_once(cells, session), workers=workers)


def pilot_remarks(run: PlannedRun, found: StepTime) -> list[str]:
    if not found.differences:
        return []
    return [f"{run.name}: the pilot is another run and may be slower or faster: {'; '.join(found.differences)}"]


def count_or_mark(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value
