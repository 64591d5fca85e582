"""Models and tokenizers in and out: Hugging Face directories, float32 parameters, no dropout, safetensors only."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rayalign.config.model import ModelConfig
from rayalign.engine.model.attention import DENSE
from rayalign.engine.model.checkpointing import checkpoint_blocks
from rayalign.engine.model.compiled import compile_blocks
from rayalign.engine.model.folder import (
    CONFIG,
    FAILURES,
    FIELD,
    is_adapter,
    model_directory,
    read_json,
    tensors_of,
    weight_files,
    weights_directory,
)
from rayalign.engine.model.generation import generation_config
from rayalign.engine.model.kinds import as_text, is_composite, read_config, refuse_no_language_model
from rayalign.engine.model.loading import META, Source, load_weights, quiet_transformers, refuse_unfit, tensors_made_of
from rayalign.engine.model.lora import add_adapter
from rayalign.engine.model.merging import brings_head, merge_adapter
from rayalign.engine.model.precision import EXACT, Precision, SaveDtype, precision_of
from rayalign.engine.model.scalar import (
    HEAD_WEIGHT,
    ScalarHead,
    finish_head,
    is_classifier,
    prepare_export,
    set_one_output,
)
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.errors import UserError, first_line
from rayalign.storage.place import Place

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Which model, and how it is held.

    Parameters are float32 always; ``config.dtype`` is what autocast computes in. What ``config`` says of weights that
    are drawn, an adapter or compiled blocks is done as it says: a reference has a config without them.
    """

    config: ModelConfig
    seed: int = 0
    """What new weights are drawn with: all of them, a head's or an adapter's."""
    head: ScalarHead | None = None
    """A scalar head in place of the vocabulary, drawn with ``seed`` unless ``name`` has one; None: a language model."""
    adapter: Path | None = None
    """Folder of a trained adapter to resume from."""
    trained_head: bool = False
    """The head must be in the files: one that is drawn would measure nothing."""
    rounded: Precision = EXACT
    """Weights are what they will be once they were saved in this precision."""
    field: str = FIELD
    """The setting that names this model, for messages."""

    @property
    def name(self) -> str:
        """A directory in Hugging Face layout, or a Hub id."""
        return self.config.name

    def directory(self) -> Path:
        """Where its files are; raises UserError, naming ``field``, where it has none."""
        return model_directory(self.config.name, self.config.revision, field=self.field)

    def at(self, directory: Place, **changes: Any) -> ModelSpec:
        """The same kind of model with the weights in ``directory``, and with ``changes`` of its config."""
        own = {"name": str(directory), "revision": None, "from_scratch": False}
        return replace(self, config=self.config.model_copy(update={**own, **changes}))


def compute_dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The dtype of autocast: ``auto`` is bfloat16 on CUDA and float32 elsewhere."""
    if spec.config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if spec.config.dtype == "float32" else torch.bfloat16


def load_policy(
    spec: ModelSpec, *, device: torch.device | None = None, place: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready to be trained on ``device`` (the CPU by default), and its tokenizer.

    Its weights are in ``place`` (``device`` by default); on the meta device it is a skeleton, and no weight is read.
    It computes as it does when it is served, without dropout or a router's noise, while it is trained too.

    Raises:
        UserError: see :func:`load_model`; or there is no tokenizer, or no place for an adapter.
    """
    device = device or CPU
    model = load_model(spec, place=place or device)
    tokenizer = model_tokenizer(spec)
    if spec.head is not None:
        prepare_export(model, tokenizer, spec.head)
    if spec.config.lora is not None:
        add_adapter(model, spec.config.lora, seed=spec.seed, trained=spec.adapter)
    if spec.config.gradient_checkpointing:
        checkpoint_blocks(model, spec.config.gradient_checkpointing)
    if spec.config.compile:
        compile_blocks(model, device)
    return as_served(model.to(place or device)), tokenizer


def load_model(spec: ModelSpec, *, place: torch.device = CPU) -> PreTrainedModel:
    """The model with its weights, before anything is changed for training.

    A reward model (``spec.head``) may start from a causal language model, which gets a new head, or from another reward
    model. A folder with an adapter is its base with the adapter merged.

    Raises:
        UserError: there is no such model, or it cannot be trained, or its files lack something: see
            :mod:`rayalign.engine.model.folder`, :mod:`rayalign.engine.model.kinds` and
            :mod:`rayalign.engine.model.loading`.
    """
    directory = spec.directory()
    model = blank_model(spec, directory)
    if place.type == "meta":
        pass
    elif spec.config.from_scratch:
        model = draw_weights(model, spec)
    else:
        model = load_weights(model, weights_source(spec, directory, model)).to(place)
    if spec.head is not None:
        finish_head(model, new=has_new_head(spec, directory), seed=spec.seed, field=spec.field)
    if is_adapter(directory) and not spec.config.from_scratch:
        model = merge_adapter(model, directory, field=spec.field)
    if place.type != "meta" and spec.rounded != EXACT:
        spec.rounded.round(model)
    model.config._name_or_path = str(directory)
    if (generation := generation_config(directory, model, field=spec.field)) is not None:
        model.generation_config = generation
    freeze_other_parts(model)
    return as_served(model)


def refuse_unusable(spec: ModelSpec) -> PreTrainedModel:
    """Raise what :func:`load_model` would raise, as far as it can be known without reading a weight.

    Returns the skeleton.
    """
    directory = spec.directory()
    if not spec.config.from_scratch:
        blank = blank_model(spec, directory)
        refuse_unfit(blank, weights_source(spec, directory, blank))
    return load_model(spec, place=META)


def model_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder; see :func:`load_tokenizer`."""
    directory = spec.directory()
    return load_tokenizer(directory, trust_remote_code=spec.config.trust_remote_code, field=spec.field)


def blank_model(spec: ModelSpec, directory: Path) -> PreTrainedModel:
    """The model on the meta device: without weights, whatever its files hold."""
    base = weights_directory(directory, field=spec.field)
    config = read_config(base, trust_remote_code=spec.config.trust_remote_code, field=spec.field)
    if spec.head is not None:
        set_one_output(config, base, field=spec.field)
    else:
        refuse_no_language_model(config, base, spec.field)
        config = as_text(config, base, text_only=spec.config.text_only, field=spec.field)
    silence_dropout(config)
    config.output_attentions, config.output_hidden_states, config.return_dict = False, False, True
    kind = AutoModelForSequenceClassification if spec.head is not None else AutoModelForCausalLM
    try:
        with META:
            model: PreTrainedModel = kind.from_config(
                config,
                dtype=torch.float32,
                # sdpa leaves a cap of scores out without saying so
                attn_implementation=DENSE if getattr(config, "attn_logit_softcapping", None) else None,
                trust_remote_code=spec.config.trust_remote_code,
            )
    except FAILURES as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{spec.field}: transformers cannot make a model of {base / CONFIG} ({told}): a value in it is one that "
            "the family does not know, or a library is missing"
        ) from error
    return model


def weights_source(spec: ModelSpec, directory: Path, blank: PreTrainedModel) -> Source:
    """Where the weights of a model lie, and which of them may be new."""
    base = weights_directory(directory, field=spec.field)
    new = frozenset({HEAD_WEIGHT}) if spec.head is not None and has_new_head(spec, directory) else frozenset[str]()
    return Source(
        directory=base,
        field=spec.field,
        new=new,
        text_only=spec.config.text_only,
        backbone=blank.base_model_prefix if spec.head is not None else None,
    )


def kept_precision(spec: ModelSpec, wanted: SaveDtype) -> Precision:
    """In which precision a model that begins as ``spec`` is saved, by the names that its tensors have in memory."""
    directory = spec.directory()
    found = precision_of(weights_directory(directory, field=spec.field), wanted, field=spec.field)
    if not found.exact:
        return found
    blank = blank_model(spec, directory)
    return replace(
        found, exact=found.exact | tensors_made_of(blank, weights_source(spec, directory, blank), found.exact)
    )


def has_new_head(spec: ModelSpec, directory: Path) -> bool:
    """Whether a scalar head is drawn, since the folder holds a language model; an adapter may bring its own then."""
    if spec.config.from_scratch:
        return True
    base = weights_directory(directory, field=spec.field)
    if HEAD_WEIGHT in tensors_of(weight_files(base, field=spec.field), field=spec.field):
        return False
    if is_adapter(directory) and brings_head(directory, spec.field):
        return True
    facts = read_json(base / CONFIG, spec.field)
    return not (spec.trained_head or is_classifier(facts.get("architectures")))


def draw_weights(blank: PreTrainedModel, spec: ModelSpec) -> PreTrainedModel:
    """A model like ``blank`` with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model: PreTrainedModel = type(blank)._from_config(
            blank.config, dtype=torch.float32, attn_implementation=blank.config._attn_implementation
        )
    return model


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    stop_ids: Sequence[int] = (),
    state: Mapping[str, Tensor] | None = None,
    precision: Precision = EXACT,
) -> None:
    """Write a directory that ``from_pretrained`` loads with no conversion.

    ``stop_ids`` are the tokens that end a response; generation_config.json names them. ``state`` is what to write as
    the model's weights where the model itself holds only a part of them.
    """
    save_weights(model, directory, state=state, precision=precision)
    tokenizer.save_pretrained(directory)
    if stop_ids and model.can_generate():
        generation = copy.deepcopy(model.generation_config)
        generation.eos_token_id = list(stop_ids)
        generation.save_pretrained(directory)


def save_weights(
    model: PreTrainedModel,
    directory: Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    precision: Precision = EXACT,
) -> None:
    """Write a model's weights and configuration."""
    with quiet_transformers():
        model.save_pretrained(directory, state_dict=precision.cast(model.state_dict() if state is None else state))
    path = directory / CONFIG
    facts = {**read_json(path), "dtype": precision.default}  # transformers writes that of the parameters in memory
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_renamed(model: PreTrainedModel) -> bool:
    """Whether files name or cut the weights in another way than the loaded model does, as with experts."""
    return bool(getattr(model, "_weight_conversions", None))


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of parameters and buffers, wherever they were gathered from: equal where every bit is."""

    def entry(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        content = hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {content.hexdigest()}\n"

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return hashlib.sha256("".join(threads.map(entry, sorted(state.items()))).encode()).hexdigest()


def silence_dropout(config: PretrainedConfig) -> None:
    """With dropout a policy would differ from its own reference before the first step."""
    for name, value in config.get_text_config().to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config.get_text_config(), name, 0.0)


def freeze_other_parts(model: PreTrainedModel) -> None:
    """Train only what texts pass through: DDP would wait for ever for the gradients of a part for images."""
    if not is_composite(model.config):
        return
    parts = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    used = chain.from_iterable(part.parameters() for part in parts if part is not None)
    read = {id(parameter) for parameter in used}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in read)


def as_served(model: PreTrainedModel) -> PreTrainedModel:
    """The model in evaluation mode, but for layers that compute their activations again, which look at the mode.

    In training mode some families route tokens at random, which no configuration turns off.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    return model
