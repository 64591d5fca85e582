"""The precision that frozen parameters are held in, where the computation does not need float32."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rayalign.config.training import ParameterDtype
from rayalign.engine.model.compiled import transformer_blocks
from rayalign.engine.model.forward import Policy, RootModule
from rayalign.errors import UserError

LINEAR = (nn.Linear, Conv1D)
EXPERTS_NDIM = 3


def refuse_rounded(wanted: ParameterDtype, computes: torch.dtype) -> None:
    """Raise UserError where parameters in bfloat16 would be multiplied in float32."""
    if wanted == "bfloat16" and computes == torch.float32:
        raise UserError(
            "reference.dtype: bfloat16 holds a reference that computes in bfloat16, and this run computes in float32: "
            "write auto, or model.dtype: bfloat16"
        )


def names_in_bfloat16(policy: RootModule, wanted: ParameterDtype, computes: torch.dtype) -> frozenset[str]:
    """The parameters of ``policy`` to hold in bfloat16, by name; the others stay float32.

    ``auto`` names those that change no result: matrices that autocast rounds anyway, and embeddings that bfloat16 holds
    exactly. ``bfloat16`` names all embeddings, and fused experts, which some families multiply in float32 otherwise.
    Norms, a scalar head and embeddings that a family scales itself are never among them.

    Raises:
        UserError: see :func:`refuse_rounded`.
    """
    refuse_rounded(wanted, computes)
    if wanted == "float32" or computes == torch.float32:
        return frozenset()
    experts = expert_parameters(policy) if wanted == "bfloat16" else ()
    multiplied = {id(parameter) for parameter in (*multiplied_parameters(policy), *experts)}
    looked_up = {
        id(module.weight)
        for module in policy.modules()
        if type(module) is nn.Embedding and (wanted == "bfloat16" or is_exact(module.weight))
    }
    other_uses = {id(module.weight) for module in policy.modules() if isinstance(module, nn.Embedding)} - looked_up
    kept = (multiplied | looked_up) - other_uses
    return frozenset(name for name, parameter in policy.named_parameters() if id(parameter) in kept)


def base_names_in_bfloat16(policy: RootModule, computes: torch.dtype) -> frozenset[str]:
    """The parameters below an adapter that bfloat16 holds exactly, and in which no result changes."""
    own = dict(policy.named_parameters())
    names = names_in_bfloat16(policy, "auto", computes)
    return frozenset(name for name in names if not own[name].requires_grad and is_exact(own[name]))


def multiplied_parameters(policy: RootModule) -> Iterator[nn.Parameter]:
    """Matrices of blocks that autocast casts before it multiplies, with their biases, and a language model's head."""
    for module in modules_of_blocks(policy):
        if isinstance(module, LINEAR):
            yield from module.parameters(recurse=False)
    if isinstance(policy, Policy):
        yield policy.model.get_output_embeddings().weight


def expert_parameters(policy: RootModule) -> Iterator[nn.Parameter]:
    """Tensors that hold the matrices of all experts of a layer."""
    for module in modules_of_blocks(policy):
        if not isinstance(module, nn.Conv1d):
            yield from (own for own in module.parameters(recurse=False) if own.ndim == EXPERTS_NDIM)


def modules_of_blocks(policy: RootModule) -> Iterator[nn.Module]:
    for block in transformer_blocks(policy.model):
        yield from block.modules()


def hold_in_bfloat16(policy: RootModule, names: Collection[str]) -> None:
    """Round the named parameters in place; what an embedding gives is float32 still, as under autocast."""
    held = dict(policy.named_parameters())
    for name in names:
        held[name].data = held[name].data.to(torch.bfloat16)
    for module in policy.modules():
        if isinstance(module, nn.Embedding) and module.weight.dtype == torch.bfloat16:
            module.register_forward_hook(as_float32)


def as_float32(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.float()


@torch.no_grad()
def is_exact(weight: Tensor) -> bool:
    """Whether bfloat16 holds every value of ``weight``."""
    return bool((weight.to(torch.bfloat16) == weight).all())
