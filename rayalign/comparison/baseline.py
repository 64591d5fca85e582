"""``evaluate.baseline``: the policy that wins are counted against, where that is not the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rayalign.config.run import EvaluatedRun
from rayalign.config.scoring import REFERENCE, EvaluateConfig
from rayalign.engine.model.folder import model_directory
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.errors import UserError
from rayalign.run.model import reference_spec


def baseline_spec(evaluated: EvaluatedRun) -> ModelSpec | None:
    """The policy that wins are counted against; None is the reference.

    Raises UserError where it is no model, or reads other tokens than the reference.
    """
    directory = baseline_directory(evaluated.evaluate)
    if directory is None:
        return None
    reference = reference_spec(evaluated.run)
    own, theirs = (
        load_tokenizer(folder, trust_remote_code=reference.config.trust_remote_code).get_vocab()
        for folder in (reference.directory(), directory)
    )
    if own != theirs:
        raise UserError(
            f"evaluate.baseline: {evaluated.evaluate.baseline} has another tokenizer than the reference; policies are "
            "compared on the same prompt tokens"
        )
    return replace(reference.at(directory), seed=0)


def baseline_directory(config: EvaluateConfig) -> Path | None:
    """Where the baseline's model is: a folder in Hugging Face layout, a run's ``final/``, or the Hub's files."""
    if config.baseline == REFERENCE:
        return None
    final = Path(config.baseline) / "final"
    try:
        return model_directory(str(final) if final.is_dir() else config.baseline)
    except UserError as error:
        raise UserError(f"evaluate.baseline: {error}") from error


def baseline_label(baseline: str) -> str:
    """What tables call it: the last part of a path or of a hub's name."""
    return baseline.rstrip("/").removesuffix("/final").rpartition("/")[2]
