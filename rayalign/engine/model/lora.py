"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W x + (α / r) B A x, of which only A and B are trained.

Peft puts the layers into the model, which stays of its own class. What samples, scores or loads the model gets W +
(α / r) B A as one matrix. The adapter alone is also written, in peft's layout. A scalar head is small and mostly new:
it is trained whole, and written as a part of the adapter.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayalign.config.model import LoraConfig
from rayalign.engine.model.scalar import HEAD, HEAD_WEIGHT, is_scalar
from rayalign.engine.model.targets import adapter_targets, is_hijacked, shorten_names
from rayalign.errors import MissingExtra, UserError
from rayalign.functional.logprobs import at_least_float32, count_per_candidate, sum_per_candidate
from rayalign.types import PackedBatch

ADAPTER = "adapter"
"""Folder of an exported model in which its adapter lies."""
WEIGHTS = "adapter_model.safetensors"
NAME = "default"
"""What peft calls an adapter that has no name of its own."""
PREFIX = "base_model.model."
"""What peft puts before the names of the weights in a file."""


class GradientDropout(nn.Dropout):
    """Dropout of what is trained on; measurements, which take no gradient, see the whole adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, training=True) if torch.is_grad_enabled() else x


def refuse_missing_peft() -> None:
    """Raises MissingExtra where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra("peft", "lora")


def add_adapter(model: PreTrainedModel, lora: LoraConfig, *, seed: int, trained: Path | None = None) -> None:
    """Put an adapter into ``model`` and freeze all but a scalar head; ``trained`` holds one to resume from.

    Raises:
        UserError: ``target_modules`` names what cannot have an adapter, or dropout is asked for on experts.
        MissingExtra: peft is not installed.
    """
    refuse_missing_peft()
    import peft

    targets = adapter_targets(model, lora.target_modules)
    if targets.experts and lora.dropout:
        raise UserError(
            f"model.lora.dropout: {lora.dropout:g}: adapters on fused experts ({targets.experts[0]}) have none; write "
            "0, or leave the experts out of model.lora.target_modules"
        )
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in targets.layers)
    holder = Holder(model)
    config = peft_config(
        lora,
        layers=[f"model.{name}" for name in targets.layers],
        parameters=[f"model.{name}" for name in targets.experts],
        transposed=transposed,
    )
    skeleton = model.device.type == "meta"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, holder, adapter_name=NAME, low_cpu_mem_usage=skeleton)
    for layer in adapted_layers(model).values():
        if lora.dropout:
            layer.lora_dropout[NAME] = GradientDropout(lora.dropout)
    if is_scalar(model):
        model.get_parameter(HEAD_WEIGHT).requires_grad_(True)
    if trained is not None and not skeleton:
        load_adapter(model, trained)


class Holder(nn.Module):
    """A model without its configuration: by that, peft would take names of some families' layers for their experts."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model


def peft_config(
    lora: LoraConfig,
    *,
    layers: list[str],
    parameters: list[str],
    transposed: bool,
    head: str | None = None,
) -> Any:
    """``transposed``: the layers hold their matrices as GPT-2's do; ``head`` is trained whole, and scores sequences."""
    import peft

    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=layers,
        target_parameters=parameters or None,
        fan_in_fan_out=transposed,
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        modules_to_save=[head] if head else None,
    )


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of a model with an adapter is trained, and written as the adapter."""
    return ".lora_" in name or name == HEAD_WEIGHT


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name; none in a model that is trained whole.

    One around several fused tensors stands several times: ``experts`` and ``experts.base_layer``.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before the adapter. Peft's own switch would also change what has a gradient."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def state_with_adapter_merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` of ``model``, adapter included, as the model without an adapter that computes the same; float32."""
    layers = {
        f"{without_adapter_layer(name)}.{parameter_of(layer)}": (name, layer)
        for name, layer in adapted_layers(model).items()
    }
    whole: dict[str, Tensor] = {}
    for key, held in state.items():
        if ".lora_" in key:
            continue
        tensor = at_least_float32(held) if held.is_floating_point() else held
        if without_adapter_layer(key) in layers:
            name, layer = layers[without_adapter_layer(key)]
            A, B = (state[f"{name}.lora_{factor}.{NAME}.weight"] for factor in "AB")
            tensor = tensor + layer.scaling[NAME] * adapter_product(layer, A, B)
        whole[without_adapter_layer(key)] = tensor
    return whole


def adapter_product(layer: Any, A: Tensor, B: Tensor) -> Tensor:
    """B A as the layer holds its matrix; of experts one for each: A is [E·r, in] and B [out, r·E]."""
    if not is_of_experts(layer):
        return (B @ A).T if layer.fan_in_fan_out else B @ A
    experts = layer.num_experts
    A, B = A.reshape(experts, -1, A.shape[-1]), B.reshape(B.shape[0], -1, experts)
    return torch.einsum("ore,eri->eoi" if layer._did_swap_in_out_features else "ore,eri->eio", B, A)


def is_of_experts(layer: Any) -> bool:
    """Whether an adapter is one of peft's around a parameter, and not around a layer."""
    return hasattr(layer, "parameter_name")


def without_adapter_layer(name: str) -> str:
    """The name of a parameter or layer before an adapter was put around it."""
    return name.replace(".base_layer", "")


def parameter_of(layer: Any) -> str:
    """Which of its layer's parameters an adapter changes."""
    return str(getattr(layer, "parameter_name", "weight"))


def write_adapter(
    lora: LoraConfig, model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path, *, base: str
) -> None:
    """The adapter in ``state`` as ``peft.PeftModel.from_pretrained`` loads it onto the model ``base``.

    With a scalar head that is ``base`` as a model for sequence classification, with one label. Where peft would take
    the name of a layer for the experts that have it too, the layer's matrix is named as a parameter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    changed = adapted_layers(model)
    layers = [name for name, layer in changed.items() if not is_of_experts(layer)]
    experts = [
        f"{without_adapter_layer(name)}.{layer.parameter_name}"
        for name, layer in changed.items()
        if is_of_experts(layer)
    ]
    apart = [name for name in layers if is_hijacked(model, name)]
    head = HEAD if is_scalar(model) else None
    config = peft_config(
        lora,
        layers=shorten_names([name for name in layers if name not in apart], among=names_of_modules(model)),
        parameters=shorten_names([*experts, *(f"{name}.weight" for name in apart)], among=names_of_parameters(model)),
        transposed=any(layer.fan_in_fan_out for layer in changed.values()),
        head=head,
    )
    config.lora_dropout = 0.0 if config.target_parameters else lora.dropout  # peft refuses it there, even unused
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    tensors = {
        PREFIX + key.replace(f".{NAME}.", "."): tensor.detach().cpu().contiguous()
        for key, tensor in state.items()
        if is_adapter_parameter(key)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def names_of_modules(model: nn.Module) -> list[str]:
    return [without_adapter_layer(name) for name, _ in model.named_modules() if ".lora_" not in name]


def names_of_parameters(model: nn.Module) -> list[str]:
    return [without_adapter_layer(name) for name, _ in model.named_parameters() if ".lora_" not in name]


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Take the adapter's weights from ``folder``; its shape is the model's."""
    tensors = load_file(folder / WEIGHTS)
    for name, parameter in model.named_parameters():
        if is_adapter_parameter(name):
            parameter.copy_(tensors.pop(PREFIX + name.replace(f".{NAME}.", ".")))
    if tensors:
        raise UserError(f"model.lora: {folder} holds weights that the model has no layer for: {', '.join(tensors)}")


def with_reference(batch: PackedBatch, token_logp: Tensor) -> PackedBatch:
    """The batch with ``token_logp`` [N] as its reference's, and its sums per candidate; NaN where there is none."""
    B, K = batch.candidate_mask.shape
    shape: dict[str, Any] = {"num_groups": B, "num_candidates": K}
    summed = sum_per_candidate(token_logp.double(), batch.candidate_of, **shape).float()
    exists = count_per_candidate(batch.candidate_of, **shape) > 0
    return replace(
        batch,
        per_token={**batch.per_token, "ref_token_logp": token_logp.float()},
        per_candidate={**batch.per_candidate, "ref_logp": summed.where(exists, torch.nan)},
    )
