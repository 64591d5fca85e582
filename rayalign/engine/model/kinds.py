"""Which models can be trained and sampled at all, by their configuration: the others are refused with a way out."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rayalign.engine.model.folder import CONFIG, FAILURES, FIELD, few, read_json
from rayalign.errors import UserError, first_line

KIND = "AutoModelForCausalLM"
MASKED = ("ForMaskedLM", "ForPreTraining")
"""Ends of the names of classes that fill gaps, where a language model continues texts."""


def read_config(directory: Path, *, trust_remote_code: bool = False, field: str = FIELD) -> PretrainedConfig:
    """A model's configuration.

    Raises:
        UserError: transformers has no class for it, its code may not be run, or its weights are quantised.
    """
    facts = read_json(directory / CONFIG, field)
    refuse_quantised(facts, directory, field)
    refuse_foreign_code(facts, directory, trust_remote_code=trust_remote_code, field=field)
    classes = facts.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise UserError(f"{field}: {directory / CONFIG} has architectures that are no list of names: copy it again")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except FAILURES as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{field}: {directory / CONFIG} is refused by transformers: {told}") from error
    if not isinstance(config.get_text_config(), PretrainedConfig):
        raise UserError(f"{field}: {directory / CONFIG} has a text_config, which {config.model_type} models have not")
    vars(config).pop("quantization_config", None)  # an empty one, which transformers takes for a method without name
    return config


def refuse_quantised(facts: Mapping[str, Any], directory: Path, field: str) -> None:
    """Raise UserError where a configuration says that the weights are quantised."""
    parts = [facts, *(value for value in facts.values() if isinstance(value, Mapping))]
    found: Any = next(filter(None, (part.get("quantization_config") for part in parts)), None)
    if found is None:
        return
    known = found if isinstance(found, Mapping) else {"quant_method": found}
    kind = known.get("quant_method") or ("bitsandbytes" if any("load_in_" in key for key in known) else "some method")
    raise UserError(
        f"{field}: the weights in {directory} are quantised ({kind}, see quantization_config in its {CONFIG}), and "
        "what is trained or scored here is whole: name the model that they were made from, or a copy of them that was "
        "dequantised and saved in bfloat16"
    )


def refuse_foreign_code(facts: Mapping[str, Any], directory: Path, *, trust_remote_code: bool, field: str) -> None:
    """Raise UserError where a model's class is not transformers' own, unless its own code may run."""
    kind = facts.get("model_type")
    if kind in CONFIG_MAPPING or (trust_remote_code and facts.get("auto_map")):
        return
    if facts.get("auto_map"):
        modules = sorted({str(value).rpartition("--")[2].partition(".")[0] for value in facts["auto_map"].values()})
        setting = "model.trust_remote_code" if field.startswith("model.") else "trust_remote_code"
        raise UserError(
            f"{field}: {directory} is a model with code of its own ({few(f'{name}.py' for name in modules)}), which "
            f"runs only if you say so: read it, then write {setting}: true"
        )
    if kind is None:
        raise UserError(f"{field}: {directory / CONFIG} has no model_type: it is no model of transformers")
    raise UserError(
        f"{field}: {directory} is a model of type {kind!r}, which transformers {transformers.__version__} does not "
        "know and which brings no code of its own: a newer transformers may know it"
    )


def refuse_no_language_model(config: PretrainedConfig, directory: Path, field: str = FIELD) -> None:
    """Raise UserError where a language model is wanted and the folder holds one of another kind."""
    names = list(config.architectures or ())
    scalar = [name for name in names if name.endswith("ForSequenceClassification")]
    if scalar:
        raise UserError(
            f"{field}: {directory} is a model for sequence classification, such as a reward model: it has no LM "
            "head; name a causal language model"
        )
    refuse_encoder(config, directory, field)
    masked = [name for name in names if name.endswith(MASKED)]
    if masked or getattr(config, "is_decoder", True) is False and _fills_gaps(config):
        raise UserError(
            f"{field}: {directory} ({few(names or [config.model_type])}) reads a text in both directions and cannot "
            "continue one; name a causal language model"
        )


def refuse_encoder(config: PretrainedConfig, directory: Path, field: str = FIELD) -> None:
    """Raise UserError for a model that reads its prompt by an encoder."""
    if config.is_encoder_decoder:
        raise UserError(
            f"{field}: {directory} is a model with an encoder and a decoder ({config.model_type}); name one that only "
            "decodes, such as a Llama or a Qwen"
        )


@contextlib.contextmanager
def computing(config: PretrainedConfig, field: str = FIELD) -> Iterator[None]:
    """Raise UserError where a model of a configuration can be made, and the block that computes with it fails."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except FAILURES as error:
        raise UserError(
            f"{field}: a {config.model_type} model of this configuration computes nothing ({type(error).__name__}: "
            f"{first_line(error)}): a value in its {CONFIG} does not go with the others, or the family's code fails"
        ) from error


def _fills_gaps(config: PretrainedConfig) -> bool:
    """Whether the type has a class that fills gaps; with ``is_decoder`` false its language model looks ahead too."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def as_text(config: PretrainedConfig, directory: Path, *, text_only: bool, field: str = FIELD) -> PretrainedConfig:
    """The configuration of the language model that is loaded: its own, or that of its text part if so asked.

    Raises:
        UserError: only the text part is a language model, and ``text_only`` is off; or there is no class for it.
    """
    known = AutoModelForCausalLM._model_mapping
    if not is_composite(config) or KIND in getattr(config, "auto_map", {}):
        return config
    text = config.get_text_config(decoder=True)
    if text_only and type(text) in known:
        text = copy.deepcopy(text)
        text.tie_word_embeddings = config.tie_word_embeddings  # the head belongs to the whole
        return text
    if not text_only and type(config) in known and getattr(known[type(config)], "config_class", None) is not type(text):
        return config
    others = [name.removesuffix("_config") for name in config.sub_configs if name != "text_config"]
    if type(text) in known and field.startswith(("model.", "critic.")):
        remedy = "write model.text_only: true to train that part alone; final/ will hold no other"
    elif type(text) in known:
        remedy = "name a model of text alone, such as the final/ of a run with model.text_only: true"
    else:
        remedy = f"transformers has no language model for that part ({text.model_type}); name a model of text alone"
    raise UserError(
        f"{field}: {directory} is a {config.model_type} model of text and {few(others) or 'more'}, of which only the "
        f"text part is a language model: {remedy}"
    )


def is_composite(config: PretrainedConfig) -> bool:
    """Whether a model has a text part and others, such as for images."""
    return "text_config" in config.sub_configs and config.get_text_config(decoder=True) is not config
