"""The export, tried before the first step: what a run will write is written, loaded again and compared."""

from __future__ import annotations

import logging
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rayalign.engine.model.folder import FIELD
from rayalign.engine.model.kinds import computing
from rayalign.engine.model.loading import Source, load_weights, quiet_transformers
from rayalign.engine.model.lora import adapted_layers, add_adapter, state_with_adapter_merged, write_adapter
from rayalign.engine.model.pretrained import ModelSpec, blank_model, save_weights
from rayalign.engine.model.proofs import proven
from rayalign.engine.model.scalar import is_scalar
from rayalign.engine.model.shrunken import CPU, VOCABULARY, miniature
from rayalign.errors import UserError, first_line

TOLERANCE = 1e-3
"""Units of a logit or score, between a trained model and what was saved of it."""
TOKENS = 12
SAME = ("get_vocab", "chat_template", "eos_token_id", "pad_token_id", "bos_token_id")
"""What of a tokenizer decides which tokens it makes, and which end a text."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportTrial:
    """What the export of a family showed."""

    difference: float | None
    """Between a random model and itself saved and loaded; None where no small one could be made."""
    adapter_difference: float | None = None
    """The same of the adapter, which peft put upon the base again; None without an adapter."""
    problem: str = ""
    """Why it could not be loaded again."""

    @property
    def writes_adapter(self) -> bool:
        """Whether the adapter alone is worth writing: peft reads it as it was trained."""
        return self.adapter_difference is not None and self.adapter_difference <= TOLERANCE


def try_export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> ExportTrial:
    """Save, load and compare a small random model of the class, configuration and adapter that ``spec`` would export.

    ``model`` may be a skeleton. The result is kept: see :mod:`rayalign.engine.model.proofs`. The tokenizer and the
    generation configuration are the real ones, and tried every time.

    Raises:
        UserError: what is saved is not what was trained, or cannot be loaded.
    """
    lora = spec.config.lora.model_dump() if spec.config.lora is not None else None
    kept = proven(
        "export", model, lambda: asdict(measure_export(model, spec)), device=CPU, on=[lora, spec.head is not None]
    )
    trial = ExportTrial(**kept)
    if trial.problem or (trial.difference is not None and not trial.difference <= TOLERANCE):
        how = f"it cannot be loaded: {trial.problem}" if trial.problem else f"logits differ by {trial.difference:.2g}"
        what = "an adapter on a" if spec.config.lora else "a"
        raise UserError(
            f"{spec.field}: {what} {model.config.model_type} model is another one once it is saved and loaded again "
            f"({how}), so that its training would be lost; "
            + ("name other model.lora.target_modules, or train without" if spec.config.lora else "name another model")
        )
    try_tokenizer(model, tokenizer, spec.field)
    return trial


def measure_export(model: PreTrainedModel, spec: ModelSpec) -> ExportTrial:
    """The trial of a family, on a small model."""
    small = miniature(model)
    if small is None:
        return ExportTrial(difference=None)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), torch.no_grad():
        base = Path(folder, "base")
        save_weights(small, base)
        if spec.config.lora is not None:
            add_adapter(small, spec.config.lora.model_copy(update={"dropout": 0.0}), seed=0)
            draw_adapter(small)
        state = small.state_dict()
        with computing(model.config, spec.field):
            expected = outputs_on_probe(small)
        try:
            save_weights(small, Path(folder, "final"), state=state_with_adapter_merged(small, state))
            difference = largest_difference(outputs_on_probe(reload_saved(Path(folder, "final"), spec)), expected)
        except (UserError, RuntimeError, ValueError, KeyError, OSError) as error:
            return ExportTrial(difference=None, problem=first_line(error).replace(f"{FIELD}: {folder}/", ""))
        adapter = None
        if spec.config.lora is not None:
            write_adapter(spec.config.lora, small, state, Path(folder, "adapter"), base=str(base))
            adapter = adapter_distance(Path(folder, "adapter"), base, expected, scalar=is_scalar(small))
    return ExportTrial(difference=difference, adapter_difference=adapter)


def reload_saved(directory: Path, spec: ModelSpec) -> PreTrainedModel:
    """What was saved, as a run that begins with it loads it."""
    saved = spec.at(directory, text_only=False, lora=None)
    blank = blank_model(saved, directory)
    return load_weights(blank, Source(directory=directory)).eval()


def adapter_distance(directory: Path, base: Path, expected: Tensor, *, scalar: bool) -> float | None:
    """How far peft's own reading of an adapter is from what was trained; None where peft cannot read it."""
    import peft

    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    options: dict[str, Any] = {"num_labels": 1} if scalar else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **options)
            found = peft.PeftModel.from_pretrained(model, directory).eval()
            return largest_difference(outputs_on_probe(found.get_base_model()), expected)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError):
        return None


@torch.no_grad()
def draw_adapter(model: PreTrainedModel) -> None:
    """Weights for an adapter that does something."""
    generator = torch.Generator().manual_seed(0)
    for layer in adapted_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            for part in factor.values():
                part.weight.copy_(0.2 * torch.randn(part.weight.shape, generator=generator))


def outputs_on_probe(model: PreTrainedModel) -> Tensor:
    """Logits, or scores, at every token of one fixed text."""
    ids = torch.arange(1, 1 + TOKENS)[None] * 3 % min(VOCABULARY, model.get_input_embeddings().num_embeddings)
    if is_scalar(model):
        scores: Tensor = model.score(model.base_model(input_ids=ids).last_hidden_state)[0].float()
        return scores
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")


def try_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, field: str) -> None:
    """Raise UserError where a tokenizer is another one once it is saved, or the generation settings cannot be saved."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        try:
            tokenizer.save_pretrained(folder)
            again = AutoTokenizer.from_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{field}: the tokenizer cannot be saved and loaded again: {first_line(error)}") from error
    changed = [name for name in SAME if tokenizer_answer(tokenizer, name) != tokenizer_answer(again, name)]
    if changed:
        raise UserError(
            f"{field}: the tokenizer is another one once it is saved and loaded again ({', '.join(changed)} differ): "
            "load it with transformers, save it, and compare its files"
        )


def tokenizer_answer(tokenizer: PreTrainedTokenizerBase, name: str) -> Any:
    found = getattr(tokenizer, name)
    return found() if callable(found) else found
