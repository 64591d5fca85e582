"""An optimizer's state in files: whole, or each rank's part of it, read back by any number of ranks.

``optimizer.pt`` is torch's own state dictionary. Parts are safetensors, ``optimizer-00001-of-00002.safetensors`` and so
on: rank r's rows of every tensor whose parameter is sharded. Both number parameters in the optimizer's order, which is
the same under every strategy, so that a run may go on under another one, or with other workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayalign.errors import UserError

FOLDER = Path("trainer")
WHOLE = FOLDER / "optimizer.pt"
PARTS = "optimizer-*-of-*.safetensors"

Rows = Callable[[int, str, slice], Tensor]
"""(number of the parameter, name such as ``exp_avg``, rows) → those rows, or the scalar."""


def save_part(optimizer: torch.optim.Optimizer, directory: Path, *, rank: int, world_size: int) -> None:
    """Write this rank's part of a sharded optimizer's state."""
    tensors = {
        f"{number}.{name}": (value.to_local() if isinstance(value, DTensor) else value).detach().cpu().contiguous()
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"optimizer-{rank + 1:05d}-of-{world_size:05d}.safetensors")


@torch.no_grad()
def load_state(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Load what was saved in ``directory``, each parameter's part to where the parameter is.

    Raises:
        UserError: DeepSpeed saved it.
    """
    with contextlib.ExitStack() as stack:
        parts = sorted((directory / FOLDER).glob(PARTS))
        if parts:
            names, rows = open_parts(parts, stack)
        elif not (directory / WHOLE).exists():
            raise UserError(
                f"{directory} holds DeepSpeed's own optimizer state, which only strategy: deepspeed reads, with the "
                "workers and the stage that wrote it. Continue with those, or start a new run from that folder's "
                "weights: model.name"
            )
        else:
            names, rows = open_whole(directory / WHOLE)
        state = {
            number: {name: placed(rows, number, name, parameter) for name in names(number)}
            for number, parameter in enumerate(parameters_of(optimizer))
            if names(number)
        }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def placed(rows: Rows, number: int, name: str, parameter: Tensor) -> Tensor:
    """A tensor of the state in the form of its parameter: its shard where that is one."""
    if name == "step" or not isinstance(parameter, DTensor):
        return rows(number, name, slice(None)).clone()
    mesh, total = parameter.device_mesh, parameter.shape[0]
    size = -(-total // mesh.size())
    start = min(mesh.get_local_rank() * size, total)
    local = rows(number, name, slice(start, min(start + size, total))).to(parameter.to_local().device)
    return DTensor.from_local(
        local.clone(), mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def open_whole(path: Path) -> tuple[Callable[[int], list[str]], Rows]:
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)["state"]

    def rows(number: int, name: str, wanted: slice) -> Tensor:
        tensor: Tensor = state[number][name]
        return tensor[wanted] if tensor.ndim else tensor

    return lambda number: list(state.get(number, ())), rows


def open_parts(paths: list[Path], stack: contextlib.ExitStack) -> tuple[Callable[[int], list[str]], Rows]:
    """Parts are in the order of ranks, and so are the rows in them."""
    files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
    names: dict[int, list[str]] = {}
    for key in files[0].keys():  # noqa: SIM118  (an opened file is no mapping)
        number, _, name = key.partition(".")
        names.setdefault(int(number), []).append(name)

    def rows(number: int, name: str, wanted: slice) -> Tensor:
        pieces = [file.get_slice(f"{number}.{name}") for file in files]
        if not pieces[0].get_shape():
            scalar: Tensor = files[0].get_tensor(f"{number}.{name}")
            return scalar
        found, begin = [], 0
        first, last, _ = wanted.indices(sum(piece.get_shape()[0] for piece in pieces))
        for piece in pieces:
            length = piece.get_shape()[0]
            low, high = max(first - begin, 0), min(last - begin, length)
            if low < high:
                found.append(piece[low:high])
            begin += length
        return torch.cat(found) if found else torch.empty((0, *pieces[0].get_shape()[1:]))

    return lambda number: names.get(number, []), rows
