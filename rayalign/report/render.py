"""The report of a comparison as files: ``report.html`` (self-contained), ``report.md``, ``results.json``, ``*.svg``."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from itertools import chain

from jinja2 import Environment
from markupsafe import Markup

from rayalign.report import figures
from rayalign.report import svg as drawing
from rayalign.report.entries import runs_of
from rayalign.report.estimates import summarize
from rayalign.report.markdown import page_markdown
from rayalign.report.matrix import contests_by_pair
from rayalign.report.points import BASELINE, REFERENCE, ComparisonRecord, write_text
from rayalign.report.results_json import results_json
from rayalign.report.samples import prompt_samples
from rayalign.report.summary import AnswersSummary, Summary
from rayalign.report.templates import environment
from rayalign.report.trials import TuningRecord
from rayalign.storage.place import Place

FOLDER = "report"


def render_report(comparison: ComparisonRecord, directory: Place) -> Place:
    """Write ``directory/report/`` and return the path of ``report.html``, which is written last.

    Each file is replaced whole, so a reader never sees half of one.
    """
    summary = summarize(comparison)
    drawings = figures.draw_all(comparison, summary)
    folder = directory / FOLDER
    for stem, svg in drawings.items():
        write_text(folder / f"{stem}.svg", drawing.standalone(svg))
    write_text(folder / "results.json", results_json(comparison, summary))
    write_text(folder / "report.md", page_markdown(page_html(comparison, summary, dict.fromkeys(drawings, ""))))
    inline = {stem: drawing.inline(svg) for stem, svg in drawings.items()}
    write_text(folder / "report.html", page_html(comparison, summary, inline))
    return folder / "report.html"


def page_html(comparison: ComparisonRecord, summary: Summary, drawings: Mapping[str, str]) -> str:
    """The text of ``report.html`` with ``drawings``: file stem → inline SVG."""
    templates = environment()
    script = _source(templates, "report.js")
    judges = (comparison.judge,) if comparison.judge else ()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return templates.get_template("report.html.jinja").render(
        comparison=comparison,
        summary=summary,
        cells={cell.id: cell for cell in comparison.cells},
        entries={entry.id: entry for entry in summary.entries},
        runs={run.id: run for run in runs_of(comparison.cells)},
        units={scorer.name: scorer.unit for scorer in comparison.scorers},
        measures=(*comparison.scorers, *judges, *comparison.kl_estimators, *comparison.diagnostics),
        last_points={prompts.name: summary.last(prompts.name) for prompts in comparison.prompt_sets},
        styles=figures.entry_styles(summary.entries),
        drawings={stem: Markup(svg) for stem, svg in drawings.items()},
        prompt_samples=list(prompt_samples(comparison)),
        limits=comparison_limits(comparison, summary),
        tunings=tunings(comparison),
        untuned=untuned(comparison, summary),
        cost_axes=figures.cost_axes(summary),
        contests=contests_by_pair(summary.contests),
        contestants=list(dict.fromkeys(contest.row for contest in summary.contests)),
        interval_head=summary.interval_head,
        opponent=BASELINE if comparison.baseline else REFERENCE,
        names={REFERENCE: REFERENCE, BASELINE: f"{comparison.opponent} (baseline)"},
        theme=drawing.THEME,
        style=Markup(_source(templates, "report.css")),
        script=Markup(script),
        script_digest=digest,
    )


def comparison_limits(comparison: ComparisonRecord, summary: Summary) -> list[str]:
    """What the numbers cannot say: first what holds for every comparison of this kind, then this one's own caveats."""
    estimator = comparison.kl_estimators[0]
    sampling = comparison.sampling
    drawn = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    if (sampling.temperature, sampling.top_p) != (1, 1):
        drawn += ", which is not the policy itself: the number is not its KL"
    return [
        *replication_caveats(summary),
        *tuning_caveats(comparison),
        f"KL is the reverse KL(π‖π_ref) on the policy's own replies ({drawn}), estimated by {estimator.label}, in nats"
        f" per reply; its interval, too, is the {summary.interval_head}.",
        "Membership of the front is of means: a point on it need not differ from one beside it. Its share of resamples"
        " says how often it would be there.",
        "Scores at equal KL are interpolated linearly between two checkpoints of one run, in the order of training, at"
        " its first crossing of the level. They are point estimates, and nothing is extrapolated; the runs that reach a"
        " level need not be like those that do not.",
        "A length-controlled win rate is as good as its model: it corrects for the length of replies, in one term, and"
        " for nothing else.",
        *judging_caveats(comparison, summary),
        "Intervals of rates (win rates, shares, accuracies) are Wilson's score intervals for the effective number of"
        " prompts: they lie between 0 and 1, and have a width where every prompt agrees.",
        *comparison.text.caveats,
    ]


def replication_caveats(summary: Summary) -> Iterator[str]:
    """What the intervals are over, and whether anything may be called better."""
    bootstrap = summary.bootstrap
    prompts = (
        f"{bootstrap.level:.0%} percentile bootstrap intervals over prompts ({bootstrap.resamples} resamples, seed"
        f" {bootstrap.seed}): samples are averaged inside a prompt, then prompts are resampled"
    )
    if not summary.replicated:
        yield (
            f"Every cell is one training run with one seed. Intervals are {prompts}. How much another training seed"
            " would change a number is not measured here, so this report calls no cell better than another."
        )
        return
    yield (
        f"Intervals of configurations with several training seeds are {bootstrap.level:.0%} intervals over seeds and"
        f" prompts: {bootstrap.resamples} times seeds and prompts are drawn again (two-level bootstrap, seed"
        f" {bootstrap.seed}), and the standard error that results is taken times Student's t with one degree of freedom"
        " fewer than seeds. They stand for other seeds of the same configuration and other prompts of the same"
        " kind."
    )
    if any(point.num_seeds == 1 and point.step for point in summary.entry_points):
        yield (
            f"A configuration with one seed has {prompts}; how much another seed would change it is not measured, and"
            " it is called neither better nor worse than anything."
        )


def tuning_caveats(comparison: ComparisonRecord) -> Iterator[str]:
    """What settings were chosen by, and what that does to the numbers."""
    if not comparison.tuning:
        yield (
            "Nothing was tuned by this comparison: a difference between two methods is one between two settings of"
            " them."
        )
        return
    first = comparison.tuning[0]
    yield (
        f"Settings were picked by {first.scorer} on the select half of {first.prompt_set}, with training seeds of their"
        " own; tables over all of its prompts contain that half, so that they flatter what was picked a little. The"
        " checkpoints chosen on the select half are measured on the other one."
    )
    if len({len(tuning.trials) for tuning in comparison.tuning}) > 1:
        yield "Configurations had different numbers of trials, as they have different settings: see Tuning."


def tunings(comparison: ComparisonRecord) -> list[list[TuningRecord]]:
    """Configurations that were tuned alike; several groups in a merged report only."""
    groups: dict[tuple[object, ...], list[TuningRecord]] = {}
    for tuning in comparison.tuning:
        how = (tuning.asked, tuning.seeds, tuning.scorer, tuning.prompt_set, tuning.num_prompts, tuning.max_kl)
        groups.setdefault(how, []).append(tuning)
    return list(groups.values())


def untuned(comparison: ComparisonRecord, summary: Summary) -> list[str]:
    """Configurations without trials of their own where others are tuned, as in a merged report."""
    tried = set(chain.from_iterable(tuning.cells for tuning in comparison.tuning))
    if not tried:
        return []
    measured = [entry for entry in summary.entries if entry.measured]
    return [entry.label for entry in measured if tried.isdisjoint(entry.cell_ids)]


def judging_caveats(comparison: ComparisonRecord, summary: Summary) -> Iterator[str]:
    """What a judge's win rate is, and what scorers and judges left unanswered."""
    if comparison.judge is not None:
        yield (
            f"The win rate judged by {comparison.judge.label} compares each reply with the one of"
            f" {comparison.opponent} to the same prompt, of the same number and drawn with the same noise; the win rate"
            " under a scorer compares all pairings of a prompt."
        )
    totals: dict[tuple[str, str], list[AnswersSummary]] = {}
    for row in summary.answers:
        totals.setdefault((row.role, row.name), []).append(row)
    for (role, name), rows in totals.items():
        missing, replies = sum(row.missing for row in rows), sum(row.replies for row in rows)
        if missing:
            reason = next(row.problem for row in rows if row.missing)
            yield (
                f"The {role} {name} gave no answer for {missing} of {replies} replies; they are missing from its means,"
                f" and need not be like the others. The first: {reason}"
            )


def _source(templates: Environment, name: str) -> str:
    assert templates.loader is not None
    return templates.loader.get_source(templates, name)[0]
