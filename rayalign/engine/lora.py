"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W x + (α / r) B A x, of which only A and B are trained.

Peft puts the layers into the model, which stays of its own class. Whoever samples, scores or loads the model gets W +
(α / r) B A as one matrix; the adapter alone is written beside it, in peft's layout. A scalar head is small, and new as
a rule: it is trained whole, and written as a part of the adapter.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayalign.engine.scalar import HEAD, HEAD_WEIGHT, is_scalar
from rayalign.errors import MissingExtra, UserError
from rayalign.functional.logprobs import count_per_candidate, sum_per_candidate
from rayalign.types import PackedBatch

ADAPTER = "adapter"
"""Folder of an exported model in which its adapter lies."""
WEIGHTS = "adapter_model.safetensors"
NAME = "default"
"""What peft calls an adapter that has no name of its own."""
PREFIX = "base_model.model."
"""What peft puts before the names of the weights in a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """An adapter: A is drawn with the model's seed and B is 0, so that the policy begins as the model it adapts."""

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    """Names of the layers; empty: every linear layer but the head."""


class GradientDropout(nn.Dropout):
    """Dropout of what is trained on; measurements, which take no gradient, see the whole adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else x


def refuse_missing_peft() -> None:
    """Raises MissingExtra where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra("peft", "lora")


def add_adapter(model: PreTrainedModel, spec: LoraSpec, *, seed: int, trained: Path | None = None) -> None:
    """Put an adapter into ``model`` and freeze all but a scalar head; ``trained`` holds one to go on from.

    Raises:
        UserError: ``target_modules`` names what is no linear layer of the blocks.
        MissingExtra: peft is not installed.
    """
    refuse_missing_peft()
    import peft

    layers = linear_layers(model)
    wanted = spec.target_modules or tuple(layers)
    missing = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if missing:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise UserError(
            f"model.lora.target_modules: {', '.join(missing)}: an adapter goes onto linear layers of the blocks, which "
            f"are {', '.join(known)}"
        )
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())
    config = peft_config(replace(spec, target_modules=wanted), transposed=transposed)
    skeleton = model.device.type == "meta"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=NAME, low_cpu_mem_usage=skeleton)
    for layer in adapted(model).values():
        if spec.dropout:
            layer.lora_dropout[NAME] = GradientDropout(spec.dropout)
    if is_scalar(model):
        model.get_parameter(HEAD_WEIGHT).requires_grad_(True)
    if trained is not None and not skeleton:
        load_adapter(model, trained)


def peft_config(spec: LoraSpec, *, transposed: bool, head: str | None = None) -> Any:
    """``transposed``: the layers hold their matrices as GPT-2's do; ``head`` is trained whole, and scores sequences."""
    import peft

    return peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(spec.target_modules),
        fan_in_fan_out=transposed,
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        modules_to_save=[head] if head else None,
    )


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that an adapter may change, by name: the head's weight is used in its own way."""
    head = getattr(model, HEAD) if is_scalar(model) else model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if is_linear(module) and module is not head}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def is_trained(name: str) -> bool:
    """Whether a parameter of a model with an adapter is trained, and written as the adapter."""
    return ".lora_" in name or name == HEAD_WEIGHT


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name; none in a model that is trained whole."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before the adapter. Peft's own switch would also change what has a gradient."""
    layers = adapted(model).values()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` of ``model``, adapter included, as the model without an adapter that computes the same; float32."""
    layers = adapted(model)
    whole: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if ".lora_" in key:
            continue
        name, _, rest = key.rpartition(".base_layer.")
        if name in layers and rest == "weight":
            layer = layers[name]
            product = state[f"{name}.lora_B.{NAME}.weight"] @ state[f"{name}.lora_A.{NAME}.weight"]
            tensor = tensor + layer.scaling[NAME] * (product.T if layer.fan_in_fan_out else product)
        whole[f"{name}.{rest}" if name in layers else key] = tensor
    return whole


def write_adapter(spec: LoraSpec, model: nn.Module, state: Mapping[str, Tensor], folder: Path, *, base: str) -> None:
    """The adapter in ``state`` as ``peft.PeftModel.from_pretrained`` loads it onto the model ``base``.

    With a scalar head that is ``base`` as a model for sequence classification, with one label.
    """
    folder.mkdir(parents=True, exist_ok=True)
    suffixes = spec.target_modules or tuple(sorted({name.rpartition(".")[2] for name in adapted(model)}))
    transposed = any(layer.fan_in_fan_out for layer in adapted(model).values())
    head = HEAD if is_scalar(model) else None
    config = peft_config(replace(spec, target_modules=suffixes), transposed=transposed, head=head)
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    tensors = {
        PREFIX + key.replace(f".{NAME}.", "."): tensor.detach().cpu().contiguous()
        for key, tensor in state.items()
        if is_trained(key)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Take the adapter's weights from ``folder``; its shape is the model's."""
    tensors = load_file(folder / WEIGHTS)
    for name, parameter in model.named_parameters():
        if is_trained(name):
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
