"""A folder that holds an adapter is the model that its base becomes with it: W + (α / r) B A, as one matrix.

A run that starts from such a folder trains the whole of that model, or a new adapter upon it (``model.lora``). That
model is its reference too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from rayalign.engine.model.folder import ADAPTER_CONFIG, FAILURES, FIELD, read_json, tensors_of
from rayalign.engine.model.loading import refuse_nonfinite
from rayalign.engine.model.lora import WEIGHTS, refuse_missing_peft
from rayalign.engine.model.scalar import HEAD_WEIGHT
from rayalign.errors import UserError

NAME = "default"
OF_RANKS = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "lora_bias")
"""Settings of LoRA that mean something else at another rank."""
PREFIX = "base_model.model."
"""What peft puts before the names of a model's tensors."""


def merge_adapter(model: PreTrainedModel, directory: Path, *, field: str = FIELD) -> PreTrainedModel:
    """``model``, the adapter's base, with the adapter in ``directory`` merged into its weights, in float32.

    On the meta device nothing is computed, and what does not fit is found all the same. An embedding and a head that
    are one tensor in the base become two where the adapter makes them differ.

    Raises:
        UserError: the adapter cannot be merged, has no place for one of its tensors or lacks one, or makes a weight
            that is not a number, or infinite.
        MissingExtra: peft is not installed.
    """
    refuse_missing_peft()
    import peft

    file = adapter_weights(directory, field)
    tensors_of([file], field=field)  # names what is damaged
    skeleton = model.device.type == "meta"
    tensors = load_file(file)
    grow_embedding(model, tensors)
    blank = copy.deepcopy(model) if skeleton else None
    try:
        config = peft.PeftConfig.from_pretrained(str(directory))
        config.inference_mode = True
        tie = changed_tie(model, tensors, config)
        if tie is not None:
            untie(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is an error below
            adapted = peft.get_peft_model(model, config, adapter_name=NAME, low_cpu_mem_usage=skeleton)
            repeats = bool(getattr(config, "layer_replication", None))
            if repeats or not hasattr(adapted.base_model, "merge_and_unload"):
                kind = "with layer_replication" if repeats else f"of type {config.peft_type.value}"
                raise UserError(
                    f"{field}: {directory} is an adapter {kind}, which cannot become a part of its base's weights: "
                    "name a model, or another adapter, such as a LoRA"
                )
            refuse_other_tensors(adapted, tensors, directory, field)
            merged: PreTrainedModel = blank or adapted.merge_and_unload(safe_merge=False)
    except UserError:
        raise
    except FAILURES as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
        raise UserError(f"{field}: peft cannot put the adapter in {directory} upon its base ({told})") from error
    if tie is not None:
        settle_tie(merged, tied=tie)
    if not skeleton:
        refuse_nonfinite(merged, directory, field=field)
    merged.requires_grad_(True)
    return merged


def changed_tie(model: PreTrainedModel, tensors: Mapping[str, Tensor], config: Any) -> bool | None:
    """Whether an embedding and a head that are one tensor still are once the adapter has changed one of them.

    None where they are two already, or an adapter changes neither by tensors of its own.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    parts = [name for name, module in model.named_modules() if module is head or module is embedding]
    whole = {part: f"{PREFIX}{part}.weight" for part in parts}
    saved = tuple(config.modules_to_save or ()) if hasattr(config, "modules_to_save") else ()
    own: list[str] = []
    for part in parts:
        named = [name for name in tensors if name.startswith(f"{PREFIX}{part}.")]
        own += named if part.endswith(saved) else [name for name in named if name != whole[part]]
    if not own:
        return None
    if getattr(config, "ensure_weight_tying", False) or all(".token_adapter." in name for name in own):
        return True
    both = [tensors[name] for name in whole.values() if name in tensors]
    return len(both) == len(parts) and torch.equal(*both)


def untie(model: PreTrainedModel) -> None:
    """Give the head a tensor of its own, equal to the embedding's: what changes one would change both."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


def settle_tie(model: PreTrainedModel, *, tied: bool) -> None:
    """Make embedding and head one tensor again, or have them saved as two."""
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    elif model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        untie(model)
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


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


def refuse_other_tensors(adapted: Any, tensors: Mapping[str, Tensor], directory: Path, field: str) -> None:
    """Load the adapter; raise UserError where its file lacks a tensor, or has one without a place.

    Adapters on single experts are those on the fused tensors that the experts have become.
    """
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    skeleton = next(adapted.parameters()).device.type == "meta"
    given = {name: tensor.to("meta") for name, tensor in tensors.items()} if skeleton else dict(tensors)
    found = peft.set_peft_model_state_dict(adapted, given, adapter_name=NAME, low_cpu_mem_usage=skeleton)
    expected = peft.get_peft_model_state_dict(adapted, adapter_name=NAME, save_embedding_layers=False)
    fused = convert_peft_adapter_state_dict_for_transformers(adapted, adapted.peft_config[NAME], given, NAME)
    if len(fused) != len(given):
        refuse_other_scales(directory, field)
    missing = sorted(expected.keys() - fused.keys())
    unexpected = [name for name in found.unexpected_keys if not is_repeated(name, tensors)]
    if missing or unexpected:
        lacks = f"lacks {len(missing)} tensors, such as {missing[0]}" if missing else ""
        holds = f"holds {len(unexpected)} tensors without a place, such as {unexpected[0]}" if unexpected else ""
        told = " and ".join(filter(None, (lacks, holds)))
        raise UserError(
            f"{field}: the adapter in {directory} does not fit its base: it {told}; its {ADAPTER_CONFIG} names another "
            "base, or other layers, than it was trained on"
        )


def refuse_other_scales(directory: Path, field: str) -> None:
    """Raise UserError for an adapter on single experts whose scale peft would change by fusing them.

    Peft doubles the rank of what it fuses, and counts patterns by it.
    """
    facts = read_json(directory / ADAPTER_CONFIG, field)
    if found := [name for name in OF_RANKS if facts.get(name)]:
        raise UserError(
            f"{field}: {directory} is an adapter on single experts with {found[0]}, which peft would put upon fused "
            "experts with another scale than it was trained with: merge it with the versions of peft and transformers "
            "that it was trained with, and name the merged model"
        )


def is_repeated(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has the tensor under its plain name too: peft writes embeddings several times."""
    shorter = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return shorter != name and shorter in tensors
