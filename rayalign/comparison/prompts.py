"""Prompt sets: the prompts of a source, as the model reads them and as scorers do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

from rayalign.config.data import DataSource
from rayalign.config.run import EvaluatedRun, RunConfig
from rayalign.data.records import BadRow
from rayalign.data.schema import Example
from rayalign.data.shared_prompt import prompt_text
from rayalign.data.tokenize import Tokenized, to_groups
from rayalign.data.tokenize_rows import parse_unit_row, read_chunks
from rayalign.errors import UserError
from rayalign.judge.measure import Prompt
from rayalign.run.stages import Stages, source_units
from rayalign.runtime.preparer import load_chat


def prompt_sets(evaluated: EvaluatedRun, stages: Stages) -> dict[str, tuple[Prompt, ...]]:
    """Every set that ``evaluate`` names, or the prompts of ``data.eval``, by label."""
    run, evaluate = evaluated.run, evaluated.evaluate
    if not evaluate.prompts:
        examples = list(chain.from_iterable(read_examples(source, run, stages) for source in run.data.eval))
        return {"eval": tokenize_prompts(examples, run)}
    # `data.format` is that of the rows that are trained on; prompts may come otherwise.
    sources = [source.model_copy(update={"format": source.format or "auto"}) for source in evaluate.prompts]
    sets = {source.label: tokenize_prompts(read_examples(source, run, stages), run) for source in sources}
    if len(sets) < len(evaluate.prompts):
        raise UserError("evaluate.prompts: two sets have the same name; give each its own `name`")
    return sets


def read_examples(source: DataSource, run: RunConfig, stages: Stages) -> list[Example]:
    """The distinct prompts of a source, in order; their completions are not read. A bad row is an error."""
    examples: dict[str, Example] = {}
    for unit in source_units(source, run.data, stages):
        for row in chain.from_iterable(read_chunks(unit)):
            found = parse_unit_row(row, unit)
            if isinstance(found, BadRow):
                raise UserError(f"evaluate.prompts: {found}")
            examples.setdefault(prompt_text(found.prompt), replace(found, candidates=(), columns={}))
    return list(examples.values())


def tokenize_prompts(examples: Iterable[Example], run: RunConfig) -> tuple[Prompt, ...]:
    """The prompts as training writes them."""
    chat = load_chat(run.model, run.data)
    examples = list(examples)
    prompts = []
    budget = run.data.model_copy(update={"truncated": "keep", "long_prompts": "cut"})  # every prompt is measured
    for example, outcome in zip(examples, to_groups(examples, chat, budget), strict=True):
        if not isinstance(outcome, Tokenized):
            raise UserError(f"evaluate.prompts: {example.source}:{example.line} cannot be tokenized: {outcome}")
        prompts.append(Prompt(ids=tuple(outcome.group.prompt_ids.tolist()), prompt=outcome.example.prompt))
    return tuple(prompts)
