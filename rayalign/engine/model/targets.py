"""What of a model gets an adapter: which of its layers, and which of its experts' tensors."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rayalign.engine.model.kinds import is_composite
from rayalign.engine.model.scalar import HEAD, is_scalar
from rayalign.errors import UserError

TAKEN = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|ndim|requires_grad))")
"""Where a class takes the weight of one of its layers, and not only a fact about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What gets an adapter. Unless it is chosen: every linear layer of the blocks.

    Not the head, whose weight is used in its own way; not layers of which the model takes the weight without calling
    them (:func:`bypassed_layers`); and not experts that are fused into one tensor, whose adapters cost the memory of a
    second copy of all experts: these have to be named.
    """

    layers: tuple[str, ...]
    experts: tuple[str, ...]
    """Parameters [experts, …] in which a family holds the matrices of all experts."""
    plain_experts: tuple[str, ...] = ()
    """Such parameters without an adapter, where none were chosen."""
    plain_layers: tuple[str, ...] = ()
    """Layers that are bypassed, likewise."""

    def sentence(self) -> str:
        """What has an adapter and what has none, for logs."""
        told = f"model.lora: an adapter on {len(self.layers)} linear layers ({ends(self.layers)})"
        if self.experts:
            told += f" and {len(self.experts)} tensors of fused experts ({ends(self.experts)})"
        if self.plain_experts:
            told += (
                f"; none on {len(self.plain_experts)} tensors of fused experts ({ends(self.plain_experts)}), which "
                "get one if model.lora.target_modules names them"
            )
        if self.plain_layers:
            told += (
                f"; none on {len(self.plain_layers)} layers ({ends(self.plain_layers)}) whose weights the model takes "
                "past an adapter"
            )
        return told


def adapter_targets(model: PreTrainedModel, wanted: Sequence[str] = ()) -> Targets:
    """What of ``model`` gets an adapter: what ends in one of the names ``wanted``, or else every linear layer.

    Raises:
        UserError: a name fits nothing that can have an adapter.
    """
    layers, experts, bypassed = linear_layers(model), fused_experts(model), bypassed_layers(model)
    missing = [target for target in wanted if not matching_names((target,), (*layers, *experts))]
    if missing:
        also = f", and experts' tensors, which are {ends(experts)}" if experts else ""
        raise UserError(
            f"model.lora.target_modules: {', '.join(missing)}: an adapter goes onto linear layers of the blocks, which "
            f"are {ends(layers)}{also}"
        )
    if wanted:
        return Targets(layers=tuple(matching_names(wanted, layers)), experts=tuple(matching_names(wanted, experts)))
    return Targets(layers=tuple(layers), experts=(), plain_experts=tuple(experts), plain_layers=tuple(bypassed))


def matching_names(wanted: Sequence[str], names: Collection[str]) -> list[str]:
    """The names that end in one of those that are wanted; a tensor called weight goes by its layer's name."""
    ends = tuple(f".{target.removesuffix('.weight')}" for target in wanted)
    return [name for name in names if f".{name.removesuffix('.weight')}".endswith(ends)]


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that an adapter may change, by name: those that texts pass through, but for the head."""
    head = getattr(model, HEAD) if is_scalar(model) else model.get_output_embeddings()
    bypassed = set(bypassed_layers(model))
    return {
        name: module
        for name, module in text_modules(model)
        if is_linear(module) and module is not head and name not in bypassed
    }


def fused_experts(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that hold the matrices of several experts, by name."""
    found: dict[str, nn.Parameter] = {}
    for name, module in text_modules(model):
        if "expert" in f"{name} {type(module).__name__}".lower():
            own = module.named_parameters(recurse=False)
            found |= {f"{name}.{key}": parameter for key, parameter in own if parameter.ndim == 3}
    return found


def bypassed_layers(model: PreTrainedModel) -> list[str]:
    """Linear layers of which the model takes the weight, or the answer in another form than that of a linear layer.

    An adapter around such a layer would be left out of what the model computes, or break it. Mamba's mixers take
    weights in some of their kernels only.
    """
    found = []
    for name, owner in text_modules(model):
        layers = {own: layer for own, layer in owner.named_children() if is_linear(layer)}
        if layers:
            source = source_of_class(type(owner).__module__, type(owner).__qualname__)
            mixer = hasattr(owner, "A_log") and hasattr(owner, "D")
            taken = {own for own in TAKEN.findall(source) if mixer or f"self.{own}(" not in source}
            found += [
                f"{name}.{own}" for own, layer in layers.items() if own in taken or not maps_vector_to_vector(layer)
            ]
    return found


def maps_vector_to_vector(layer: nn.Module) -> bool:
    """Whether a linear layer, whatever its class makes of it, gives a vector for a vector."""
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight = layer.get_parameter("weight")
    wanted, given = weight.shape if isinstance(layer, nn.Linear) else reversed(weight.shape)
    try:
        with torch.no_grad():
            found = layer(weight.new_empty(1, given))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, wanted)


@functools.lru_cache(maxsize=256)
def source_of_class(module: str, name: str) -> str:
    """The text of a class; empty where it has none that can be read."""
    try:
        return inspect.getsource(functools.reduce(getattr, name.split("."), sys.modules[module]))
    except (OSError, TypeError, AttributeError, KeyError):
        return ""


def text_modules(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The modules that a text passes through, by name; of a model for images too, those of its decoder."""
    if not is_composite(model.config):
        return list(model.named_modules())
    decoder = {id(module) for module in model.get_decoder().modules()}
    return [(name, module) for name, module in model.named_modules() if id(module) in decoder]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def is_hijacked(model: PreTrainedModel, name: str) -> bool:
    """Whether peft takes the name of a linear layer for that of experts, which were layers in earlier versions."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = peft.LoraConfig(target_modules=[name])
    before = copy.copy(config.target_modules)
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return True  # it misses another half of what it takes for fused experts
    return set(config.target_modules or ()) != set(before or ())


def shorten_names(names: Sequence[str], *, among: Sequence[str]) -> list[str]:
    """The last parts of the names, where these fit nothing else ``among``; else the names as they are."""
    ends = sorted({last_part(name) for name in names})
    dotted = tuple(f".{end}" for end in ends)
    fitting = [name for name in among if f".{name}".endswith(dotted)]
    return ends if set(fitting) == set(names) else list(names)


def last_part(name: str) -> str:
    """A layer's own name, or a tensor's; ``weight`` with its layer's."""
    return ".".join(name.split(".")[-2:]) if name.endswith(".weight") else name.rpartition(".")[2]


def ends(names: Collection[str]) -> str:
    """The last parts of names, each once."""
    return ", ".join(sorted(Counter(name.removesuffix(".weight").rpartition(".")[2] for name in names)))
