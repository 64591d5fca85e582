"""The shared stages before training: rows made by a function, token stores, reference log-probs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import transformers

from rayalign.config.data import DataConfig, DataSource, TokenBudget
from rayalign.config.dump import redact
from rayalign.config.fields import without_folder
from rayalign.config.run import RunConfig
from rayalign.data.budget import Completed
from rayalign.data.content import content_key, without_query
from rayalign.data.origin import Origin, RowRange, find_ranges
from rayalign.data.records import QUARANTINE
from rayalign.data.render import RULES
from rayalign.data.select import scores_of, select_best, write_selected_rows
from rayalign.data.shard import FileWriter, finished_shards
from rayalign.data.store import TokenStore, commit_store
from rayalign.data.tokenize_rows import BAD_ROWS, SHOWN_BAD_ROWS, Shape, Unit
from rayalign.engine.frozen import ScoringSpec
from rayalign.errors import UserError
from rayalign.imports import load_function, source_digest
from rayalign.rounds.columns import RoundPreparation as RoundPreparation
from rayalign.rounds.columns import prepare_columns
from rayalign.run.facts import preparation_counts, refuse_absent_columns, warning
from rayalign.run.identity import spec_digest, template_digest, tokenizer_identity
from rayalign.run.model import scoring_spec
from rayalign.run.reference import LOG_PROBS, score_store
from rayalign.run.units import origin_of, rows_made, unit_of
from rayalign.runtime.datasets import StorePreparation, prepare
from rayalign.runtime.mismatched import PARTNERS, write_mismatched
from rayalign.runtime.reading import planned
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import Keeper
from rayalign.storage.cache import working
from rayalign.storage.manifest import commit, committed, read_manifest
from rayalign.storage.place import EXTRAS, Place, listed, place_of

BUDGET = set(TokenBudget.model_fields)
BYTES_PER_WRITER = 2 << 20
"""Below this a second tokenizing process costs more to start than it saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Where stages live and what they run on."""

    artifacts: Keeper
    session: Session

    def digest(self, directory: Place) -> str:
        """What identifies the content of a committed store, or of columns; a plan may ask before it is made."""
        return self.artifacts.pending(directory) or committed(directory)["digest"]

    def rows(self, function: str, source: DataSource) -> Place:
        """A maker's rows as a JSONL file."""
        inputs: dict[str, Any] = {"function": without_folder(function), "source": source_digest(function)}
        inputs["arguments"] = source.arguments
        if source.version is not None:
            inputs["version"] = source.version

        def build(directory: Place) -> None:
            make = load_function(function, **source.arguments)
            with working(directory) as folder, (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
                for number, row in enumerate(rows_made(function, make, source.arguments), start=1):
                    try:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    except (TypeError, ValueError) as error:
                        raise UserError(f"{function!r}: row {number} cannot be written as JSON: {error}") from error
            commit(directory, {"inputs": redact(inputs)})

        return self.artifacts.stage("rows", inputs, build) / "rows.jsonl"

    def tokens(self, source: DataSource, run: RunConfig, shape: Shape, *, completed: Completed = "no") -> Place:
        """The token store of one source; ``completed``: see :data:`rayalign.data.budget.Completed`."""
        units = source_units(source, run.data, self)
        inputs = {
            "files": [self.artifacts.pending(folder_of(unit.path)) or input_digest(unit) for unit in units],
            "format": [units[0].format, dict(units[0].columns), units[0].system, dict(units[0].template_kwargs)],
            "tokenizer": tokenizer_identity(run),
            "template": [template_digest(run.data.template), run.data.chat_template_kwargs, str(run.data.date)],
            "stop": run.data.end,
            "settings": {**run.data.model_dump(include=BUDGET), "completed": completed},
            "shape": shape,
            "bad": [run.data.on_bad_row, run.data.max_bad_fraction],
            "shard_mb": run.data.shard_mb,
        }

        def build(directory: Place) -> None:
            found = prepare(
                parts := planned(units, directory),
                run.model,
                run.data,
                completed=completed,
                shape=shape,
                directory=directory,
                writers=num_writers(parts, int(self.session.num_cpus)),
                note=self.artifacts.note,
            )
            collect_quarantine(directory)
            refuse_bad_rows(found, run.data, directory)
            refuse_absent_columns(source, found)
            shards = list(chain.from_iterable(report.shards for report in found.reports))
            facts = {"source": source.label, "files": addresses_of(units)} | preparation_counts(found)
            for rule, count in facts["rules"].items():
                self.artifacts.note(f"tokens: {count} of {found.rows} rows: {RULES[rule]}")
            shard_bytes = run.data.shard_mb << 20
            commit_store(directory, shards, meta={"inputs": inputs, "preparation": facts}, shard_bytes=shard_bytes)
            for path in directory.glob(".*.*json*"):
                path.unlink(missing_ok=True)

        directory = self.artifacts.stage("tokens", inputs, build)
        manifest = read_manifest(directory)
        told = warning(source.label, manifest["meta"].get("preparation", {})) if manifest is not None else ""
        if told:
            self.artifacts.note(told)
        return directory

    def mismatched(self, store: Place) -> Place:
        """The same examples, each with another prompt's completion beside it (KTO's KL estimate)."""
        inputs = {"store": self.digest(store)}

        def build(directory: Place) -> None:
            actors = max(1, int(self.session.num_cpus))
            write_mismatched(store, directory, actors=actors, note=self.artifacts.note)
            shards = list(finished_shards(directory).values())
            commit_store(directory, shards, meta={"inputs": inputs})
            (directory / PARTNERS).unlink(missing_ok=True)

        return self.artifacts.stage("mismatched", inputs, build)

    def reference(self, store: Place, run: RunConfig) -> Place:
        """Reference log-probs of every predicted token, as a column laid over ``store``."""
        return self.log_probs(store, scoring_spec(run, self.session))

    def log_probs(self, store: Place, spec: ScoringSpec) -> Place:
        """Log-probs of every predicted token under a frozen model, as a column laid over ``store``."""
        inputs = {
            "store": self.digest(store),
            "model": spec_digest(spec.model),
            "logit_temperature": spec.logit_temperature,
            "dtype": spec.model.config.dtype,
            "device": self.session.device,
            "transformers": transformers.__version__,
            "budget": [spec.tokens_per_micro_batch, spec.row_tokens],
        }
        if spec.parameter_dtype == "bfloat16":  # the others give the same numbers
            inputs["parameters"] = spec.parameter_dtype

        def build(directory: Place) -> None:
            score_store(
                store, directory, spec, session=self.session, facts={"inputs": inputs}, note=self.artifacts.note
            )

        return self.artifacts.stage("reference", inputs, build)

    def filtered(
        self,
        stores: Sequence[Place],
        log_probs: Sequence[Place],
        *,
        quantile: float,
        own_candidates: int | None,
        unit: str,
    ) -> Place:
        """The rows of ``stores`` that a filter keeps, by the ``log_probs`` laid over each; ``unit`` names rows."""
        inputs = {
            "log_probs": [self.digest(columns) for columns in log_probs],
            "policy_logp_quantile": quantile,
            "own_candidates": own_candidates,
        }

        def build(directory: Place) -> None:
            laid = [TokenStore.open(store).with_columns(over) for store, over in zip(stores, log_probs, strict=True)]
            scores = [scores_of(store, column=LOG_PROBS, own_candidates=own_candidates) for store in laid]
            selection = select_best(scores, quantile)
            write_selected_rows(directory, selection)
            found = {
                "policy_logp_quantile": quantile,
                "threshold": selection.threshold,
                "kept": sum(map(len, selection.kept)),
                "of": sum(map(len, scores)),
                "unit": unit,
            }
            commit(directory, {"inputs": inputs, "filter": found})

        return self.artifacts.stage("filter", inputs, build)

    def prepared(self, store: Place, columns: Sequence[Place], preparation: RoundPreparation) -> Place:
        """What a method makes of ``store``, drawn once, as one round; ``columns`` lie over it already."""
        inputs = {
            "store": self.digest(store),
            "columns": [self.digest(path) for path in columns],
            "method": preparation.key,
        }

        def build(directory: Place) -> None:
            opened = TokenStore.open(store)
            for path in columns:
                opened = opened.with_columns(path)
            prepare_columns(opened, directory, preparation)

        return self.artifacts.stage("prepared", inputs, build)


def filter_facts(directory: Place) -> dict[str, Any]:
    """What a committed filter did: its quantile and threshold, and how many of how many it kept."""
    facts: dict[str, Any] = committed(directory)["filter"]
    return facts


def source_units(source: DataSource, data: DataConfig, stages: Stages) -> list[Unit]:
    """What one entry of ``data.train`` names: files, a dataset, or the rows that a function makes."""
    if source.function is None:
        parts = find_ranges(origin_of(source))
    else:
        made = str(stages.rows(source.function, source))
        exists = not stages.artifacts.pending(folder_of(made))
        parts = find_ranges(Origin(path=made, max_samples=source.max_samples)) if exists else (RowRange(path=made),)
    return [unit_of(part, source, data) for part in parts]


def made_digest(path: str) -> str:
    """The digest of rows that a stage made on an object store, as its manifest has it; empty for any other input."""
    folder = folder_of(path)
    if isinstance(folder, Path) or not folder.name.startswith("rows-"):
        return ""
    manifest = read_manifest(folder)
    return str(manifest["files"][place_of(path).name]["sha256"]) if manifest is not None else ""


def folder_of(path: str) -> Place:
    """Where an input lies: the folder of a stage, for rows that a function made."""
    scheme = path.partition("://")[0]
    return place_of(path).parent if scheme in EXTRAS else Path(path).parent


def num_writers(units: list[Unit], num_cpus: int) -> int:
    """Tokenizing processes that are worth starting."""
    paths = {Path(unit.path) for unit in units}
    if not all(path.is_file() for path in paths):
        return max(1, min(num_cpus, len(units)))
    return max(1, min(num_cpus, len(units), sum(path.stat().st_size for path in paths) // BYTES_PER_WRITER))


def input_digest(unit: Unit) -> str:
    """What identifies a unit's rows: its file's content, and which rows of it."""
    key = made_digest(unit.path) or content_key(unit.path)
    return key if unit.first == 0 and unit.last is None else f"{key}[{unit.first}:{unit.last}]"


def addresses_of(units: Sequence[Unit]) -> list[str]:
    """Every file, by an address without secrets."""
    return [without_query(unit.path) for unit in units]


def collect_quarantine(directory: Place) -> None:
    """One file of the bad rows of all units, in their order."""
    parts = listed(directory, f".*.{BAD_ROWS}")
    if not parts:
        return
    with working(directory) as folder:
        target = FileWriter(folder / QUARANTINE)
        for path in parts:
            target.write(path.read_bytes())
        target.finish()


def refuse_bad_rows(found: StorePreparation, data: DataConfig, directory: Place) -> None:
    """Raise UserError when too many rows are bad, or none is left; the first few are named."""
    is_empty = not any(report.shards for report in found.reports)
    if not found.bad and not is_empty:
        return
    share = found.bad / max(1, found.rows)
    shown = islice(chain.from_iterable(report.bad_rows for report in found.reports), SHOWN_BAD_ROWS)
    named = "\n".join(f"  {row}" for row in shown)
    listed = f"{found.bad} of {found.rows} rows are bad ({share:.2%}); all are in {directory / QUARANTINE}"
    if data.on_bad_row == "fail" or share > data.max_bad_fraction:
        limit = (
            "data.on_bad_row: fail" if data.on_bad_row == "fail" else f"data.max_bad_fraction {data.max_bad_fraction:g}"
        )
        raise UserError(f"{listed}, more than {limit} allows:\n{named}")
    if is_empty:
        raise UserError(f"no row is left to train on: {listed}\n{named}")
