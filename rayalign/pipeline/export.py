"""``rayalign export``: replies for AlpacaEval, pairs for TRL. Reads folders; starts no Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.config.load import importable
from rayalign.config.method import resolve_method
from rayalign.data.group import Candidate, Group
from rayalign.data.store import TokenStore
from rayalign.data.texts import Prompts
from rayalign.engine.folder import model_directory, tokenizer_digest
from rayalign.engine.model import load_tokenizer
from rayalign.errors import UserError
from rayalign.manifest import TornDirectory, read_manifest
from rayalign.pipeline.evaluate import KEPT
from rayalign.pipeline.generate import write_rows

Row = dict[str, Any]
ALPACA_EVAL = ("instruction", "output", "generator", "dataset")
"""Fields of a model's outputs as AlpacaEval 0.6 reads them; ``dataset`` names the part of a prompt set."""


def alpaca_eval(
    directory: Path, out: Path, *, step: int | None, prompts: str | None, sample: int, generator: str | None
) -> int:
    """Write an evaluated run's replies as AlpacaEval's ``model_outputs``; returns how many.

    Raises:
        UserError: the folder holds no evaluation with replies, or not that step, prompt set or sample.
    """
    found = evaluations(directory)
    if step is None:
        step = max(found)
    if step not in found:
        raise UserError(f"{directory}: step {step} was not evaluated; there are {', '.join(map(str, sorted(found)))}")
    texts = json.loads(found[step].read_text(encoding="utf-8")).get(KEPT)
    if not texts:
        raise UserError(
            f"{found[step]} was written by an older version, without the replies; measure again: remove "
            f"{found[step].parent}, then repeat rayalign evaluate or rayalign compare"
        )
    name = next(iter(texts)) if prompts is None else prompts
    if name not in texts:
        raise UserError(f"{directory}: no prompt set is called {name}; there are {', '.join(texts)}")
    replies = texts[name]["replies"]
    if not 0 <= sample < len(replies[0]):
        raise UserError(f"{directory}: sample {sample} was not drawn; there are 0 to {len(replies[0]) - 1}")
    who = generator or f"{directory.resolve().name}-step-{step}"
    rows = [
        dict(zip(ALPACA_EVAL, (prompt, row[sample], who, name), strict=True))
        for prompt, row in zip(texts[name]["prompts"], replies, strict=True)
    ]
    written(out, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return len(rows)


def evaluations(directory: Path) -> dict[int, Path]:
    """Step → file of a run's measured checkpoints; raises UserError where there are none."""
    files = sorted((directory / "evaluation").glob("step_*.json"))
    if not files:
        known = sorted(path.parent.parent.name for path in directory.glob("cells/*/evaluation/step_*.json"))
        hint = f"; name one of its cells: {directory}/cells/{known[0]}" if known else ""
        raise UserError(
            f"{directory} holds no evaluation"
            f"{hint or ': measure a trained run with rayalign evaluate, or a grid of them with rayalign compare'}"
        )
    return {int(path.stem.removeprefix("step_")): path for path in files}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Of a store: rows written, and groups that hold no pair, by why."""

    rows: int
    left_out: Mapping[str, int]


def trl_pairs(store: Path, out: Path, *, model: str | None) -> Exported:
    """Write a store's pairs with TRL's columns: ``prompt``, ``chosen``, ``rejected``, as turns where the prompt is.

    Of groups of K scored candidates: the best and the worst by reward.

    Raises:
        UserError: the folder is no committed store, or holds no pairs, or its tokenizer is not known.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out {out}: write a file that ends in .jsonl or .parquet")
    manifest = store_manifest(store)
    shape = shape_of_store(store, manifest)
    if shape not in ("pair", "group", "ranking"):
        raise UserError(
            f"{store} holds {'single completions' if shape in ('one', 'labelled') else shape + 's'}, no pairs: name a "
            "round of a pairwise or a group method, or a store of pairs"
        )
    run = run_of(store)
    trusts = bool(run and run["configuration"]["model"].get("trust_remote_code"))
    tokenizer = load_tokenizer(tokenizer_of(store, manifest, model), trust_remote_code=trusts)
    opened = TokenStore.open(store)
    prompts = Prompts(opened)
    rows: list[Row] = []
    left_out: dict[str, int] = {}
    for index in np.argsort(opened.index.line, kind="stable").tolist():
        found = pair_of(opened[index], shape)
        if isinstance(found, str):
            left_out[found] = left_out.get(found, 0) + 1
            continue
        try:
            prompt = prompts[index]
        except TornDirectory as error:
            raise UserError(f"{store}: {error}") from error
        group = opened[index]
        texts = [tokenizer.decode(group.candidates[k].ids.tolist(), skip_special_tokens=True) for k in found]
        rows.append(row_of(prompt, texts, scores_of(group, found)))
    if not rows:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in left_out.items())
        raise UserError(f"{store} holds no pair ({reasons or 'it is empty'})")
    write_rows(out, rows)
    return Exported(rows=len(rows), left_out=left_out)


def row_of(prompt: Any, texts: list[str], scores: Row) -> Row:
    if isinstance(prompt, str):
        chosen, rejected = texts
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **scores}
    turns = [[{"role": "assistant", "content": text.strip()}] for text in texts]
    return {"prompt": [dict(turn) for turn in prompt], "chosen": turns[0], "rejected": turns[1], **scores}


def pair_of(group: Group, shape: str) -> tuple[int, int] | str:
    """(chosen, rejected), or why there is none."""
    candidates = group.candidates
    if len(candidates) < 2:
        return "without a preference"
    if any(has_gaps(candidate) for candidate in candidates):
        return "with answers of several turns"
    if shape == "pair":
        return 0, 1
    rank, rewards = group.per_candidate.get("rank"), group.per_candidate.get("reward")
    if rank is not None:
        return int(rank.argmin()), int(rank.argmax())
    if rewards is None or np.isnan(rewards).any():
        return "without a reward for every candidate"
    if rewards.min() == rewards.max():
        return "in which all candidates score alike"
    return int(rewards.argmax()), int(rewards.argmin())


def has_gaps(candidate: Candidate) -> bool:
    """Whether a user's or a tool's turn stands inside."""
    return not bool(np.asarray(candidate.mask).all())


def scores_of(group: Group, pair: tuple[int, int]) -> Row:
    rewards = group.per_candidate.get("reward")
    if rewards is None or np.isnan(rewards[list(pair)]).any():
        return {}
    return {"chosen_score": float(rewards[pair[0]]), "rejected_score": float(rewards[pair[1]])}


def store_manifest(store: Path) -> Mapping[str, Any]:
    """Raises UserError where ``store`` is not a committed token store."""
    where = "name a round, <run>/rounds/round_000000-…, or a stage's store, artifacts/tokens-… or artifacts/rollouts-…"
    try:
        manifest = read_manifest(store)
    except TornDirectory as error:
        raise UserError(f"{error}; {where}") from error
    if manifest is None:
        rounds = sorted(store.glob("rounds/round_*"))
        raise UserError(
            f"{store} is no committed store; {f'name one of its rounds: {rounds[-1]}' if rounds else where}"
        )
    if "shards" not in manifest or "store" in manifest:
        raise UserError(f"{store} holds no groups of token ids; {where}")
    return manifest


def shape_of_store(store: Path, manifest: Mapping[str, Any]) -> str:
    """What its groups are: as its stage recorded, or as the method of the run whose round it is learns."""
    recorded = manifest["meta"].get("inputs", {}).get("shape")
    if recorded:
        return str(recorded)
    run = run_of(store)
    if run is None:
        raise UserError(f"{store}: what its groups are is not recorded; leave a round in the folder of its run")
    with importable(Path.cwd()):
        candidates = resolve_method(run["configuration"]["method"]["name"]).candidates
    return "pair" if candidates == "ranking" else candidates


def run_of(store: Path) -> Mapping[str, Any] | None:
    """``run.json`` of the run whose round this is."""
    path = store.resolve().parents[1] / "run.json"
    if store.resolve().parent.name != "rounds" or not path.is_file():
        return None
    facts: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def tokenizer_of(store: Path, manifest: Mapping[str, Any], model: str | None) -> Path:
    """The folder of the model that reads these tokens; another one than the store was made with is refused."""
    run = run_of(store)
    if model is None and run is not None:
        model, revision = run["configuration"]["model"]["name"], run["configuration"]["model"].get("revision")
        return model_directory(model, revision)
    if model is None:
        raise UserError(f"{store}: whose tokens these are is not recorded; say --model, the one it was made for")
    directory = model_directory(model)
    recorded = manifest["meta"].get("inputs", {}).get("tokenizer")
    if recorded and recorded != tokenizer_digest(directory):
        raise UserError(f"{store} was made with another tokenizer than {model}'s; say --model, the one it was made for")
    return directory


def written(out: Path, text: str) -> None:
    """The whole file or none; raises UserError where it cannot be written."""
    unfinished = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error


def told(exported: Exported, out: Path) -> Iterator[str]:
    yield f"{exported.rows} pairs: {out}"
    for reason, count in exported.left_out.items():
        yield f"left out: {count} groups {reason}"
