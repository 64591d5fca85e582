"""Replies side by side: one prompt, one sampling seed, the reference first and then every cell at its last step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from rayalign.report.formatting import format_count, format_optional
from rayalign.report.points import BASELINE, REFERENCE, ComparisonRecord, EvaluationPoint

OUTCOMES: Mapping[float | None, str] = {1.0: "win", 0.5: "tie", 0.0: "loss"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One reply and its numbers, in words such as ``oracle 0.736``."""

    cell: str
    step: int
    text: str
    numbers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSamples:
    """Replies of the reference and of every cell to one prompt, drawn with the same sampling seed."""

    prompt_set: str
    prompt: str
    rows: tuple[SampleRow, ...]


def prompt_samples(comparison: ComparisonRecord) -> Iterator[PromptSamples]:
    """For every prompt of which a reply was kept."""
    for index, reference in enumerate(comparison.reference):
        (prompts,) = (prompts for prompts in comparison.prompt_sets if prompts.name == reference.prompt_set)
        sources = [(REFERENCE, reference)]
        if comparison.baseline is not None:
            sources.append((BASELINE, comparison.baseline.points[index]))
        for cell in comparison.cells:
            points = [point for point in cell.points if point.prompt_set == prompts.name]
            sources += [(cell.id, point) for point in points[-1:]]
        replies = chain.from_iterable(point.replies for _, point in sources)
        keys = dict.fromkeys((reply.prompt, reply.sample) for reply in replies)
        for key in keys:
            yield PromptSamples(
                prompt_set=prompts.name,
                prompt=prompts.prompts[key[0]],
                rows=tuple(chain.from_iterable(_rows(comparison, cell, point, key) for cell, point in sources)),
            )


def _rows(comparison: ComparisonRecord, cell: str, point: EvaluationPoint, key: tuple[int, int]) -> Iterator[SampleRow]:
    for reply in point.replies:
        if (reply.prompt, reply.sample) == key:
            yield SampleRow(
                cell=cell,
                step=point.step,
                text=reply.text,
                numbers=tuple(_reply_numbers(comparison, point, key)),
            )


def _reply_numbers(comparison: ComparisonRecord, point: EvaluationPoint, key: tuple[int, int]) -> Iterator[str]:
    prompt, sample = key
    estimator = comparison.kl_estimators[0]
    for scorer in comparison.scorers:
        yield f"{scorer.label} {format_optional(point.scores[scorer.name][prompt][sample], scorer.unit)}"
    if comparison.judge is not None and point.verdicts is not None:
        verdict = point.verdicts[prompt][sample]
        yield f"judged by {comparison.judge.label}: {OUTCOMES.get(verdict, format_optional(verdict))}"
    yield f"log π/π_ref ({estimator.label}) {format_optional(point.kl[estimator.name][prompt][sample])}"
    yield f"{format_count(point.length[prompt][sample])} tokens"
    if point.finished[prompt][sample] == 0:
        yield "cut at the limit"
