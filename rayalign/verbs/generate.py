"""``rayalign generate`` and ``rayalign score``: completions and their scores as a file that any trainer can read."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from rayalign.config.load import parse_run, read_overridden
from rayalign.config.run import RunConfig
from rayalign.data.store import TokenStore
from rayalign.data.texts import ANSWERS, Prompts
from rayalign.data.tokenize_rows import Shape
from rayalign.errors import UserError
from rayalign.rounds.answers import written_back
from rayalign.run.display import ProgressBoard
from rayalign.run.identity import spec_digest
from rayalign.run.model import chat_of, model_spec
from rayalign.run.readers import refuse_unusable_models
from rayalign.run.rollouts import drawn_once, prompt_store, prompts_of, relabelled, sampling
from rayalign.run.stages import Stages
from rayalign.run.train import import_folder, refuse_unsupported
from rayalign.runtime.session import connect
from rayalign.storage.artifacts import Artifacts
from rayalign.storage.place import Place

BLOCKS = ("name", "seed", "storage_path", "model", "data", "rollout", "scorer", "optim")
"""What these commands read of a run's YAML."""

NO_SCORE = "rayalign.judge.rule:no_score"
KEPT = ("finished", "tools", "chat_template_kwargs", "model", "sampling")
"""Columns that every kind of row has, where they are known."""
Row = dict[str, Any]
Kind = Literal["all", "pairs", "best"]
"""Every completion of a prompt, chosen and rejected, or the one with the highest score."""
SHAPES: dict[Kind, tuple[Shape, str]] = {"all": ("group", "dpo_rw"), "pairs": ("pair", "dpo"), "best": ("one", "sft")}
"""What is kept of a prompt's completions, and a method that learns from it."""


def generate(path: Path | None, overrides: list[str], *, out: Path, draws: bool, kind: Kind, console: Console) -> None:
    """Complete the prompts of ``data.train``, or score its completions, in resumable stages; then write ``out``.

    Raises:
        UserError: the configuration is wrong, or ``out`` has another ending than .jsonl or .parquet.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out {out}: write a file that ends in .jsonl or .parquet")
    folder = import_folder(path)
    sys.path.insert(0, str(folder))
    run = load_generation(path, overrides, draws=draws, kind=kind)
    refuse_unsupported(run)
    if draws:
        refuse_unusable_models(run, draws=True)
    with connect(import_paths=[folder]) as session, ProgressBoard(console) as board:
        storage = session.storage(run.storage_path)
        stages = Stages(artifacts=Artifacts(root=storage / "artifacts", note=board.say), session=session)
        shape, _ = SHAPES[kind]
        sources = [prompt_store(source, run, stages, draws=draws) for source in run.data.train]
        stores = [made_store(source, run, stages, shape) for source in sources]
        rows = list(chain.from_iterable(generated_rows(store, run) for store in stores))
    if kind == "pairs":
        rows = [pair_row(row) for row in rows if len(row["completions"]) == 2]
    if kind == "best":
        rows = [best_of(row) for row in rows if row["rewards"] != [None]]
    write_dataset(out, rows)
    console.print(f"{len(rows)} rows: {out}", highlight=False)


def load_generation(path: Path | None, overrides: list[str], *, draws: bool, kind: Kind = "all") -> RunConfig:
    """A run's YAML (or none) with the blocks that matter here; the others may be there and are not read."""
    document = read_overridden(path, overrides)
    data = {key: value for key, value in document.data.items() if key in BLOCKS}
    label = document.data.get("label", {}) if kind == "pairs" else {"name": "best" if kind == "best" else "rewards"}
    data |= {"method": SHAPES[kind][1], "label": {"name": label} if isinstance(label, str) else {**label}}
    if draws:
        data |= {"data_policy": {"name": "on_policy", "refresh_every": "never"}}
        data.setdefault("rollout", {})
        if kind == "all":  # which of them is better, only a scorer can say
            data.setdefault("scorer", {"name": "rule", "function": NO_SCORE})
    else:
        data.pop("rollout", None)
        data["label"]["relabel"] = True
    return parse_run(replace(document, data=data))


def made_store(prompts: Place, run: RunConfig, stages: Stages, shape: Shape) -> Place:
    """Completions of prompts, scored: drawn from the policy, or those that the prompts are stored with."""
    if run.drawing is not None:
        stream = prompts_of([prompts], weights=[1.0], groups_per_step=1, window=run.data.window)
        return drawn_once(run.drawing, run, stream, shape, stages, keep_unscored=True)
    if run.relabelling is None:
        raise UserError("scorer: name what gives completions their rewards, such as scorer: {name: rule, function: …}")
    return relabelled(run.relabelling, run, prompts, shape, stages, keep_unscored=True)


def pair_row(row: Row) -> Row:
    """A labelled pair as ``chosen`` and ``rejected``; a prompt without a preference has no such row."""
    (chosen, rejected), (chosen_score, rejected_score) = row["completions"], row["rewards"]
    named = {"chosen": chosen, "rejected": rejected, "chosen_score": chosen_score, "rejected_score": rejected_score}
    return {"prompt": row["prompt"], **named, **{name: row[name] for name in KEPT if name in row}}


def best_of(row: Row) -> Row:
    """The best completion as a row to fine-tune on; a prompt that the scorer failed on has no such row."""
    [completion], [score] = row["completions"], row["rewards"]
    named = {"completion": completion, "completion_score": score}
    return {"prompt": row["prompt"], **named, **{name: row[name] for name in KEPT if name in row}}


def generated_rows(store: Place, run: RunConfig) -> Iterator[Row]:
    """One row per prompt, in the order of the source: K-way columns that ``data.train`` and TRL's tools understand.

    Log-probabilities belong to tokens: a completion whose text is not read back to those that were drawn has none.
    """
    opened, prompts = TokenStore.open(store), Prompts(TokenStore.open(store))
    chat = chat_of(run)
    scored = run.scorer is not None and getattr(run.scorer, "function", "") != NO_SCORE
    made_with: Row = {}
    drawing = run.drawing
    if drawing is not None:
        kept = {
            name: value for name, value in asdict(sampling(drawing.rollout, run)).items() if name not in ("stop_ids",)
        }
        made_with = {"model": spec_digest(model_spec(run)), "sampling": kept}
    for row in np.argsort(opened.index.arrays["line"], kind="stable").tolist():
        group, said = opened[row], prompts.said(row)
        texts, same = written_back(group, said, chat)
        answers = said.get(ANSWERS) or [None] * len(texts)
        made: Row = {
            "prompt": said["prompt"],
            "completions": [answer or text for answer, text in zip(answers, texts, strict=True)],
            "finished": [candidate.finished for candidate in group.candidates],
            **{name: said[name] for name in ("tools", "chat_template_kwargs") if name in said},
        }
        if scored:
            made["rewards"] = json_numbers(group.per_candidate["reward"])
        if drawing is not None:
            ends = np.cumsum([candidate.num_predicted for candidate in group.candidates])
            parts = np.split(group.per_token["behavior_token_logp"].astype(np.float64), ends)[:-1]
            sums = np.array([part.sum() for part in parts])
            made["behavior_logps"] = json_numbers(np.where(same, sums, math.nan))
        yield made | made_with


def json_numbers(values: Any) -> list[float | None]:
    """Plain numbers; null where there is none, as for a prompt that the scorer failed on."""
    found: list[float | None] = []
    for value in values:
        found.append(None if math.isnan(value) else float(value))
    return found


def write_dataset(out: Path, rows: list[Row]) -> None:
    """The whole file or none."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".jsonl":
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
