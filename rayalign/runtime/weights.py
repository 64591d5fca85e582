"""Weights from the training process to the actors that sample them, through Ray's object store or past it.

Through the store they are copied into shared memory once; every actor of that node reads them there, and another node
pulls them once. Directly, an actor reads them out of a copy in the memory of the sender's own device (NIXL: by NVLink,
InfiniBand or shared memory). Either way an actor fetches when it needs them, on its own: in a broadcast, one that dies
would hang all others. Weights live as long as the process that sent them: what must outlive it is written to a folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from rayalign.engine.batches import State, Weights
from rayalign.errors import UserError
from rayalign.rounds.weights import BOARD, WeightsGone

SECONDS = 600.0

Content = NDArray[np.uint8] | torch.Tensor
Flat = dict[str, tuple[Content | str, torch.dtype | None, tuple[int, ...]]]
"""Name → (bytes, dtype, shape), or (name of the tensor that it is tied to, None, ()); directly, tensors for bytes."""


class VersionBoard:
    """An actor that knows where the newest versions are; it holds no weights itself."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, list[ray.ObjectRef]]] = {}

    def put(self, sender: str, version: str, where: list[ray.ObjectRef], keep: int) -> None:
        """Know ``version`` from now on; free what is older than the newest ``keep`` of its sender."""
        held = self.held.setdefault(sender, {})
        held[version] = where
        while len(held) > keep:
            del held[next(iter(held))]

    def get(self, version: str) -> list[ray.ObjectRef] | None:
        return next((held[version] for held in self.held.values() if version in held), None)


def make_board(name: str = BOARD) -> ray.actor.ActorHandle:
    """A board that lives as long as this process holds what this returns; no two of a job have the same name."""
    return ray.remote(VersionBoard).options(name=name, num_cpus=0).remote()


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Both ends of the way: the training worker sends, rollout actors fetch; travels between processes."""

    board: str = BOARD
    """The name of the actor that knows what was sent."""
    keep: int = 1
    """Versions that may be asked for at the same time."""
    direct: bool = False
    """From device to device by NIXL; the sender's device holds a copy of each version that is kept."""

    def send(self, weights: Weights, state: State) -> None:
        """Make ``state`` known as the version that ``weights`` names."""
        sender = ray.get_runtime_context().get_worker_id()
        where = [
            ray.put(flat_entries(state, copy_tensor), _tensor_transport="nixl")
            if self.direct
            else ray.put(flat_entries(state))
        ]
        ray.get(ray.get_actor(self.board).put.remote(sender, weights.version, where, self.keep), timeout=SECONDS)

    def fetch(self, weights: Weights) -> State | None:
        """Exactly these weights, as read-only views of shared memory; None where they are in their folder only.

        Raises:
            WeightsGone: the process that sent them has died, and they are in no folder.
        """
        try:
            where = ray.get(ray.get_actor(self.board).get.remote(weights.version), timeout=SECONDS)
            found = ray.get(where[0], timeout=SECONDS) if where else None
        except (ray.exceptions.ObjectLostError, ray.exceptions.RayDirectTransportError):
            found = None
        except ray.exceptions.GetTimeoutError as error:
            raise UserError(
                f"a rollout actor waited {SECONDS / 60:.0f} minutes for the weights of step {weights.step} from the "
                "object store: look at the network between the nodes, and at the disk that Ray spills to"
            ) from error
        if found is not None:
            return tensors_of_entries(found)
        if weights.directory is None:
            raise WeightsGone(weights)
        return None


def in_bytes(tensor: torch.Tensor) -> Content:
    content: Content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return content


def copy_tensor(tensor: torch.Tensor) -> Content:
    """On its own device, where training does not change it. No bytes are nothing that NIXL would move."""
    return tensor.clone(memory_format=torch.contiguous_format) if tensor.nbytes else in_bytes(tensor)


def flat_entries(state: State, content: Callable[[torch.Tensor], Content] = in_bytes) -> Flat:
    """The tensors as Ray copies them once; those that share memory only once."""
    seen: dict[tuple[int, int], str] = {}
    entries: Flat = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.nbytes)
        if place in seen and tensor.nbytes:
            entries[name] = (seen[place], None, ())
            continue
        seen[place] = name
        entries[name] = (content(tensor.detach()), tensor.dtype, tuple(tensor.shape))
    return entries


def tensors_of_entries(entries: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What :func:`flat_entries` was made of, without a copy."""
    found: dict[str, torch.Tensor] = {}
    with warnings.catch_warnings():
        # Shared memory cannot be written to, and torch knows no such tensors: what gets these copies from them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, (content, dtype, shape) in entries.items():
            if dtype is None:
                found[name] = found[content]
            elif isinstance(content, torch.Tensor):
                found[name] = content
            elif content.size:
                found[name] = torch.from_numpy(content).view(dtype).reshape(shape)
            else:
                found[name] = torch.empty(shape, dtype=dtype)
    return found
