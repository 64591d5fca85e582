"""A folder that holds an adapter is the model that its base becomes with it: W + (α / r) B A, as one matrix.

So a run that starts there trains the whole of that model, or a new adapter upon it (``model.lora``), and its reference
is that model too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from rayalign.engine.folder import ADAPTER_CONFIG, FIELD, tensors_of
from rayalign.engine.lora import WEIGHTS, refuse_missing_peft
from rayalign.engine.scalar import HEAD_WEIGHT
from rayalign.errors import UserError

NAME = "default"


def merge_adapter(model: PreTrainedModel, directory: Path, *, field: str = FIELD) -> PreTrainedModel:
    """``model``, the adapter's base, with the adapter in ``directory`` merged into its weights, in float32.

    On the meta device nothing is computed, and what does not fit is found all the same.

    Raises:
        UserError: the adapter cannot be merged, or has no place for one of its tensors, or lacks one.
        MissingExtra: peft is not installed.
    """
    refuse_missing_peft()
    import peft

    file = adapter_weights(directory, field)
    tensors_of([file], field=field)  # names what is damaged
    skeleton = model.device.type == "meta"
    tensors = load_file(file)
    grow_embedding(model, tensors)
    try:
        config = peft.PeftConfig.from_pretrained(str(directory))
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is an error below
            adapted = peft.get_peft_model(model, config, adapter_name=NAME, low_cpu_mem_usage=skeleton)
            if not hasattr(adapted.base_model, "merge_and_unload"):
                raise UserError(
                    f"{field}: {directory} is an adapter of type {config.peft_type.value}, which cannot become a part "
                    "of its base's weights: name a model, or a LoRA adapter"
                )
            refuse_other_tensors(adapted, tensors, directory, field)
            if skeleton:
                return model
            merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=False)
    except UserError:
        raise
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(f"{field}: peft cannot put the adapter in {directory} upon its base: {told}") from error
    untie_changed_head(merged)
    merged.requires_grad_(True)
    return merged


def adapter_weights(directory: Path, field: str) -> Path:
    """The file of an adapter's weights; raises UserError where there is none, or only a pickled one."""
    if (directory / WEIGHTS).is_file():
        return directory / WEIGHTS
    if (directory / "adapter_model.bin").is_file():
        raise UserError(
            f"{field}: {directory} holds a pickled adapter, which runs code when loaded: load it with peft and save it "
            "again, which writes safetensors"
        )
    raise UserError(f"{field}: {directory} has an {ADAPTER_CONFIG}, but no {WEIGHTS}: copy the adapter again")


def brings_head(directory: Path, field: str) -> bool:
    """Whether an adapter was saved with a scalar head."""
    names = tensors_of([adapter_weights(directory, field)], field=field)
    return any(name.endswith(f".{HEAD_WEIGHT}") for name in names)


def grow_embedding(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Give the base as many tokens as the adapter's own embedding or head has, where it was saved with one."""
    ends = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight", "embed_out.weight")
    rows = [len(tensor) for name, tensor in tensors.items() if name.endswith(ends)]
    if rows and max(rows) != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(rows), mean_resizing=False)


def refuse_other_tensors(adapted: object, tensors: Mapping[str, Tensor], directory: Path, field: str) -> None:
    """Load the adapter; raise UserError where its file lacks a tensor, or has one without a place."""
    import peft

    skeleton = next(adapted.parameters()).device.type == "meta"  # type: ignore[attr-defined]
    given = {name: tensor.to("meta") if skeleton else tensor for name, tensor in tensors.items()}
    found = peft.set_peft_model_state_dict(adapted, given, adapter_name=NAME, low_cpu_mem_usage=skeleton)
    missing = [name for name in found.missing_keys if f".{NAME}" in name]
    unexpected = [name for name in found.unexpected_keys if not is_repeated(name, tensors)]
    if missing or unexpected:
        lacks = f"lacks {len(missing)} tensors, such as {missing[0]}" if missing else ""
        holds = f"holds {len(unexpected)} tensors without a place, such as {unexpected[0]}" if unexpected else ""
        told = " and ".join(filter(None, (lacks, holds)))
        raise UserError(
            f"{field}: the adapter in {directory} does not fit its base: it {told}; its {ADAPTER_CONFIG} names another "
            "base, or other layers, than it was trained on"
        )


def is_repeated(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has the tensor under its plain name too: peft writes embeddings several times."""
    shorter = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return shorter != name and shorter in tensors


def untie_changed_head(model: PreTrainedModel) -> None:
    """Where an adapter brought another embedding or head than the one that both had, they are saved apart."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    text = model.config.get_text_config()
    if head is None or not text.tie_word_embeddings or head.weight is embedding.weight:
        return
    if torch.equal(head.weight, embedding.weight):
        return
    text.tie_word_embeddings = model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
