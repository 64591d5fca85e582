"""Models that rank 0 alone reads: the other ranks begin with a skeleton, and get their part from there."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayalign.engine.model.pretrained import ModelSpec, load_policy

CPU, META = torch.device("cpu"), torch.device("meta")


def load_on_rank_0(spec: ModelSpec, device: torch.device, rank: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Whole on rank 0, in the host's memory; a skeleton without weights on the others, which read no file of them."""
    return load_policy(spec, device=device, place=CPU if rank == 0 else META)


def spread_buffers(module: nn.Module, *, over: torch.device, to: torch.device) -> None:
    """Give every rank rank 0's buffers, which files do not hold: sent from and to ``over``, kept in ``to``.

    All ranks call this alike.
    """
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                held = torch.empty_like(buffer, device=over) if buffer.is_meta else buffer.detach().to(over)
                dist.broadcast(held, src=0)
                owner._buffers[name] = held.to(to)


def replace_parameters(module: nn.Module, replacement: Callable[[nn.Parameter], Tensor]) -> None:
    """Put ``replacement(parameter)`` where each parameter is; one that has several places stays one."""
    made: dict[int, nn.Parameter] = {}
    replaced = []  # held, so that no two of them ever have one id
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                replaced.append(parameter)
                made[id(parameter)] = nn.Parameter(replacement(parameter), requires_grad=parameter.requires_grad)
            owner._parameters[name] = made[id(parameter)]
