"""What is known of a committed token store: its groups, its run, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayalign.config.load import importable
from rayalign.config.method import resolve_method
from rayalign.engine.model.folder import model_directory, tokenizer_digest
from rayalign.errors import UserError
from rayalign.storage.manifest import TornDirectory, read_manifest
from rayalign.storage.place import Place, listed


def store_manifest(store: Place) -> Mapping[str, Any]:
    """Raises UserError where ``store`` is not a committed token store."""
    where = "name a round, <run>/rounds/round_000000-…, or a stage's store, artifacts/tokens-… or artifacts/rollouts-…"
    try:
        manifest = read_manifest(store)
    except TornDirectory as error:
        raise UserError(f"{error}; {where}") from error
    if manifest is None:
        rounds = listed(store, "rounds/round_*")
        raise UserError(
            f"{store} is no committed store; {f'name one of its rounds: {rounds[-1]}' if rounds else where}"
        )
    if "shards" not in manifest or "store" in manifest:
        raise UserError(f"{store} holds no groups of token ids; {where}")
    return manifest


def shape_of_store(store: Place, manifest: Mapping[str, Any]) -> str:
    """What its groups are: as its stage recorded, or as the method of the run whose round it is learns."""
    recorded = manifest["meta"].get("inputs", {}).get("shape")
    if recorded:
        return str(recorded)
    run = run_json_of_store(store)
    if run is None:
        raise UserError(f"{store}: what its groups are is not recorded; leave a round in the folder of its run")
    with importable(Path.cwd()):
        candidates = resolve_method(run["configuration"]["method"]["name"]).candidates
    return "pair" if candidates == "ranking" else candidates


def run_json_of_store(store: Place) -> Mapping[str, Any] | None:
    """``run.json`` of the run whose round this is."""
    rounds = (store.resolve() if isinstance(store, Path) else store).parent
    path = rounds.parent / "run.json"
    if rounds.name != "rounds" or not path.is_file():
        return None
    facts: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def store_tokenizer(store: Place, manifest: Mapping[str, Any], model: str | None) -> Path:
    """The folder of the model that reads these tokens; another one than the store was made with is refused."""
    run = run_json_of_store(store)
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
