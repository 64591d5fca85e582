"""An optimizer's state in files that any strategy and any number of workers read back: torch's distributed checkpoint.

Each worker writes what it alone holds, ``trainer/__0_0.distcp`` and so on, and ``trainer/.metadata`` says where every
part of every tensor lies. Parameters are numbered in the optimizer's order, which is the same under every strategy. So
a run may resume under another strategy, or with other workers.

Tensors are read with ``weights_only=True``. ``.metadata`` is a pickle by torch's design: nothing but what torch writes
there is unpickled, and the checkpoint's digests were verified before.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from rayalign.errors import UserError

FOLDER = Path("trainer")
METADATA = FOLDER / ".metadata"
EARLIER = FOLDER / "optimizer.pt"
"""Where versions before torch's distributed checkpoints wrote all of it."""
KNOWN = frozenset(
    [
        *(("torch", name) for name in ("Size", "float32", "float64", "bfloat16", "float16", "int64")),
        ("torch.serialization", "_get_layout"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "TensorProperties",
                "ChunkStorageMetadata",
                "MetadataIndex",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ]
)
"""What the description of a distributed checkpoint of tensors is made of."""

Held = Mapping[str, Tensor]
"""What one worker holds of an optimizer's state: ``number of the parameter.name``, such as ``3.exp_avg``."""


class UnreadableOptimizer(UserError):
    """A checkpoint's weights can be read, its optimizer's state cannot: not by this strategy, or not any more."""


def named_state(optimizer: torch.optim.Optimizer) -> Held:
    """The tensors themselves, not copies."""
    return _named(optimizer.state_dict()["state"])


def _named(state: Mapping[int, Mapping[str, Tensor]]) -> Held:
    """Number of the parameter, a dot and the name of its tensor → the tensor."""
    held: dict[str, Tensor] = {}
    for number, own in state.items():
        held |= {f"{number}.{name}": tensor for name, tensor in own.items()}
    return held


def save_state(held: Held, directory: Path, *, group: dist.ProcessGroup | None = None, alone: bool = False) -> None:
    """Write what this worker holds; rank 0 returns when all have written.

    A collective of ``group`` (None: of all workers), unless this worker writes ``alone``, for it holds everything.

    Raises:
        OSError: whatever the first worker met that could not write; all of them raise it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save(dict(held), storage_writer=PlainErrors(directory / FOLDER), process_group=group, no_dist=alone)
        except CheckpointException as error:
            raise first_failure(error) from error


class PlainErrors(FileSystemWriter):
    """Writes the files, and says of one that could not be written what the system said, on every worker.

    Torch's own error is of its archive's end, and what it came of does not cross processes. Where the files were
    written is not told in them: they may lie elsewhere, and a path is pickled in another way by each version of Python.
    """

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise OSError(*error.__context__.args) from error
            raise


@torch.no_grad()
def load_state(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Load what was saved in ``directory``, each parameter's part to where the parameter is. No collective.

    Raises:
        UnreadableOptimizer: DeepSpeed saved it, or an earlier version, or it is not what torch writes.
    """
    if not (directory / METADATA).exists():
        what = (
            f"an optimizer's state as an earlier version of rayalign wrote it, {EARLIER}. Continue with that version"
            if (directory / EARLIER).exists()
            else "DeepSpeed's own optimizer state, which only strategy: deepspeed reads, with the workers and the "
            "stage that wrote it. Continue with those"
        )
        raise UnreadableOptimizer(
            f"{directory} holds {what}; or resume from the weights alone, with a new optimizer: "
            "checkpoint.restart_optimizer=true"
        )
    saved = read_metadata(directory / METADATA).state_dict_metadata
    state: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(optimized_parameters(optimizer)):
        own = [(key, known) for key, known in saved.items() if key.partition(".")[0] == str(number)]
        for key, known in own:
            assert isinstance(known, TensorStorageMetadata)
            state.setdefault(number, {})[key.partition(".")[2]] = room_of(known, parameter)
    wanted = _named(state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(wanted, checkpoint_id=directory / FOLDER, no_dist=True)
        except CheckpointException as error:
            raise first_failure(error) from error
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def optimized_parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def room_of(saved: TensorStorageMetadata, parameter: Tensor) -> Tensor:
    """An empty tensor in the form of its parameter, its shard where that is one; a scalar belongs to no shard."""
    dtype = saved.properties.dtype
    if not saved.size:
        return torch.empty((), dtype=dtype)
    assert saved.size == parameter.shape
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False)


class Known(pickle.Unpickler):
    """Unpickles what torch writes of a distributed checkpoint, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is nothing that torch writes there")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """What a distributed checkpoint consists of.

    Raises:
        UnreadableOptimizer: it is not what torch writes; no code of the file was run.
    """
    try:
        with path.open("rb") as file:
            found = Known(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise UnreadableOptimizer(f"{path} is no description of a distributed checkpoint: {error}") from error
    if not isinstance(found, Metadata):
        raise UnreadableOptimizer(f"{path} is no description of a distributed checkpoint")
    return found


def first_failure(error: CheckpointException) -> BaseException:
    """What went wrong on the first worker that failed; torch's own exception is none that anybody catches."""
    failure, _ = error.failures[min(error.failures)]
    return failure
