"""``rayalign check``: read preference data wholly and say what is in it, before anything is trained on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer

from rayalign.data.analysis import FINDINGS, FileFindings, Seen, prompt_key
from rayalign.data.chat import Chat, make_chat
from rayalign.data.formats import parse_row
from rayalign.data.records import BadRow, Row, append_quarantine
from rayalign.data.schema import Example
from rayalign.data.tables import read_rows
from rayalign.data.tokenize import Tokenized, TokenizeSettings, to_groups
from rayalign.errors import UserError
from rayalign.report.formatting import kept, printable

if TYPE_CHECKING:
    from rayalign.pipeline.nearness import RowScores

BATCH_ROWS = 512
ROLE_STYLES = {
    "prompt": "cyan",
    "trained": "green",
    "masked": "yellow",
    "truncated": "red strike",
    "end": "bold magenta",
}
UNLIMITED = 1 << 30


def check(
    files: Sequence[str],
    *,
    model: str | None = None,
    show: int = 0,
    eval_files: Sequence[str] = (),
    max_bad_fraction: float = 0.0,
    quarantine: str | Path = "quarantine.jsonl",
    settings: TokenizeSettings | None = None,
    policy_logp_quantile: float | None = None,
    as_json: bool = False,
    console: Console,
) -> int:
    """Print what is in ``files`` and append their bad rows to ``quarantine``.

    With ``model`` lengths are also counted in that model's tokens, and ``show`` rows are printed as tokens, coloured by
    what happens to them. ``eval_files`` are read for their prompts only. With ``policy_logp_quantile`` the model scores
    every row, and what ``filter`` would keep of all files together is said.

    Returns:
        0; 1 when a file has more than ``max_bad_fraction`` bad rows; 2 when a file cannot be read at all.
    """
    if show and not model:
        raise UserError("--show prints tokens: name the tokenizer's model with --model")
    if policy_logp_quantile is not None and not (model and 0 < policy_logp_quantile < 1):
        raise UserError("--policy-logp-quantile lies between 0 and 1 and scores rows: name the model with --model")
    settings = settings or TokenizeSettings()
    chat = make_chat(_tokenizer(model)) if model else None
    seen = Seen(eval_prompts=frozenset(_prompts(eval_files)))
    scores = _row_scores(model) if model and policy_logp_quantile is not None else None
    findings, unreadable, left_to_show = [], [], show
    for file in files:
        found = FileFindings(source=file)
        try:
            for examples in _good_batches(file, found, seen, chat, settings, quarantine, scores):
                if chat and left_to_show > 0 and not as_json:
                    for example in examples[:left_to_show]:
                        _show(example, chat, settings, console)
                    left_to_show -= len(examples)
        except UserError as error:
            unreadable.append(str(error))
        else:
            findings.append(found)
    filtering = scores.facts(policy_logp_quantile) if scores and policy_logp_quantile else None
    if as_json:
        report: dict[str, object] = {"files": [found.as_json() for found in findings], "unreadable": unreadable}
        if scores:
            report["filter"] = filtering
        console.print_json(json.dumps(report))
    else:
        for found in findings:
            console.print(_table(found))
        if scores:
            said = kept(**filtering) if filtering else "no row has a completion to score"
            console.print(f"filter {policy_logp_quantile:g} by {model}: {said}", highlight=False, soft_wrap=True)
        for message in unreadable:
            console.print(Text(printable(message), style="red"))
    if unreadable:
        return 2
    return int(any(found.bad > max_bad_fraction * (found.good + found.bad) for found in findings))


def _tokenizer(model: str) -> object:
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: no tokenizer there: {error}") from error


def _row_scores(model: str) -> RowScores:
    from rayalign.pipeline.nearness import RowScores  # loads torch, which no other check needs

    return RowScores(model)


def _prompts(files: Sequence[str]) -> Iterator[bytes]:
    for file in files:
        for row in read_rows(file):
            example = row if isinstance(row, BadRow) else parse_row(row)
            if isinstance(example, Example):
                yield prompt_key(example)


def _good_batches(
    file: str,
    found: FileFindings,
    seen: Seen,
    chat: Chat | None,
    settings: TokenizeSettings,
    quarantine: str | Path,
    scores: RowScores | None,
) -> Iterator[list[Example]]:
    """Count every row of a file into ``found`` and yield the good ones, a batch at a time."""
    rows = read_rows(file)
    while batch := list(islice(rows, BATCH_ROWS)):
        parsed = [_parsed(row) for row in batch]
        bad = [item for item in parsed if isinstance(item, BadRow)]
        examples = [item for item in parsed if isinstance(item, Example)]
        for row in bad:
            found.add_bad(row)
        for example in examples:
            found.add_text(example, seen)
        if chat:
            outcomes = to_groups(examples, chat, settings)
            for example, outcome in zip(examples, outcomes, strict=True):
                found.add_tokens(example, outcome, chat)
            if scores is not None:
                scores.add(outcomes)
            bad += [outcome for outcome in outcomes if isinstance(outcome, BadRow)]
        append_quarantine(quarantine, bad)
        yield examples


def _parsed(row: Row) -> Example | BadRow:
    return row if isinstance(row, BadRow) else parse_row(row)


def _table(found: FileFindings) -> Table:
    table = Table(title=Text(printable(found.source)), title_justify="left", show_header=False, min_width=60)
    table.add_row("rows", f"{found.good + found.bad:,}")
    table.add_row("good", f"{found.good:,}")
    table.add_row("bad", f"{found.bad:,}", style="red" if found.bad else None)
    for reason, count in found.reasons.most_common(10):
        table.add_row("", Text(printable(f"{count:,} × {reason}"), style="red"))
    for name, count in found.formats.most_common():
        table.add_row("format", f"{name}: {count:,}")
    for name in found.lengths:
        low, middle, high, top = found.quantiles(name) or (0, 0, 0, 0)
        table.add_row(name.replace("_", " "), f"min {low:,}   median {middle:,}   p95 {high:,}   max {top:,}")
    for name, meaning in FINDINGS.items():
        if found.counts[name]:
            table.add_row(name.replace("_", " "), Text(f"{found.counts[name]:,}  {meaning}", style="yellow"))
    return table


def _show(example: Example, chat: Chat, settings: TokenizeSettings, console: Console) -> None:
    """One row as tokens, each in the colour of its role."""
    whole = replace(settings, max_prompt_tokens=UNLIMITED, max_tokens=2 * UNLIMITED)
    (full,), (cut,) = to_groups([example], chat, whole), to_groups([example], chat, replace(settings, truncated="keep"))
    if not isinstance(full, Tokenized) or not isinstance(cut, Tokenized):
        return
    legend = Text.assemble(*((f" {role} ", style) for role, style in ROLE_STYLES.items()))
    console.print(Text(printable(f"{example.source}:{example.line} ({example.format})"), style="bold"), legend)
    kept_bos = int(len(cut.group.prompt_ids) > 0 and full.group.prompt_ids[0] == chat.tokenizer.bos_token_id)
    places = range(len(full.group.prompt_ids))
    gone = range(kept_bos, kept_bos + cut.truncation.prompt)
    roles = ["truncated" if place in gone else "prompt" for place in places]
    console.print(_coloured(full.group.prompt_ids.tolist(), roles, chat))
    for answer, num_cut in zip(full.group.candidates, cut.truncation.responses, strict=True):
        ids, kept = answer.ids.tolist(), len(answer.ids) - num_cut
        roles = [
            "truncated" if place >= kept else "masked" if not trained else "end" if token == chat.end_id else "trained"
            for place, (token, trained) in enumerate(zip(ids, answer.mask.tolist(), strict=True))
        ]
        console.print(_coloured(ids, roles, chat))
    console.print()


def _coloured(ids: Sequence[int], roles: Sequence[str], chat: Chat) -> Text:
    text = Text()
    for token, role in zip(ids, roles, strict=True):
        text.append(printable(chat.tokenizer.decode([token])), style=ROLE_STYLES[role])
        text.append("|", style="dim")
    return text
