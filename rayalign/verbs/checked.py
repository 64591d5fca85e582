"""What ``rayalign check`` is given, files or a run's YAML, as the sources that are checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rayalign.config.data import DataConfig, DataSource, TokenBudget
from rayalign.config.load import importable, load_run
from rayalign.config.method import resolve_method
from rayalign.config.model import ModelConfig
from rayalign.config.run import RunConfig
from rayalign.data.chat import Chat, make_chat
from rayalign.data.group import Group
from rayalign.data.json_rows import parse_json_row
from rayalign.data.origin import RowRange, find_ranges, is_pattern, matching_files
from rayalign.data.records import Row
from rayalign.data.tokenize_rows import CHUNK_ROWS, Unit, read_chunks
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.model.tokenizers import load_tokenizer, open_tokenizer
from rayalign.errors import UserError
from rayalign.imports import load_function
from rayalign.run.reads import Read, needed_of_rows, shape_of, sources_read
from rayalign.run.units import origin_of, rows_made, unit_of
from rayalign.verbs.check import Checked, Checking, check
from rayalign.verbs.options import block_of

if TYPE_CHECKING:
    from rayalign.verbs.filter_preview import RowScores

YAML = (".yaml", ".yml")
OF_SOURCES = ("split", "config", "data_dir", "format", "columns", "max_samples")
"""Options that are fields of a source."""
BUDGET = ("max_prompt_tokens", "max_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says; None leaves it to the run, or to the defaults."""

    of_files: Mapping[str, Any] = field(default_factory=dict)
    """What a YAML would say: by option, only those that were given."""
    show: int = 0
    max_bad_fraction: float | None = None
    quarantine: Path | None = None
    as_json: bool = False


def check_given(given: Sequence[str], options: Options, console: Console) -> int:
    """Check a run's YAML, with settings behind it, or files. Returns the exit code."""
    if given[0].endswith(YAML):
        return check_run(Path(given[0]), given[1:], options, console)
    return check_files(given, options, console)


def check_run(path: Path, overrides: Sequence[str], options: Options, console: Console) -> int:
    """Check every source that a run reads, as it reads them."""
    from rayalign.run.model import chat_of, model_spec  # imports Ray, which files do not need
    from rayalign.run.readers import readers_of, refuse_group

    if options.of_files:
        name = next(iter(options.of_files)).replace("_", "-")
        raise UserError(f"--{name} is of files; a run says it in its YAML, or behind it: {path} data.max_tokens=512")
    run = load_run(path, overrides)
    unfit = partial(refuse_group, readers=readers_of(run))
    sources = [_of_run(read, run, options, refuse=partial(unfit, **_drawn(read, run))) for read in sources_read(run)]
    how = Checking(
        chat=chat_of(run),
        budget=run.data,
        show=options.show,
        held_out=[source for source in sources if source.is_held_out],
        quarantine=options.quarantine,
        scores=_scores(model_spec(run)) if run.filter is not None else None,
        policy_logp_quantile=run.filter.policy_logp_quantile if run.filter is not None else None,
        as_json=options.as_json,
    )
    with importable(path.resolve().parent):
        return check(sources, how, console)


def _drawn(read: Read, run: RunConfig) -> dict[str, Any]:
    """How many tokens a run draws after a source's prompts, and which setting says so."""
    if run.evaluate is not None and read.field.startswith("evaluate.prompts"):
        return {"new_tokens": run.evaluate.sampling.max_new_tokens, "drawn": "evaluate.sampling.max_new_tokens"}
    if run.rollout is not None and read.completed != "no":
        return {"new_tokens": run.rollout.max_new_tokens}
    return {}


def _of_run(read: Read, run: RunConfig, options: Options, *, refuse: Callable[[Group], None]) -> Checked:
    """A source with the limits that ``train`` holds it to."""
    most = run.data.max_bad_fraction if options.max_bad_fraction is None else options.max_bad_fraction
    is_strict = read.is_strict or run.data.on_bad_row == "fail"
    return Checked(
        title=f"{read.field}: {read.source.path or read.source.function}",
        path=str(read.source.path or read.source.function),
        chunks=partial(_chunks, read.source, run.data),
        shape=read.shape,
        needs=read.needs,
        columns=read.source.columns,
        max_bad_fraction=0.0 if is_strict else most,
        is_scored=run.filter is not None and read.field.startswith("data.train"),
        is_held_out=read.field.startswith(("data.eval", "evaluate.prompts")),
        completed=read.completed,
        refuse=refuse,
    )


def check_files(files: Sequence[str], options: Options, console: Console) -> int:
    """Check files and datasets, by the options alone."""
    given = options.of_files
    model, quantile = given.get("model"), given.get("policy_logp_quantile")
    if model is None and (options.show or "template" in given):
        raise UserError("--show and --template are about tokens: name the tokenizer's model with --model")
    if quantile is not None and (model is None or not 0 < quantile < 1):
        raise UserError("--policy-logp-quantile lies between 0 and 1 and scores rows: name the model with --model")
    how = Checking(
        chat=_chat(model, given.get("template", "auto")) if model is not None else None,
        budget=block_of(TokenBudget, {name: given[name] for name in BUDGET if name in given}),
        show=options.show,
        held_out=[_of_file(file, options) for file in _each(given.get("eval", ()))],
        quarantine=options.quarantine,
        scores=_scores(ModelSpec(config=ModelConfig(name=model)))
        if model is not None and quantile is not None
        else None,
        policy_logp_quantile=quantile,
        as_json=options.as_json,
    )
    return check([_of_file(file, options) for file in _each(files)], how, console)


def _each(given: Sequence[str]) -> Iterator[str]:
    """Every path; of a pattern those that match, or itself where none does."""
    for path in given:
        try:
            found = matching_files(path) if is_pattern(path) else [path]
        except UserError:
            found = [path]
        yield from found


def _of_file(file: str, options: Options) -> Checked:
    given = {name: options.of_files[name] for name in OF_SOURCES if name in options.of_files}
    source = block_of(DataSource, {"path": file, **given})
    method = options.of_files.get("method")
    record = resolve_method(method) if method is not None else None
    return Checked(
        title=file,
        path=file,
        chunks=partial(_chunks, source, DataConfig(train=(source,))),
        shape=shape_of(record) if record else None,
        needs=needed_of_rows(record, record.config()) if record else frozenset(),
        columns=source.columns,
        max_bad_fraction=options.max_bad_fraction or 0.0,
        is_scored="policy_logp_quantile" in options.of_files,
    )


def _chat(model: str, template: str) -> Chat:
    is_folder = Path(model).is_dir()
    tokenizer = load_tokenizer(Path(model), field="--model") if is_folder else open_tokenizer(model, field="--model")
    return make_chat(tokenizer, template=template)


def _scores(spec: ModelSpec) -> RowScores:
    from rayalign.verbs.filter_preview import RowScores  # loads torch, which no other check needs

    return RowScores(spec)


def _row(source: DataSource, line: int, row: Any) -> Row:
    """A row of a function, as JSON would hold it."""
    try:
        return parse_json_row(json.dumps(row).encode(), source=source.label, line=line)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source.function!r}: row {line} cannot be written as JSON: {error}") from error


def _chunks(source: DataSource, data: DataConfig) -> Iterator[tuple[Unit, list[Row]]]:
    """The rows of a source, some hundred at a time, with how they are meant."""
    if source.function is not None:
        unit = unit_of(RowRange(path=source.label), source, data)
        make = load_function(source.function, **source.arguments)
        rows = enumerate(rows_made(source.function, make, source.arguments), start=1)
        made = islice((_row(source, line, row) for line, row in rows), source.max_samples)
        while chunk := list(islice(made, CHUNK_ROWS)):
            yield unit, chunk
        return
    for part in find_ranges(origin_of(source)):
        unit = unit_of(part, source, data)
        for chunk in read_chunks(unit):
            yield unit, chunk
