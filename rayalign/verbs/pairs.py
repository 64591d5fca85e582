"""``rayalign evaluate MODEL --pairs``: a reward model on held-out pairs and rankings. In this process, without Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, combinations
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rayalign.config.data import TokenBudget
from rayalign.config.model import ModelConfig
from rayalign.data.chat import Chat, make_chat
from rayalign.data.group import Group, TokenIds
from rayalign.data.origin import Origin, find_ranges
from rayalign.data.records import BadRow
from rayalign.data.schema import Example
from rayalign.data.tokenize import Tokenized, to_groups
from rayalign.data.tokenize_rows import Unit, fit_to_method, parse_unit_row, read_chunks, shape_group
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.context import context_of, refuse_long_group, refuse_unknown_group, vocabulary_of
from rayalign.engine.model.pretrained import ModelSpec, model_tokenizer, refuse_unusable
from rayalign.engine.model.scalar import ScalarHead, head_written_as
from rayalign.errors import UserError
from rayalign.report.formatting import SHARE, format_number, interval, signed
from rayalign.report.pairs import PairReport, Pairs, report_pairs
from rayalign.report.statistics import Estimate

TOKENS_PER_MICRO_BATCH = 16_384
CPU_ROW_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A reward model's word on some pairs."""

    pairs: Pairs
    cut: int
    """Answers of which the budget left only the beginning."""


def evaluate_pairs(model: str, files: Sequence[str], budget: TokenBudget, *, as_json: bool, console: Console) -> None:
    """Print how well ``model`` orders the pairs of ``files``, as tables or as one JSON object.

    Raises:
        UserError: the model has no trained scalar head, or a row is no pair or ranking, or is beyond what it reads.
    """
    judged = judge_pairs(model, files, budget)
    found = report_pairs(judged.pairs)
    if as_json:
        facts = {"model": model, "files": list(files), "cut_answers": judged.cut, **nan_to_null(asdict(found))}
        console.print_json(json.dumps(facts, allow_nan=False))
        return
    cut = f"; {judged.cut} answers were cut at --max-tokens" if judged.cut else ""
    console.print(f"{model}: {found.pairs} pairs in {found.rows} rows{cut}", highlight=False, soft_wrap=True)
    for table in pair_tables(found):
        console.print(table)


def judge_pairs(model: str, files: Sequence[str], budget: TokenBudget) -> Judged:
    """The margins of every pair whose ranks differ; rows in which every answer ties have none."""
    spec = ModelSpec(config=ModelConfig(name=model), head=ScalarHead(), trained_head=True, field="evaluate")
    skeleton, tokenizer = refuse_unusable(spec), model_tokenizer(spec)
    context, vocabulary = context_of(skeleton.config), vocabulary_of(skeleton)
    head = head_written_as(skeleton.config) or ScalarHead()
    chat = make_chat(tokenizer, template=head.template, stop=head.stop)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen = FrozenModel(
        ScoringSpec(
            model=replace(spec, head=head),
            tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH,
            row_tokens=CPU_ROW_TOKENS if device.type == "cpu" else None,
        ),
        device,
    )
    columns: list[tuple[float, float, float]] = []
    rows = cut = 0
    for groups, cut_here in read_rankings(files, chat, budget):
        for group in groups:
            refuse_long_group(group, context, model, setting="--max-tokens")
            refuse_unknown_group(group, vocabulary, model, tokenizer)
        for group, scores in zip(groups, frozen.scores([as_read(group, chat) for group in groups]), strict=True):
            columns += [(*pair, float(rows)) for pair in pair_margins(group, scores.astype(np.float64))]
            rows += 1
        cut += cut_here
    if not columns:
        raise UserError(f"--pairs: {', '.join(files)} hold no pair in which one answer is preferred")
    margin, length_difference, row = np.array(columns).T
    return Judged(pairs=Pairs(margin=margin, length_difference=length_difference, row=row), cut=cut)


def read_rankings(files: Sequence[str], chat: Chat, budget: TokenBudget) -> Iterator[tuple[list[Group], int]]:
    """(groups with their ranks, answers that were cut), some hundred rows at a time; a bad row is an error."""
    for part in chain.from_iterable(find_ranges(Origin(path=file)) for file in files):
        unit = Unit(path=part.path)
        for chunk in read_chunks(unit):
            examples = [fit_to_method(parse_unit_row(row, unit), "ranking") for row in chunk]
            bad = next((own for own in examples if isinstance(own, BadRow)), None)
            if bad is not None:
                raise UserError(f"--pairs: {bad}")
            groups: list[Group] = []
            cut = 0
            for outcome in to_groups([own for own in examples if isinstance(own, Example)], chat, budget):
                if isinstance(outcome, BadRow):
                    raise UserError(f"--pairs: {outcome}")
                assert isinstance(outcome, Tokenized)
                groups += shape_group(outcome.group, "ranking", preference=outcome.example.preference)
                cut += sum(tokens > 0 for tokens in outcome.truncation.responses)
            yield groups, cut


def as_read(group: Group, chat: Chat) -> Group:
    """The group with what a template of others writes after an answer, where Hugging Face would read the score."""
    if not chat.after_end:
        return group
    after: TokenIds = np.array(chat.encode([chat.after_end])[chat.after_end], np.int32)
    return replace(
        group,
        candidates=tuple(
            replace(own, ids=np.append(own.ids, after), mask=np.append(own.mask, np.zeros(len(after), np.bool_)))
            for own in group.candidates
        ),
    )


def pair_margins(group: Group, scores: np.ndarray[Any, np.dtype[np.float64]]) -> Iterator[tuple[float, float]]:
    """(margin, difference of lengths) of every pair of candidates whose ranks differ."""
    rank = group.per_candidate["rank"]
    for i, j in combinations(range(len(scores)), 2):
        if rank[i] != rank[j]:
            better, other = (i, j) if rank[i] < rank[j] else (j, i)
            longer = len(group.candidates[better].ids) - len(group.candidates[other].ids)
            yield float(scores[better] - scores[other]), float(longer)


def pair_tables(found: PairReport) -> Iterator[Table]:
    overall = Table(caption="interval: 95 %, rows resampled; ties count half; Brier of a coin: 0.25")
    for column in ("accuracy", "mean margin", "deviation", "Brier", "calibration error"):
        overall.add_column(column)
    overall.add_row(
        share_with_interval(found.accuracy),
        signed(found.margin_mean),
        format_number(found.margin_deviation),
        format_number(found.brier),
        format_number(found.calibration_error),
    )
    yield overall
    reliability = Table(title="calibration", caption="confidence: σ(|margin|), equally many pairs a line")
    for column in ("confidence", "pairs", "mean confidence", "accuracy"):
        reliability.add_column(column)
    for own in found.reliability:
        reliability.add_row(
            f"{format_number(own.lowest, SHARE)} – {format_number(own.highest, SHARE)}",
            str(own.pairs),
            format_number(own.confidence, SHARE),
            format_number(own.accuracy, SHARE),
        )
    yield reliability
    lengths = Table(title="by length", caption="tokens of the preferred answer − tokens of the other, quartiles")
    for column in ("tokens longer", "pairs", "accuracy"):
        lengths.add_column(column)
    for bucket in found.by_length:
        lengths.add_row(
            f"{bucket.lowest:+.0f} … {bucket.highest:+.0f}", str(bucket.pairs), share_with_interval(bucket.accuracy)
        )
    yield lengths


def share_with_interval(found: Estimate) -> str:
    return f"{format_number(found.mean, SHARE)} {interval(found, SHARE)}"


def nan_to_null(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {name: nan_to_null(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
